"""The command line around the work: what it reads, prints and refuses, and how it ends."""

import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from langchain_core.messages import AIMessage
from typer.testing import CliRunner

from aligner_middleware import Aligner, Correction, InputError, Usage, cli, progress
from tests.chat_models import Scripted
from tests.fakes import InstantAligner

ROOT = Path(__file__).parents[2]
DEEP = "[" * 100_000
PATIENCE = 120  # seconds that a process may take on a busy machine
Run = Callable[..., Any]


class Upper(InstantAligner):
    """Corrects to capitals; notes how many answers come at once."""

    def __init__(self) -> None:
        super().__init__(lambda question, answer: answer.upper())
        self.batches: list[int] = []

    def correct_batch(self, pairs: Any, **options: Any) -> list[Any]:
        self.batches.append(len(pairs))
        return [
            self._made(question, answer) if question.strip() else InputError("the question is blank")
            for question, answer in pairs
        ]


@pytest.fixture
def aligner() -> Upper:
    return Upper()


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, aligner: Upper) -> Run:
    monkeypatch.setattr(Aligner, "load", lambda *args, **options: aligner)

    def invoke(*arguments: Any, stdin: str | bytes | None = None) -> Any:
        return CliRunner().invoke(cli.app, [*map(str, arguments)], input=stdin)

    return invoke


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def pair(answer: Any = "a", question: Any = "q") -> dict[str, Any]:
    return {"question": question, "answer": answer}


def only_line(outcome: Any) -> str:
    """What a failed command says."""
    assert outcome.exit_code == 1, outcome.output
    (line,) = outcome.stderr.splitlines()
    assert line.startswith("error: ")
    return str(line)


# --- rows that are not as expected


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


# --- many lines


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
    assert first == "correct: 1000 lines"
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


COMMAND = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
from aligner_middleware import Aligner, cli
from tests.fakes import InstantAligner
Aligner.load = lambda *args, **options: InstantAligner(lambda question, answer: answer.upper())
cli.main()
"""


def process(*arguments: Any, **options: Any) -> "subprocess.Popen[str]":
    """A real process of the command line, with an aligner that needs no model."""
    command = [sys.executable, "-c", COMMAND, *map(str, arguments)]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE) | options
    return subprocess.Popen(command, cwd=ROOT, text=True, **pipes)


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


@pytest.mark.skipif(sys.platform == "win32", reason="has no pseudo-terminals")
def test_bars_in_a_terminal_leave_standard_output_to_the_data(tmp_path: Path) -> None:
    import pty

    path = jsonl(tmp_path / "rows.jsonl", *(pair(f"answer {number}") for number in range(100)))
    ours, theirs = pty.openpty()
    running = process("correct", path, stderr=theirs, env=os.environ | {"TERM": "xterm"})
    os.close(theirs)
    assert running.stdout is not None
    printed = running.stdout.read()
    shown = b""
    while True:
        try:
            shown += os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
    assert running.wait(timeout=PATIENCE) == 0
    assert [json.loads(line)["corrected"] for line in printed.splitlines()] == [f"ANSWER {at}" for at in range(100)]
    assert b"100/100" in shown


# --- how it ends


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
    running = process("correct", path)
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
    ("closed", "reason"), [(">&-", "standard output is closed"), ("<&-", "standard input:1: is closed")]
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
    running = process("correct")
    assert running.stdin is not None
    assert running.stdout is not None
    running.stdin.write(json.dumps(pair()) + "\n")
    running.stdin.flush()
    running.stdout.readline()
    running.send_signal(signal.SIGINT)
    assert running.wait(timeout=PATIENCE) == 130
    assert running.stderr is not None
    assert running.stderr.read() == "interrupted\n"


RESUMABLE = "interrupted; repeat the command to resume"


def interrupt(*args: Any, **options: Any) -> Any:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("target", "arguments", "said"),
    [
        ("Aligner.load", ["correct", "-q", "q", "-a", "a"], "interrupted"),
        ("Aligner.load", ["evaluate", "rows"], "interrupted"),
        ("Aligner.load", ["preferences", "prompts", "out"], "interrupted"),
        (
            "preferences.make_preferences",
            ["preferences", "prompts", "out"],
            "interrupted; repeat the command to resume",
        ),
        (
            "evaluation.compare",
            ["evaluate", "prompts", "--pairwise", "--out", "o"],
            "interrupted; repeat the command to resume",
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
    monkeypatch.setattr("aligner_middleware.cli.app._judge", lambda *args: None)
    monkeypatch.setattr(f"aligner_middleware.{target}", interrupt)
    outcome = run(*arguments)
    assert outcome.exit_code == 130
    assert outcome.stderr.splitlines()[-1] == said


def test_errors_of_the_file_system_are_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*args: Any, **options: Any) -> Any:
        raise PermissionError(13, "Permission denied", "/somewhere")

    monkeypatch.setattr(Aligner, "load", denied)
    assert only_line(run("correct", "-q", "q", "-a", "a")) == "error: /somewhere: Permission denied"


# --- chat models that cannot be had


@pytest.mark.parametrize(
    "arguments",
    [
        ["preferences", "prompts", "out", "--upstream", "openai:gpt-5"],
        ["evaluate", "prompts", "--out", "report", "--upstream", "openai:gpt-5"],
        ["evaluate", "prompts", "--out", "report", "--judge", "openai:gpt-5"],
    ],
)
def test_a_missing_key_is_one_line(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str]
) -> None:
    pytest.importorskip("langchain_openai")
    monkeypatch.chdir(tmp_path)
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY"):
        monkeypatch.delenv(name, raising=False)
    jsonl(Path("prompts"), "What is snow?")
    assert "OPENAI_API_KEY" in only_line(run(*arguments))


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import json\nllm = undefined", "NameError: name 'undefined' is not defined (line 2)"),
        ("def llm():\n    raise RuntimeError('no\\nkey')", "RuntimeError: no key"),
        ("llm = 3", "is a int, expected a LangChain chat model"),
        ("llm = (", "SyntaxError"),
        ("import not_there_at_all\nllm = 3", "ModuleNotFoundError"),
    ],
)
def test_a_model_of_ones_own_that_fails_is_one_line(run: Run, tmp_path: Path, code: str, reason: str) -> None:
    model = tmp_path / "mine.py"
    model.write_text(code)
    prompts = jsonl(tmp_path / "prompts", "What is snow?")
    assert reason in only_line(run("preferences", prompts, tmp_path / "out", "--upstream", f"{model}:llm"))


def test_a_module_that_fails_to_import_another_is_not_taken_for_missing(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_failing_models.py").write_text("import not_there_at_all\n")
    prompts = jsonl(tmp_path / "prompts", "What is snow?")
    line = only_line(run("preferences", prompts, tmp_path / "out", "--upstream", "my_failing_models:llm"))
    assert "my_failing_models cannot be loaded: ModuleNotFoundError: No module named 'not_there_at_all'" in line


def test_what_a_provider_says_on_many_lines_is_one_line(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def reply(messages: Any) -> AIMessage:
        raise RuntimeError("<html>\n" + "bad gateway\n" * 1000)

    monkeypatch.setattr("aligner_middleware.data.upstream.chat_model", lambda name: Scripted(reply=reply))
    prompts = jsonl(tmp_path / "prompts", "What is snow?")
    outcome = run("preferences", prompts, tmp_path / "out", "--upstream", "some:model")
    assert outcome.exit_code == 1
    last = outcome.stderr.splitlines()[-1]
    assert "RuntimeError: <html> bad gateway bad gateway" in last
    assert len(last) < 1000


# --- options and commands that are misspelt


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["corect"], "correct"),
        (["correct", "--answr", "a"], "--answer"),
        (["correct", "--precision", "imt8"], "int8"),
        (["correct", "--strength", "hihg"], "high"),
        (["correct", "--mode", "shadwo"], "shadow"),
        (["correct", "--on-doubt", "pasthrough"], "passthrough"),
        (["preferences", "prompts", "out", "--form", "mesages"], "messages"),
        (["train", "rows", "out", "--method", "loar"], "lora"),
        (["train", "rows", "out", "--edits", "opperations"], "operations"),
    ],
)
def test_what_is_misspelt_gets_the_nearest_name(run: Run, arguments: list[str], meant: str) -> None:
    outcome = run(*arguments)
    assert outcome.exit_code == 2
    said = " ".join(outcome.stderr.replace("│", " ").split())
    assert re.search(rf"(did you mean|possible options:) {meant}", said.lower().replace("'", ""))


# --- progress where there is no terminal


@pytest.fixture
def train_log(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[float], list[str]]:
    def train(rows: Any, out: Any, config: Any, *, report: Any, **options: Any) -> Any:
        for step in (1, 2, 3):
            report(SimpleNamespace(stage="correction", step=step, steps=4, loss=2 / step, tokens=100 * step))
            time.sleep(0.01)
        report(SimpleNamespace(stage="correction", step=4, steps=4, loss=0.5, tokens=400))
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


def test_training_tells_a_log_of_its_start_its_end_and_now_and_then(train_log: Callable[[float], list[str]]) -> None:
    start, first, second, third, last, end = train_log(0)
    assert start == "train: 1 rows"
    assert first == "correction: 1 of 4 steps, loss 2.000"
    assert second == "correction: 2 of 4 steps, loss 1.000, 0 s left"
    assert third.startswith("correction: 3 of 4 steps, loss 0.667")
    assert last == "correction: 4 of 4 steps, loss 0.500, in 0 s"
    assert end.startswith("train: done")


def test_a_log_has_few_lines_of_a_short_run(train_log: Callable[[float], list[str]]) -> None:
    assert [line.partition(",")[0] for line in train_log(3600)] == [
        "train: 1 rows",
        "correction: 1 of 4 steps",
        "correction: 4 of 4 steps",
        "train: done",
    ]


def test_a_task_that_ends_early_is_told_of(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.bar("preferences", 10, "prompts") as report:
        report(3, 10)
        report(9, 10)
    assert [line.partition(", in")[0] for line in capsys.readouterr().err.splitlines()] == [
        "preferences: 10 prompts",
        "preferences: 3 of 10 prompts",
        "preferences: 9 of 10 prompts",
    ]


def test_steps_are_named_as_they_begin(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # draws no bars into a log
    with progress.steps("export", 2) as report:
        report("merge")
        report("quantise")
    assert capsys.readouterr().err.splitlines() == [
        "export: merge (step 1 of 2)",
        "export: quantise (step 2 of 2)",
        "export: done in 0 s",
    ]


# --- what is printed


def test_no_line_of_an_evaluation_ends_in_nothing(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from aligner_middleware.data.triples import Triple
    from aligner_middleware.evaluation import Evaluation, ScoredRow

    def evaluate(aligner: Any, rows: list[Triple], **options: Any) -> Evaluation:
        made = Correction("q", "a", "a", "stop", Usage(), verdict="keep", score=0.1)
        return Evaluation([ScoredRow(row, made, None) for row in rows])

    monkeypatch.setattr("aligner_middleware.evaluation.evaluate", evaluate)
    monkeypatch.setattr("aligner_middleware.export.parity.perplexity", lambda *args: 2.0)
    outcome = run("evaluate", jsonl(tmp_path / "rows.jsonl", pair() | {"correction": "a", "category": "[b]odd"}))
    assert outcome.exit_code == 0, outcome.output
    assert [line for line in outcome.stdout.splitlines() if line.rstrip().endswith(":")] == []
    assert "perplexity of the reference corrections: 2.00" in outcome.stdout
    assert "[b]odd" in outcome.stdout  # a category, not Rich's markup


def commands_of_the_docs() -> list[str]:
    found = []
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for block in path.read_text(encoding="utf-8").split("```sh\n")[1:]:
            text = block.partition("```")[0].replace("\\\n", " ")
            found += [line for line in text.splitlines() if line.startswith("aligner ")]
    return found


@pytest.mark.parametrize("command", commands_of_the_docs())
def test_every_command_of_the_docs_is_one_that_is_understood(command: str) -> None:
    _, name, *arguments = shlex.split(command.partition(" > ")[0], comments=True)
    group: Any = typer.main.get_command(cli.app)
    context = group.make_context("aligner", [name])
    group.get_command(context, name).make_context(name, arguments, parent=context)
