"""Rows for the commands, their outcome, and real processes of the command line."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
PATIENCE = 120  # seconds that a process may take on a busy machine
RESUMABLE = "interrupted; repeat the command to resume"
Run = Callable[..., Any]

COMMAND = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
from aligner_middleware import Aligner
from aligner_middleware.cli.app import main
from tests.fakes import InstantAligner
Aligner.load = lambda *args, **options: InstantAligner(lambda question, answer: answer.upper())
main()
"""


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def pair(answer: Any = "a", question: Any = "q") -> dict[str, Any]:
    return {"question": question, "answer": answer}


def only_line(outcome: Any) -> str:
    """The one line of a failed command on standard error."""
    assert outcome.exit_code == 1, outcome.output
    (line,) = outcome.stderr.splitlines()
    assert line.startswith("error: ")
    return str(line)


def process(*arguments: Any, **options: Any) -> "subprocess.Popen[str]":
    """A real process of the command line, with an aligner that needs no model."""
    command = [sys.executable, "-c", COMMAND, *map(str, arguments)]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE) | options
    return subprocess.Popen(command, cwd=ROOT, text=True, **pipes)
