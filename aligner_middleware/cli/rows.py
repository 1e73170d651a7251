"""Reads training rows for a command, and tells the user which of them are left out."""

from __future__ import annotations

from pathlib import Path

from aligner_middleware.cli.output import note
from aligner_middleware.data.triples import Triple, read_rows


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
