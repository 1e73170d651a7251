"""How the command line ends: full disks, closed streams, lost readers, and interruptions."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from aligner_middleware import Aligner
from tests.unit.cli.running import COMMAND, PATIENCE, RESUMABLE, ROOT, Run, jsonl, only_line, pair, process


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a full disk is tried on Linux")
@pytest.mark.parametrize(
    "arguments", [("version",), ("correct", "-q", "q", "-a", "a"), ("--help",), ("info", "--help")]
)
def test_a_full_disk_is_an_error_in_one_line(arguments: tuple[str, ...]) -> None:
    with Path("/dev/full").open("w") as full:
        running = process(*arguments, stdout=full)
        _, said = running.communicate(timeout=PATIENCE)
    assert running.returncode == 1
    (line,) = said.splitlines()
    assert "No space left on device" in line


def test_a_reader_that_has_gone_is_an_error_in_one_line(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", *(pair("x" * 10_000) for _ in range(100)))
    with process("correct", path) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        running.stdout.readline()
        running.stdout.close()
        said = running.stderr.read()
        assert running.wait(timeout=PATIENCE) == 1
    assert [line for line in said.splitlines() if not line.startswith("correct: ")] == [
        "error: standard output cannot be written: Broken pipe"
    ]


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")
@pytest.mark.parametrize(
    ("closed", "reason"), [(">&-", "standard output is closed"), ("<&-", "standard input: is closed")]
)
def test_a_closed_stream_is_an_error_in_one_line(closed: str, reason: str) -> None:
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(COMMAND)} correct {closed}"
    done = subprocess.run(["sh", "-c", command], cwd=ROOT, input="", capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert reason in line


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a full disk is tried on Linux")
def test_work_goes_on_where_nobody_can_be_told_of_it(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", pair("one"), pair("two"))
    with Path("/dev/full").open("w") as full:
        running = process("correct", path, stderr=full)
        printed, _ = running.communicate(timeout=PATIENCE)
    assert running.returncode == 0
    assert len(printed.splitlines()) == 2


def test_characters_that_the_encoding_lacks_are_escaped_in_json_and_an_error_in_text() -> None:
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii"}
    running = process("correct", env=ascii_only)
    printed, _ = running.communicate(json.dumps(pair("naïve")), timeout=PATIENCE)
    assert json.loads(printed)["corrected"] == "NAÏVE"
    running = process("correct", "-q", "q", "-a", "naïve", env=ascii_only)
    _, said = running.communicate(timeout=PATIENCE)
    assert running.returncode == 1
    assert "PYTHONIOENCODING" in said


SLOW = """
import os, time
from langchain_core.messages import AIMessage
from tests.chat_models import Scripted

def reply(messages):
    if os.environ["SLOW"] == "yes" and int(messages[-1].text[1:]) > 6:
        time.sleep(1000)
    with open(os.environ["ASKED"], "a") as file:
        file.write(messages[-1].text + "\\n")
    return AIMessage("bad")

llm = Scripted(reply=reply)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="has other signals")
def test_an_interrupted_job_ends_at_once_says_how_to_resume_and_does(tmp_path: Path) -> None:
    model, asked, out = tmp_path / "slow.py", tmp_path / "asked", tmp_path / "out.jsonl"
    model.write_text(SLOW)
    prompts = jsonl(tmp_path / "prompts", *(f"q{number}" for number in range(1, 21)))
    arguments = ("preferences", prompts, out, "--upstream", f"{model}:llm", "--concurrency", 1)
    running = process(*arguments, env=os.environ | {"SLOW": "yes", "ASKED": str(asked)})
    journal, deadline = tmp_path / ".out.jsonl.journal", time.monotonic() + PATIENCE
    while not (asked.exists() and asked.read_text().count("\n") == 6 and journal.read_text().count("\n") == 5):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=PATIENCE)  # far less than an answer takes
    assert running.returncode == 130
    assert said.splitlines()[-1] == RESUMABLE
    assert "Traceback" not in said
    again = process(*arguments, env=os.environ | {"SLOW": "no", "ASKED": str(asked)})
    again.communicate(timeout=PATIENCE)
    assert again.returncode == 0
    assert len(out.read_text().splitlines()) == 20
    assert sorted(asked.read_text().split()) == sorted([f"q{number}" for number in range(1, 21)] + ["q5", "q6"])


@pytest.mark.skipif(sys.platform == "win32", reason="has other signals")
def test_an_interrupted_command_without_a_journal_promises_nothing() -> None:
    with process("correct") as running:
        assert running.stdin is not None
        assert running.stdout is not None
        running.stdin.write(json.dumps(pair()) + "\n")
        running.stdin.flush()
        running.stdout.readline()
        running.send_signal(signal.SIGINT)
        assert running.wait(timeout=PATIENCE) == 130
        assert running.stderr is not None
        assert running.stderr.read() == "interrupted\n"


def interrupt(*args: Any, **options: Any) -> Any:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("target", "arguments", "said"),
    [
        ("Aligner.load", ["correct", "-q", "q", "-a", "a"], "interrupted"),
        ("Aligner.load", ["evaluate", "rows"], "interrupted"),
        ("Aligner.load", ["preferences", "prompts", "out"], "interrupted"),
        (
            "rlhf.preferences.make_preferences",
            ["preferences", "prompts", "out"],
            RESUMABLE,
        ),
        (
            "evaluation.compare",
            ["compare", "prompts", "--out", "o"],
            RESUMABLE,
        ),
        ("training.train", ["train", "rows", "out"], RESUMABLE),
        ("export.store.export_model", ["export", "default", "out"], "interrupted"),
        ("artifact.Artifact.load", ["info", "--model", "."], "interrupted"),
    ],
)
def test_every_command_can_be_interrupted(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, target: str, arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    jsonl(Path("rows"), pair() | {"correction": "c"})
    jsonl(Path("prompts"), pair())
    jsonl(Path("aligner.json"), {})
    monkeypatch.setattr("aligner_middleware.cli.compare.judge_named", lambda *args: None)
    monkeypatch.setattr(f"aligner_middleware.{target}", interrupt)
    outcome = run(*arguments)
    assert outcome.exit_code == 130
    assert outcome.stderr.splitlines()[-1] == said


def test_errors_of_the_file_system_are_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*args: Any, **options: Any) -> Any:
        raise PermissionError(13, "Permission denied", "/somewhere")

    monkeypatch.setattr(Aligner, "load", denied)
    assert only_line(run("correct", "-q", "q", "-a", "a")) == "error: /somewhere: Permission denied"
