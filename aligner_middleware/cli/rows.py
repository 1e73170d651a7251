"""Reads rows for a command, and tells the user which of them are left out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from aligner_middleware.cli.output import note
from aligner_middleware.data.triples import Triple, read_rows

if TYPE_CHECKING:
    from aligner_middleware.evaluation.labelled_rows import LabelledRow
    from aligner_middleware.evaluation.public_sets import PublicSet


def usable_rows(path: Path) -> list[Triple]:
    """Read a file of rows; those that are left out are noted with their reasons.

    Raises:
        DataError: If a row cannot be read.
    """
    rows = read_rows(path)
    reasons: dict[str, list[int]] = {}
    for line, reason in rows.left_out:
        reasons.setdefault(reason, []).append(line)
    for reason, lines in reasons.items():
        shown = ", ".join(map(str, lines[:5])) + (", …" if len(lines) > 5 else "")
        note(f"{path}: {len(lines)} rows left out, as {reason} (lines {shown})")
    return rows.triples


def labelled_rows(path: Path, public: PublicSet | None) -> Sequence[LabelledRow]:
    """Give the rows of a public set, noting those left out; or read labelled answers.

    Args:
        path: The file or the folder.
        public: The public set that was read from it, if it is one.

    Raises:
        DataError: If a row of labelled answers cannot be read.
        JobError: If their file cannot be.
    """
    from aligner_middleware.evaluation.labelled_rows import read_labelled

    if public is None:
        return read_labelled(path)
    for reason, count in public.left_out.items():
        note(f"{path}: {count} rows left out, as {reason}")
    for name in public.skipped:
        note(f"{path}: no answers of a public set in {name}")
    return public.rows
