"""`aligner correct`: the rows that it reads, prints, writes and refuses."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.cli.conftest import Upper
from tests.unit.cli.running import PATIENCE, Run, jsonl, only_line, pair, process

DEEP = "[" * 100_000


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (pair(answer=None), "answer is null, expected a text"),
        (pair(question=None), "question is null"),
        (pair(answer=["a"]), "answer is a list"),
        (pair(answer=7), "answer is 7"),
        ({"question": "q"}, "answer is missing"),
        ("[]", "no JSON object"),
        ("nonsense", "Expecting value"),
        pytest.param(DEEP, "nested too deeply", id="deep"),
        (pair(question=" "), "the question is blank"),
    ],
)
def test_a_bad_line_is_named_and_the_others_are_done(run: Run, tmp_path: Path, line: Any, reason: str) -> None:
    path = jsonl(tmp_path / "rows.jsonl", pair("one"), line, pair("three"))
    for name, outcome in (
        (str(path), run("correct", path)),
        ("standard input", run("correct", stdin=path.read_text())),
    ):
        assert outcome.exit_code == 1
        assert [json.loads(row)["corrected"] for row in outcome.stdout.splitlines()] == ["ONE", "THREE"]
        first, last = (said for said in outcome.stderr.splitlines() if said.startswith("error: "))
        assert first.startswith(f"error: {name}:2: ")
        assert reason in first
        assert "1 of 3" in last


@pytest.mark.parametrize("content", [b"\xff\xfe\n", b'{"question": "q", "answer": "\xe9"}\n'])
def test_a_line_that_is_not_utf_8_is_a_bad_line(run: Run, content: bytes) -> None:
    outcome = run("correct", stdin=content + json.dumps(pair()).encode())
    assert outcome.exit_code == 1
    assert json.loads(outcome.stdout)["corrected"] == "A"
    assert "standard input:1: 'utf-8' codec" in outcome.stderr


@pytest.mark.parametrize(
    "broken", [b"", b"\x1f\x8b\x08\x00", b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03" + b"\xff" * 40]
)
def test_a_file_that_cannot_be_read_or_unpacked_is_one_line(run: Run, tmp_path: Path, broken: bytes) -> None:
    path = tmp_path / "rows.jsonl.gz"
    if broken:
        path.write_bytes(broken)
    assert f"{path}: cannot be read" in only_line(run("correct", path))


def test_a_file_is_corrected_in_batches_in_order_with_progress(run: Run, aligner: Upper, tmp_path: Path) -> None:
    answers = [f"answer {number}" for number in range(1000)]
    path = jsonl(tmp_path / "rows.jsonl", *map(pair, answers))
    outcome = run("correct", path)
    assert outcome.exit_code == 0, outcome.output
    rows = [json.loads(line) for line in outcome.stdout.splitlines()]
    assert [row["original"] for row in rows] == answers
    assert [row["corrected"] for row in rows] == [answer.upper() for answer in answers]
    assert len(aligner.batches) < 100
    first, *_, last = outcome.stderr.splitlines()
    assert first == "correct: 0 of 1000 lines"
    assert last.startswith("correct: 1000 of 1000 lines, in ")


def test_blank_lines_count_and_marks_of_byte_order_and_missing_ends_do_not_matter(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf" + json.dumps(pair("one")).encode() + b"\r\n\n\r\n{}\r\n" + json.dumps(pair("x")).encode()
    )
    outcome = run("correct", path)
    assert [json.loads(line)["corrected"] for line in outcome.stdout.splitlines()] == ["ONE", "X"]
    assert f"{path}:4: question is missing" in outcome.stderr


def test_one_answer_or_lines_but_not_both(run: Run, tmp_path: Path) -> None:
    assert run("correct", "-q", "q", "-a", "a").stdout == "A\n"
    assert run("correct", "-", stdin=json.dumps(pair())).exit_code == 0
    for arguments in (("-q", "q"), ("-q", "q", "-a", "a", tmp_path / "rows.jsonl")):
        assert run("correct", *arguments).exit_code == 2


def test_a_lone_surrogate_is_printed_as_json(run: Run) -> None:
    outcome = run("correct", stdin=json.dumps(pair("\ud800 x")))
    assert outcome.exit_code == 0, outcome.output
    assert json.loads(outcome.stdout)["corrected"] == "\ud800 X"


def test_lines_are_answered_as_they_arrive() -> None:
    running = process("correct")
    assert running.stdin is not None
    assert running.stdout is not None
    for answer in ("one", "two"):
        running.stdin.write(json.dumps(pair(answer)) + "\n")
        running.stdin.flush()
        assert json.loads(running.stdout.readline())["corrected"] == answer.upper()
    assert running.communicate(timeout=PATIENCE) == ("", "")
    assert running.returncode == 0


def test_the_file_holds_the_lines_that_are_printed(run: Run, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", pair("one"), pair("\ud800 x"), "nonsense", pair(question=" "), pair("five"))
    printed, written = run("correct", path), run("correct", path, "--out", tmp_path / "out.jsonl", "--json")
    assert (tmp_path / "out.jsonl").read_text() == printed.stdout
    assert json.loads(written.stdout) == {"rows": 3, "changed": 3, "failed": 2}
    assert [outcome.exit_code for outcome in (printed, written)] == [1, 1]
    named = [[line for line in said.stderr.splitlines() if f"{path}:" in line] for said in (printed, written)]
    assert named[0] == named[1]
    assert len(named[0]) == 2


@pytest.mark.parametrize(
    "arguments", [("--ray-workers", 2), ("--out", "rows.jsonl"), ("-q", "q", "-a", "a", "--out", "x")]
)
def test_options_that_do_not_fit_together_are_refused(
    run: Run, tmp_path: Path, arguments: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = () if "-q" in arguments else (jsonl(tmp_path / "rows.jsonl", pair()),)
    outcome = run("correct", *rows, *arguments)
    assert outcome.exit_code == 2, outcome.output
    assert [path.name for path in tmp_path.iterdir()] == [path.name for path in rows]
