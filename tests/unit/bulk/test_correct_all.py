"""A job of very many answers: its rows, what it does again, and what it refuses."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from aligner_middleware import AlignerError, ConfigError, InputError
from aligner_middleware.bulk.correct import Options, correct_all, in_this_process
from aligner_middleware.strength import Strength
from tests.fakes import InstantAligner
from tests.unit.cli.running import ROOT

PAIRS = [(f"q{number}", f"answer {number}") for number in range(200)]


class Counting(InstantAligner):
    """Corrects to capitals, refuses answers with `bad`, and counts the answers it is given."""

    def __init__(self) -> None:
        super().__init__(lambda question, answer: answer.upper())
        self.asked: list[str] = []

    def correct_batch(self, pairs: Any, **options: Any) -> list[Any]:
        self.asked += [answer for _, answer in pairs]
        return [
            InputError("it is bad") if "bad" in answer else self._made(question, answer) for question, answer in pairs
        ]


def job(rows: Any, out: Path, aligner: InstantAligner, strength: Strength = "medium") -> list[Any]:
    options = Options(strength)
    return correct_all(rows, out, in_this_process(aligner, options), aligner.identity, options)


def corrected(out: Path) -> list[str]:
    return [json.loads(line)["corrected"] for line in out.read_text().splitlines()]


def test_rows_stand_in_order_and_equal_ones_are_corrected_once(tmp_path: Path) -> None:
    aligner, out = Counting(), tmp_path / "out.jsonl"
    job([*PAIRS, *reversed(PAIRS)], out, aligner)
    assert corrected(out) == [answer.upper() for _, answer in [*PAIRS, *reversed(PAIRS)]]
    assert aligner.asked == [answer for _, answer in PAIRS]
    assert not (tmp_path / ".out.jsonl.journal").exists()


def test_question_and_answer_are_told_apart(tmp_path: Path) -> None:
    job([("a\0b", "c"), ("a", "b\0c")], tmp_path / "out.jsonl", Counting())
    assert corrected(tmp_path / "out.jsonl") == ["C", "B\0C"]


def test_rows_that_failed_are_corrected_by_the_same_job_and_no_others(tmp_path: Path) -> None:
    out, unreadable = tmp_path / "out.jsonl", AlignerError("no JSON")
    outcomes = job([("q", "one"), unreadable, ("q", "bad"), ("q", "four")], out, Counting())
    assert (outcomes[1], str(outcomes[2])) == (unreadable, "it is bad")
    assert corrected(out) == ["ONE", "FOUR"]
    mended = Counting()
    job([("q", "one"), ("q", "two"), ("q", "three"), ("q", "four")], out, mended)
    assert mended.asked == ["two", "three"]
    assert corrected(out) == ["ONE", "TWO", "THREE", "FOUR"]


def test_a_job_that_was_begun_with_other_options_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    job([("q", "bad")], out, Counting())
    with pytest.raises(ConfigError, match=r"other settings \(options\)"):
        job([("q", "bad")], out, Counting(), "high")


KILLED = """
import sys, time
from pathlib import Path
from tests.unit.bulk.test_correct_all import PAIRS, Counting, job

class Slow(Counting):
    def correct_batch(self, pairs, **options):
        time.sleep(0.1)
        return super().correct_batch(pairs, **options)

job(PAIRS, Path(sys.argv[1]), Slow())
"""


def test_a_job_that_is_killed_goes_on_with_nothing_lost_or_done_twice(tmp_path: Path) -> None:
    out, journal = tmp_path / "out.jsonl", tmp_path / ".out.jsonl.journal"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(out)], cwd=ROOT)
    deadline = time.monotonic() + 60
    while (not journal.exists() or journal.read_bytes().count(b"\n") < 60) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not out.exists()
    done = journal.read_bytes().count(b"\n") - 1
    assert 0 < done < len(PAIRS)
    again = Counting()
    job(PAIRS, out, again)
    assert again.asked == [answer for _, answer in PAIRS[done:]]
    assert corrected(out) == [answer.upper() for _, answer in PAIRS]
