"""What the commands write: data to standard output, everything else to standard error."""

from __future__ import annotations

import math
import os
import sys
from contextlib import suppress
from typing import IO, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from aligner_middleware.data.json_lines import to_json
from aligner_middleware.errors import AlignerError


class OutputError(AlignerError):
    """Standard output could not be written: it is full, closed, or of an encoding that lacks a character."""


class _StandardOutput(Console):
    """Standard output, whose reader's end is an error like any other."""

    def on_broken_pipe(self) -> None:
        raise  # what Rich is handling where it calls this


class _StandardError(Console):
    """Standard error: a job goes on when nobody reads any more what it tells."""

    def on_broken_pipe(self) -> None:
        discard(sys.stderr)


console = _StandardError(stderr=True)


def write(what: str | Table, width: int = 100) -> None:
    """Write a line, or a table of at least some columns, to standard output.

    Raises:
        OutputError: If it cannot be written.
    """
    try:
        if isinstance(what, str):
            sys.stdout.write(what + "\n")
        else:
            shown = _StandardOutput(markup=False)
            shown.width = max(shown.width, width)
            shown.print(what)
        sys.stdout.flush()
    except UnicodeEncodeError as exc:
        raise OutputError(
            f"standard output is {exc.encoding}, which has no {exc.object[exc.start]!r}: set PYTHONIOENCODING=utf-8"
        ) from exc
    except (OSError, ValueError) as exc:
        discard(sys.stdout)
        raise OutputError(f"standard output cannot be written: {getattr(exc, 'strerror', None) or exc}") from exc


def write_json(value: Any) -> None:
    """Write a value as a line of JSON to standard output; what is no finite number as null.

    Raises:
        OutputError: If it cannot be written.
    """
    write(to_json(value, sys.stdout.encoding or "utf-8"))


def note(text: str) -> None:
    """Write one line to standard error; line breaks become spaces."""
    _note(Text(_line(text)))


def note_error(text: str) -> None:
    """Write to standard error, in one line, what went wrong."""
    _note(Text.assemble(("error: ", "bold red"), _line(text)))


def _line(text: str) -> str:
    return " ".join(text.split())


def _note(text: Text) -> None:
    try:
        console.print(text, highlight=False, soft_wrap=True)
    except OSError:  # it is closed, or its disk is full
        discard(sys.stderr)


def discard(stream: IO[str]) -> None:
    """Send the rest of a standard stream nowhere, so that Python's end does not fail on what could not be written."""
    with suppress(OSError, ValueError):  # it is no file of the system's, as in tests
        kept = stream.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, kept)
        os.close(nowhere)


def percent(value: float) -> str:
    """Write a share from 0 to 1 as a percentage; not a number as nothing."""
    return "" if math.isnan(value) else f"{value:.1%}"


def left_out_text(rows: int) -> str:
    """Tell how many rows were too long for an aligner."""
    return f"{rows} rows left out, as they do not fit into the aligner's context"
