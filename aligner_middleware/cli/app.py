"""The command line `aligner`: its commands, and how it ends.

Data goes to standard output, progress to standard error. The exit status is 0 for success, 1 for a failure, which is told in
one line, 2 for wrong options, and 130 for an interruption.
"""

from __future__ import annotations

import os
import sys
import threading
from typing import Any

import typer
from typer.core import TyperGroup

from aligner_middleware import __version__
from aligner_middleware.cli.audit import audit
from aligner_middleware.cli.benchmark import benchmark
from aligner_middleware.cli.calibrate import calibrate
from aligner_middleware.cli.compare import compare
from aligner_middleware.cli.correct import correct
from aligner_middleware.cli.evaluate import evaluate
from aligner_middleware.cli.export import export
from aligner_middleware.cli.info import info
from aligner_middleware.cli.output import discard, note, note_error, write
from aligner_middleware.cli.preferences import preferences
from aligner_middleware.cli.probe import probe
from aligner_middleware.cli.rounds import rounds
from aligner_middleware.cli.serve import serve
from aligner_middleware.cli.train import train
from aligner_middleware.errors import AlignerError

_WRONG_OPTIONS = 2
_INTERRUPTED = 130  # as of a shell


class _Commands(TyperGroup):
    """The commands; an error of one is told in one line."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except AlignerError as exc:
            raise _failed(str(exc)) from exc
        except OSError as exc:
            raise _failed(f"{exc.filename}: {exc.strerror}" if exc.filename else str(exc)) from exc
        except KeyboardInterrupt as exc:
            note("; ".join(["interrupted", *map(str, exc.args)]))
            raise typer.Exit(_INTERRUPTED) from exc


def _failed(reason: str) -> typer.Exit:
    note_error(reason)
    return typer.Exit(1)


app = typer.Typer(
    cls=_Commands,
    help="Correct the answers of any language model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for _command in (
    correct,
    serve,
    export,
    train,
    evaluate,
    compare,
    calibrate,
    probe,
    preferences,
    benchmark,
    rounds,
    audit,
    info,
):
    app.command()(_command)


@app.command()
def version() -> None:
    """Print the version."""
    write(__version__)


@app.command(
    hidden=True,
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def ability() -> None:
    """Name the command that replaces this one."""
    note_error("`aligner ability` is now `aligner benchmark`, with the same options")
    raise typer.Exit(_WRONG_OPTIONS)


def main() -> None:
    """Run the command line, and end the process."""
    code = 1
    if sys.stdout is None:  # a file that is opened next would get its number, and whatever is printed
        note_error("standard output is closed: send it to a file, or to /dev/null")
        sys.exit(code)
    try:
        app()
    except SystemExit as exc:
        code = exc.code if isinstance(exc.code, int) else int(exc.code is not None)
    except OSError as exc:  # of --help, which is printed before a command runs
        note_error(f"standard output cannot be written: {exc.strerror}")
    try:
        sys.stdout.flush()
    except OSError:
        discard(sys.stdout)
        code = code or 1
    others = [thread for thread in threading.enumerate() if thread is not threading.main_thread()]
    if code == _INTERRUPTED and not all(thread.daemon for thread in others):
        os._exit(code)  # Python would wait for them, such as for a chat model's answers
    sys.exit(code)
