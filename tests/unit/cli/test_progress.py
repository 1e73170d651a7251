"""Progress of a job: a bar in a terminal, and where there is none a line now and then."""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from aligner_middleware.cli import progress
from aligner_middleware.data.progress import Progress
from tests.unit.cli.running import PATIENCE, Run, jsonl, pair, process


@pytest.mark.skipif(sys.platform == "win32", reason="has no pseudo-terminals")
def test_bars_in_a_terminal_leave_standard_output_to_the_data(tmp_path: Path) -> None:
    import pty

    path = jsonl(tmp_path / "rows.jsonl", *(pair(f"answer {number}") for number in range(100)))
    ours, theirs = pty.openpty()
    with (
        os.fdopen(ours, "rb", buffering=0) as terminal,
        process("correct", path, stderr=theirs, env=os.environ | {"TERM": "xterm"}) as running,
    ):
        os.close(theirs)
        assert running.stdout is not None
        printed = running.stdout.read()
        shown = b""
        with contextlib.suppress(OSError):  # the other end is closed
            while piece := terminal.read(4096):
                shown += piece
        assert running.wait(timeout=PATIENCE) == 0
    assert [json.loads(line)["corrected"] for line in printed.splitlines()] == [f"ANSWER {at}" for at in range(100)]
    assert b"100/100" in shown


@pytest.fixture
def train_log(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[float], list[str]]:
    def train(rows: Any, out: Any, config: Any, *, report: Any, **options: Any) -> Any:
        for step in (1, 2, 3):
            report(Progress("correction", step, 4, f"loss {2 / step:.3f}"))
            time.sleep(0.01)
        report(Progress("correction", 4, 4, "loss 0.500"))
        return SimpleNamespace(rows=1, rows_left_out=0, losses={"correction": math.nan})

    monkeypatch.setattr("aligner_middleware.training.train", train)
    rows = jsonl(tmp_path / "rows.jsonl", pair() | {"correction": "c"})

    def log(seconds: float) -> list[str]:
        monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", seconds)
        outcome = run("train", rows, tmp_path / "out")
        assert outcome.exit_code == 0, outcome.output
        assert json.loads(outcome.stdout) == {"rows": 1, "rows_left_out": 0, "losses": {"correction": None}}
        return list(outcome.stderr.splitlines())

    return log


def test_a_log_tells_start_and_end_of_a_training_and_a_line_now_and_then(
    train_log: Callable[[float], list[str]],
) -> None:
    start, first, second, third, last, end = train_log(0)
    assert start == "train: 1 rows"
    assert first == "train: correction, 1 of 4 steps, loss 2.000"
    assert second == "train: correction, 2 of 4 steps, loss 1.000, 0 s left"
    assert third.startswith("train: correction, 3 of 4 steps, loss 0.667")
    assert last == "train: correction, 4 of 4 steps, loss 0.500, in 0 s"
    assert end.startswith("train: done")


def test_a_log_has_few_lines_of_a_short_run(train_log: Callable[[float], list[str]]) -> None:
    assert [line.partition(", loss")[0].partition(", /")[0] for line in train_log(3600)] == [
        "train: 1 rows",
        "train: correction, 1 of 4 steps",
        "train: correction, 4 of 4 steps",
        "train: done",
    ]


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_a_job_that_ends_early_has_a_last_line(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.showing("preferences", "prompts") as report:
        report(Progress("preferences", 3, 10))
        report(Progress("preferences", 9, 10))
    assert lines_of(capsys) == [
        "preferences: 3 of 10 prompts",
        "preferences: 9 of 10 prompts",
        "preferences: ended after 0 s",
    ]


def test_each_stage_has_a_line_as_it_begins(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # draws no bars into a log
    with progress.showing("export default", "steps") as report:
        report(Progress("fusing", 0, 2))
        report(Progress("quantising", 1, 2))
    assert lines_of(capsys) == [
        "export default: fusing, 0 of 2 steps",
        "export default: quantising, 1 of 2 steps",
        "export default: ended after 0 s",
    ]


def test_a_job_of_unknown_size_that_is_over_at_once_has_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.showing("correct", "lines") as report:
        report(Progress("correct", 3, None))
    assert lines_of(capsys) == []
