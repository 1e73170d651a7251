"""`aligner serve`: its settings and their sources, new keys, and a real process that is stopped."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest

from aligner_middleware.serve.keys import hash_key
from aligner_middleware.serve.settings import ServeSettings
from tests.unit.cli.running import PATIENCE, Run, only_line, process


@pytest.fixture
def settings_of(run: Run, monkeypatch: pytest.MonkeyPatch) -> Any:
    found: list[ServeSettings] = []
    monkeypatch.setattr("aligner_middleware.cli.serve._run", found.append)

    def settings(*arguments: Any) -> ServeSettings:
        outcome = run("serve", *arguments)
        assert outcome.exit_code == 0, outcome.output
        return found.pop()

    return settings


def test_options_come_before_the_environment_and_that_before_the_file(
    settings_of: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert settings_of().model_dump() == ServeSettings().model_dump()
    file = tmp_path / "serve.yaml"
    file.write_text(
        "port: 1\nhost: file\nconcurrency: 3\npolicy: {strength: low, mode: shadow, on_error: passthrough}\n"
    )
    monkeypatch.setenv("ALIGNER_SERVE_CONFIG", str(file))
    monkeypatch.setenv("ALIGNER_SERVE_PORT", "2")
    monkeypatch.setenv("ALIGNER_SERVE_HOST", "environment")
    monkeypatch.setenv("ALIGNER_SERVE_POLICY__STRENGTH", "high")
    monkeypatch.setenv("ALIGNER_SERVE_UPSTREAM_KEY", "secret")
    settings = settings_of("--port", 3, "--mode", "correct", "--cors-origins", "http://a", "--cors-origins", "http://b")
    assert (settings.port, settings.host, settings.concurrency) == (3, "environment", 3)
    assert (settings.policy.strength, settings.policy.mode, settings.policy.on_error) == (
        "high",
        "correct",
        "passthrough",
    )
    assert settings.cors_origins == ("http://a", "http://b")
    assert settings_of("--strength", "0.3").policy.strength == 0.3


@pytest.mark.parametrize(
    ("content", "said"),
    [("prot: 1", "prot"), ("port: x", "port is 'x'"), ("- [", "no YAML"), ("- 1", "no YAML"), (None, "no such file")],
)
def test_a_bad_file_is_one_line_that_names_it(run: Run, tmp_path: Path, content: str | None, said: str) -> None:
    file = tmp_path / "serve.yaml"
    if content:
        file.write_text(content)
    line = only_line(run("serve", "--config", file))
    assert str(file) in line
    assert said in line


def test_a_bad_variable_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGNER_SERVE_PORT", "tcp://1")
    assert "ALIGNER_SERVE_PORT" in only_line(run("serve"))


def test_a_bad_option_is_named(run: Run) -> None:
    outcome = run("serve", "--port", 99999)
    assert outcome.exit_code == 2
    assert "--port" in outcome.stderr


def test_a_new_key_is_printed_once_with_lines_that_are_settings(run: Run, tmp_path: Path, settings_of: Any) -> None:
    key, _, yaml = run("serve", "--new-key", "bob").stdout.partition("\n")
    file = tmp_path / "serve.yaml"
    file.write_text(yaml)
    (known,) = settings_of("--config", file).keys
    assert (known.name, known.sha256) == ("bob", hash_key(key))
    assert run("serve", "--new-key", "no name").exit_code == 2


def test_a_process_serves_and_ends_when_it_is_told_to() -> None:
    served = process("serve", "--port", 0, "--upstream", "http://127.0.0.1:9/v1")
    assert served.stderr is not None
    url = ""
    while not url:
        line = served.stderr.readline()
        assert line, "it ended"
        if "running on" in line:
            url = line.partition("running on ")[2].split()[0]
    deadline = time.monotonic() + PATIENCE
    ready = httpx2.get(f"{url}/readyz", timeout=deadline - time.monotonic())
    failed = httpx2.post(
        f"{url}/v1/chat/completions", json={"messages": [{"role": "user", "content": "q"}]}, timeout=30
    )
    served.send_signal(signal.SIGTERM)
    served.communicate(timeout=PATIENCE)
    assert ready.json()["aligner"] == "instant"
    assert "server" not in ready.headers
    assert failed.status_code == 502
