"""What the processes of one service share: settings, metrics, and what they tell each other."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from aligner_middleware.errors import JobError
from aligner_middleware.serve.relay import Relay
from aligner_middleware.serve.settings import ServeSettings
from aligner_middleware.serve.worker import create_worker, handed_over


def test_settings_and_a_folder_reach_the_processes_of_a_service(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    got: list[tuple[ServeSettings, Path]] = []
    monkeypatch.setattr(
        "aligner_middleware.serve.app.create_app", lambda settings, folder: got.append((settings, folder))
    )
    settings = ServeSettings(upstream_key="secret", audit_key="a secret of sixteen", audit=tmp_path / "a", port=1)
    before = dict(os.environ)
    with handed_over(settings):
        create_worker()
        ((given, folder),) = got
        assert given == settings
        assert folder.stat().st_mode & 0o777 == 0o700
    assert os.environ == before
    assert not folder.exists()
    with handed_over(ServeSettings(audit=tmp_path / "a")):
        create_worker()
        create_worker()
    assert got[1][0].audit_key == got[2][0].audit_key is not None


def test_a_process_ends_when_the_one_that_started_it_is_killed() -> None:
    code = """
        import multiprocessing, os, signal
        from concurrent.futures import ProcessPoolExecutor
        from aligner_middleware.serve.worker import end_with_parent
        if __name__ == "__main__":
            pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
            pool.submit(end_with_parent).result()
            print("started", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
    """
    # The output ends when nobody is left who could write to it.
    command = [sys.executable, "-c", textwrap.dedent(code)]
    outcome = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, timeout=60)
    assert (outcome.returncode, outcome.stdout) == (-signal.SIGKILL, "started\n")


def test_the_requests_of_a_killed_process_leave_the_metrics_and_its_counts_stay(tmp_path: Path) -> None:
    def process(code: str) -> str:
        environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
        head = (
            "import os\nfrom pathlib import Path\nfrom aligner_middleware.serve.metrics import *\nmetrics = Metrics()\n"
        )
        command = [sys.executable, "-c", head + textwrap.dedent(code)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    process("metrics.running.inc()\nmetrics.requests.labels('/', '200').inc()\nos._exit(0)")
    before = process("print(metrics.text().decode())")
    after = process(f"forget_ended(Path({str(tmp_path)!r}))\nmetrics.running.inc(2)\nprint(metrics.text().decode())")
    assert "aligner_running_requests 1.0" in before
    assert "aligner_running_requests 2.0" in after
    assert 'aligner_requests_total{route="/",status="200"} 1.0' in after


async def test_a_relay_tells_all_others_and_no_ended_one_holds_it_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    got: dict[int, list[str]] = {1: [], 2: [], 3: []}
    relays = {}
    for number, messages in got.items():
        monkeypatch.setattr("os.getpid", lambda number=number: number)
        relays[number] = Relay(tmp_path, messages.append)
    (tmp_path / "4.relay").touch()  # of a process that was killed
    relays[3].close()
    large = "☃" * 50_000
    for message in ("a", large):
        relays[1].tell(message)
    for _ in range(100):
        if len(got[2]) == 2:
            break
        await asyncio.sleep(0.02)
    assert got == {1: [], 2: ["a", large], 3: []}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["1.relay", "2.relay"]
    for _ in range(2_000):  # more than the system keeps for one that does not read
        relays[1].tell("b")
    relays[1].close()
    relays[2].close()


async def test_a_folder_without_place_for_a_socket_is_named(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="TMPDIR"):
        Relay(tmp_path / ("a" * 120), print)
