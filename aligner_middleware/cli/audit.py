"""`aligner audit`: the audit log of the service as rows for calibration and training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import typer

from aligner_middleware.cli.arguments import JsonOption
from aligner_middleware.cli.output import note, write, write_json
from aligner_middleware.data.files import write_lines
from aligner_middleware.errors import JobError


def audit(
    log: Annotated[Path, typer.Argument(help="The SQLite file that the service writes.")],
    out: Annotated[Path, typer.Option("--out", help="File for the rows, as JSON lines.")],
    since: Annotated[
        datetime | None,
        typer.Option(
            formats=["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S", "%Y-%m-%dT%H:%M:%S%z"],
            metavar="TIME",
            help="Only decisions from this time on, such as 2026-03-31 or 2026-03-31T12:00:00+02:00; else in UTC.",
        ),
    ] = None,
    marked: Annotated[
        bool, typer.Option("--marked", help="Only decisions that somebody marked on the page as right or wrong.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Export the audit log of `aligner serve` as labelled answers, each with its instruction where there was one.

    `aligner calibrate` and `aligner train` read them. A changed answer that is marked right is bad, and its new text is the
    better one; a kept one that is marked right is to be kept. Marked wrong, it is the other way round. Without --marked,
    decisions without a mark count as right: train on them if you trust the aligner, but calibrate on marked ones alone.

    Only decisions with texts can be exported: those of clients whose policy has `keep_texts`.
    """
    from aligner_middleware.serve.audit_file import labelled, opened

    reasons: Counter[str] = Counter()
    kinds: Counter[str] = Counter()

    def usable(rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for made in labelled(rows, marked=marked):
            if isinstance(made, str):
                reasons[made] += 1
            else:
                kinds[made["kind"]] += 1
                yield made

    start = (
        since.replace(tzinfo=since.tzinfo or UTC).astimezone(UTC).isoformat(timespec="milliseconds") if since else ""
    )
    with opened(log) as file:
        rows = usable(file.rows(start))
        first = next(rows, None)
        if first is None:
            told = "; ".join(f"{count} {reason}" for reason, count in reasons.items())
            raise JobError(log, f"gives no rows: {told or 'it has no decisions, or none from that time on'}")
        write_lines(out, chain([first], rows))
    for reason, count in reasons.items():
        note(f"{log}: {count} decisions left out, as they {reason}")
    if not marked:
        note("decisions without a mark count as right; for calibration use --marked")
    counts = {"keep": kinds["keep"], "bad": kinds["bad"], "left_out": reasons.total()}
    if as_json:
        write_json(counts)
    else:
        write(
            f"{out}: {counts['keep']} answers to keep, {counts['bad']} bad ones; {counts['left_out']} decisions left out"
        )
