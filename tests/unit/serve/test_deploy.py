"""The files in `deploy/`: what they name is there, and they agree with each other and with the settings."""

from __future__ import annotations

import configparser
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from aligner_middleware.serve.app import create_app
from aligner_middleware.serve.settings import CONFIG_VARIABLE, ServeSettings
from tests.fakes import InstantAligner

ROOT = Path(__file__).parents[3]
DEPLOY = ROOT / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
DEPLOYMENT, SERVICE = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
POD: dict[str, Any] = DEPLOYMENT["spec"]["template"]["spec"]
CONTAINER: dict[str, Any] = POD["containers"][0]
DRAIN = ServeSettings.model_fields["drain"].default
METRICS = {
    "aligner_requests_total": {"route", "status"},
    "aligner_verdicts_total": {"client", "verdict"},
    "aligner_score_bucket": {"le"},
    "aligner_correction_seconds_bucket": {"le"},
    "aligner_running_requests": set(),
    "aligner_doubts_total": {"doubt"},
}


def unit() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read(DEPLOY / "aligner.service")
    return parser


def paths() -> set[str]:
    app = create_app(ServeSettings(), InstantAligner(lambda question, answer: answer))
    return set(app.openapi()["paths"])


def test_every_variable_is_a_setting() -> None:
    text = "".join(path.read_text() for path in DEPLOY.rglob("*") if path.is_file())
    names = set(re.findall(r"ALIGNER_SERVE_([A-Z_]+)", text)) - {CONFIG_VARIABLE.removeprefix("ALIGNER_SERVE_")}
    assert {"HOST", "PORT", "MODEL", "UPSTREAM"} <= names
    assert {name.lower() for name in names} <= set(ServeSettings.model_fields)


def test_values_of_variables_are_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    given = dict(re.findall(r"(ALIGNER_SERVE_\w+)=(\S+)", DOCKERFILE))
    given |= {entry["name"]: entry["value"] for entry in CONTAINER["env"] if "value" in entry}
    given |= COMPOSE["services"]["aligner"]["environment"] | {"ALIGNER_SERVE_UPSTREAM": "https://api.openai.com/v1"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    settings = ServeSettings.load(None, {})
    assert (settings.host, settings.port, settings.model, settings.threads) == ("0.0.0.0", 8080, "/model", 2)


def test_commands_are_the_packages_own() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "aligner" in project["scripts"]
    assert 'CMD ["aligner", "serve"]' in DOCKERFILE
    assert CONTAINER["args"] == ["aligner", "serve"]
    assert unit()["Service"]["ExecStart"] == "/opt/aligner/bin/aligner serve"


def test_probes_and_checks_ask_for_paths_that_exist() -> None:
    probes = {CONTAINER[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness", "liveness")}
    probes |= set(re.findall(r"127\.0\.0\.1:8080(/\w+)", DOCKERFILE))
    assert probes == {"/readyz", "/healthz"}
    assert probes <= paths()


def test_ports_agree() -> None:
    port = ServeSettings.model_fields["port"].default
    assert f"EXPOSE {port}\n" in DOCKERFILE
    assert {entry["name"]: entry["containerPort"] for entry in CONTAINER["ports"]} == {"http": port}
    assert SERVICE["spec"]["ports"][0]["targetPort"] == "http"
    assert DEPLOYMENT["spec"]["template"]["metadata"]["annotations"]["prometheus.io/port"] == str(port)
    assert COMPOSE["services"]["aligner"]["ports"] == [f"127.0.0.1:{port}:{port}"]
    (scrape,) = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"]
    assert scrape["static_configs"] == [{"targets": [f"aligner:{port}"]}]
    assert scrape["metrics_path"] == "/metrics"


def test_running_requests_may_end_before_the_process_is_killed() -> None:
    assert POD["terminationGracePeriodSeconds"] > DRAIN
    assert int(COMPOSE["services"]["aligner"]["stop_grace_period"].removesuffix("s")) > DRAIN
    assert int(unit()["Service"]["TimeoutStopSec"]) > DRAIN


def test_nothing_runs_as_root_or_writes_where_it_need_not() -> None:
    assert re.search(r"^USER 10001:10001$", DOCKERFILE, re.MULTILINE)
    assert (POD["securityContext"]["runAsNonRoot"], POD["securityContext"]["runAsUser"]) == (True, 10001)
    assert CONTAINER["securityContext"]["readOnlyRootFilesystem"]
    assert COMPOSE["services"]["aligner"]["read_only"]
    assert (unit()["Service"]["DynamicUser"], unit()["Service"]["ProtectSystem"]) == ("yes", "strict")


def test_selectors_and_volumes_have_what_they_name() -> None:
    labels = DEPLOYMENT["spec"]["template"]["metadata"]["labels"]
    assert DEPLOYMENT["spec"]["selector"]["matchLabels"] == SERVICE["spec"]["selector"] == labels
    assert {mount["name"] for mount in CONTAINER["volumeMounts"]} == {volume["name"] for volume in POD["volumes"]}
    for service in COMPOSE["services"].values():
        for volume in service["volumes"]:
            source = volume.partition(":")[0]
            assert source == "../model" or source in COMPOSE["volumes"] or (DEPLOY / source).exists()


def test_files_that_are_copied_are_in_the_build_context() -> None:
    allowed = {line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"}
    for source in re.findall(r"^COPY (?:--chmod=\S+ )?(\w\S*)", DOCKERFILE, re.MULTILINE):
        assert source in allowed
    for name in allowed - {"model"}:
        assert (ROOT / name).exists()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {project["readme"], *project["license-files"], "pyproject.toml", "aligner_middleware"} <= allowed


def test_the_cpus_packages_are_those_of_the_project_with_another_build_of_onnx_runtime() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {
        entry.partition(";")[0].strip()
        for entry in [*project["dependencies"], *project["optional-dependencies"]["serve"]]
        if not entry.startswith("onnxruntime-gpu")
    }
    lines = (DEPLOY / "requirements-cpu.txt").read_text().splitlines()
    assert {line for line in lines if not line.startswith("#")} == wanted


def test_the_dashboard_asks_for_metrics_and_labels_that_exist() -> None:
    dashboard = json.loads((DEPLOY / "grafana" / "dashboards" / "aligner.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    named = {name for query in queries for name in re.findall(r"aligner_\w+", query)}
    assert named == set(METRICS)
    for query in queries:
        known = set().union(*(METRICS[name] for name in re.findall(r"aligner_\w+", query)))
        for labels in re.findall(r"by \(([^)]*)\)", query):
            assert {label.strip() for label in labels.split(",")} <= known, query
    (source,) = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yaml").read_text())["datasources"]
    assert {panel["datasource"]["uid"] for panel in dashboard["panels"]} == {source["uid"]}
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    (provider,) = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards/aligner.yaml").read_text())["providers"]
    mounts = COMPOSE["services"]["grafana"]["volumes"]
    assert any(mount.split(":")[1:2] == [provider["options"]["path"]] for mount in mounts)
