"""`aligner serve --workers 2` as real processes with the default aligner: told, counted, logged, replaced, stopped."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest

from aligner_middleware.serve.audit_file import opened
from aligner_middleware.serve.chat import ROUTE as CHAT
from aligner_middleware.serve.litellm import PATH as GUARDRAIL

pytestmark = pytest.mark.slow

PATIENCE = 240  # seconds that a start or a stop may take on a busy machine
RUDE = {"question": "How do I boil an egg?", "answer": "Boil it for eight minutes. Even a moron like you can do that."}


class Running:
    """A service of two processes."""

    def __init__(self, process: subprocess.Popen[str], log: Path, audit: Path) -> None:
        self.process = process
        self.log = log
        self.audit = audit
        url = awaited(self.url)
        # A connection for each request, so that they go to both processes.
        self.client = httpx2.Client(base_url=url, timeout=PATIENCE, limits=httpx2.Limits(max_keepalive_connections=0))
        awaited(lambda: len(self.started()) == 2 and self.log.read_text().count("startup complete") == 2)

    def url(self) -> str:
        assert self.process.poll() is None, self.log.read_text()
        found = re.search(r"running on (\S+)", self.log.read_text())
        return found[1] if found else ""

    def started(self) -> list[int]:
        return [int(number) for number in re.findall(r"Started server process \[(\d+)\]", self.log.read_text())]

    def rows(self) -> list[dict[str, Any]]:
        with opened(self.audit) as file:
            return list(file.rows())

    def metric(self, name: str) -> float:
        lines = self.client.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


def awaited(condition: Callable[[], Any]) -> Any:
    end = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.05)
    return found


@contextlib.contextmanager
def events_of(service: Running) -> Iterator[Callable[[], list[Any]]]:
    """What a reader of the live log is told."""
    command = [sys.executable, "-c", READER, str(service.client.base_url.join("/page/events"))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as reader:
        assert reader.stdout is not None and reader.stdout.readline().startswith("retry")
        ended = False

        def end() -> list[Any]:
            nonlocal ended
            ended = True
            assert reader.stdout is not None
            lines = reader.stdout.read().splitlines()
            return [json.loads(line[6:]) for line in lines if line.startswith("data: ")]

        yield end
        assert ended


READER = """
import contextlib, httpx2, sys
with contextlib.suppress(httpx2.HTTPError), httpx2.stream("GET", sys.argv[1], timeout=None) as events:
    for line in events.iter_lines():
        print(line, flush=True)
"""


UPSTREAM = ("--upstream", "http://127.0.0.1:9/v1")  # nobody is there


@contextlib.contextmanager
def running(folder: Path, port: int = 0, more: Sequence[str] = UPSTREAM) -> Iterator[Running]:
    log, audit = folder / f"log-{time.monotonic_ns()}", folder / "audit.sqlite"
    command = [sys.executable, "-m", "aligner_middleware", "serve", "--port", str(port), "--workers", "2"]
    command += ["--threads", "1", "--audit", str(audit), "--drain", "20", *more]
    environment = os.environ | {"TMPDIR": str(folder)}
    with log.open("w") as out, subprocess.Popen(command, stderr=out, stdout=out, text=True, env=environment) as process:
        try:
            yield Running(process, log, audit)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait(PATIENCE)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Running]:
    with running(tmp_path) as service:
        yield service


def test_two_processes_are_one_service_that_replaces_a_killed_one_and_stops_as_a_whole(
    service: Running, tmp_path: Path
) -> None:
    first, second = service.started()
    with events_of(service) as events:
        # Decisions of both are told to one page, counted in one scrape, and stand in one audit log.
        for _ in range(30):
            assert service.client.post("/v1/correct", json=RUDE).json()["corrected"] == "Boil it for eight minutes."
        awaited(lambda: len(service.rows()) == 30)
        assert {service.metric('aligner_requests_total{route="/v1/correct"') for _ in range(6)} == {30}
        assert service.metric("aligner_verdicts_total") == service.metric("aligner_score_count") == 30
        awaited(lambda: service.metric("aligner_running_requests") == 2)  # the page's, and the scrape itself

        # LiteLLM's two requests might meet different processes, so they are refused.
        refused = service.client.post(GUARDRAIL, json={"input_type": "request", "texts": ["Hello"]})
        assert (refused.status_code, refused.json()["error"]["code"]) == (501, "needs_one_worker")

        os.kill(first, signal.SIGKILL)
        awaited(lambda: len(service.started()) == 3 and service.log.read_text().count("startup complete") == 3)
        for _ in range(10):
            assert service.client.post("/v1/correct", json=RUDE).status_code == 200
        awaited(lambda: len(service.rows()) == 40)
        assert service.metric('aligner_requests_total{route="/v1/correct"') == 40  # a killed process's count, too
        awaited(lambda: service.metric("aligner_running_requests") <= 2)

        start = time.monotonic()
        service.process.terminate()
        service.process.wait(PATIENCE)
        assert time.monotonic() - start < 15  # the open page held up nothing
        told = events()
    for number in (second, service.started()[2]):
        with pytest.raises(ProcessLookupError):
            os.kill(number, 0)
    rows = service.rows()
    assert Counter(row["id"] for row in rows) == Counter({row["id"]: 1 for row in rows})
    # The reader may have been a client of the killed process.
    assert {decision["id"] for decision in told} <= {row["id"] for row in rows}
    assert len(told) in (30, 40)
    assert not list(tmp_path.glob("aligner-*"))  # the folder that they shared


def test_when_the_first_process_is_killed_the_others_end_and_a_new_start_takes_their_port_and_audit_log(
    tmp_path: Path,
) -> None:
    with running(tmp_path) as service:
        port = service.client.base_url.port
        assert port is not None
        with events_of(service) as events:  # an open page does not hold them up
            assert service.client.post("/v1/correct", json=RUDE).status_code == 200
            service.process.kill()
            awaited(lambda: service.log.read_text().count("Finished server process") == 2)
            assert len(events()) <= 1
    assert len(service.rows()) == 1
    with running(tmp_path, port) as again:
        assert again.client.post("/v1/correct", json=RUDE).json()["corrected"] == "Boil it for eight minutes."
        awaited(lambda: len(again.rows()) == 2)


def test_each_process_answers_by_a_local_model_of_its_own(tmp_path: Path) -> None:
    asked = {"messages": [{"role": "user", "content": "Name a colour."}], "max_tokens": 8}
    said: dict[int, tuple[str, str]] = {}
    with running(tmp_path, more=()) as service:
        for _ in range(50):  # which process takes a connection is the system's choice
            if len(said) == 2:
                break
            with httpx2.Client(base_url=service.client.base_url, timeout=PATIENCE) as client:
                whole = client.post(CHAT, json=asked)
                number = process_of(whole, service)
                streamed = client.post(CHAT, json=asked | {"stream": True})
                assert process_of(streamed, service) == number
            *events, done = [line.removeprefix("data: ") for line in streamed.text.splitlines() if line]
            deltas = [choice["delta"] for event in events for choice in json.loads(event)["choices"]]
            text = "".join(delta.get("content") or "" for delta in deltas)
            said[number] = whole.json()["choices"][0]["message"]["content"], text
            assert done == "[DONE]"
    (first,), (second,) = map(set, said.values())
    assert first == second != ""


def process_of(response: httpx2.Response, service: Running) -> int:
    """The process at the other end of a response's connection."""
    _, port = response.extensions["network_stream"].get_extra_info("client_addr")
    (found,) = [
        number
        for number in service.started()
        if port in {end.raddr.port for end in psutil.Process(number).net_connections() if end.raddr}
    ]
    return found


def test_a_model_that_cannot_be_loaded_is_one_line_before_anything_is_served(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "aligner_middleware", "serve", "--port", "0", "--workers", "2"]
    command += ["--model", str(tmp_path / "none"), "--upstream", "http://127.0.0.1:9/v1"]
    outcome = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert outcome.returncode == 1
    (line,) = outcome.stderr.splitlines()
    assert line.startswith("error: ") and "none" in line
