"""Writes a comparison as `rows.jsonl`, `summary.json`, and `report.html` with its plots inside."""

from __future__ import annotations

import base64
import io
import json
import math
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from aligner_middleware.data.files import write_lines, write_text
from aligner_middleware.data.json_lines import finite
from aligner_middleware.diff import Diff
from aligner_middleware.errors import MissingExtraError
from aligner_middleware.evaluation.comparison import Comparison, ComparisonRow, Tally

_SAMPLES = 30
_COLORS = {"win": "#2a9d5c", "tie": "#b8bec6", "loss": "#d1495b", "malformed": "#e9c46a"}
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1c2733 }
table { border-collapse: collapse; margin: 1rem 0 }
th, td { padding: .3rem .8rem; text-align: right; border-bottom: 1px solid #dde2e8 }
th:first-child, td:first-child { text-align: left } img { max-width: 100% } del { color: #d1495b } ins { color: #2a9d5c }
article { border-top: 1px solid #dde2e8; padding: .6rem 0 } .dim { color: #6b7885; font-size: 13px }
"""


def write_report(comparison: Comparison, folder: Path) -> None:
    """Write a comparison to a folder. Each file appears when it is complete.

    Raises:
        JobError: If it cannot be written.
        MissingExtraError: If matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise MissingExtraError("the report's plots", "evaluate")
    write_lines(folder / "rows.jsonl", (row.model_dump() | {"changed": row.changed} for row in comparison.rows))
    write_text(folder / "summary.json", json.dumps(finite(comparison.summary()), indent=1, ensure_ascii=False) + "\n")
    write_text(folder / "report.html", _html(comparison))


def verdict_table(comparison: Comparison) -> list[list[str]]:
    """Give the verdicts as a table: rows of text, the head first."""
    head = ["", "win", "tie", "loss", "malformed", "(wins - losses) / all", "95 %"]
    lines = [head]
    for category in [None, *comparison.categories]:
        for dimension, tally in comparison.tallies(category).items():
            name = dimension if category is None else f"{category}: {dimension}"
            lines.append([name, *map(str, (tally.win, tally.tie, tally.loss, tally.malformed)), *_rate(tally)])
    return lines


def cost_table(comparison: Comparison) -> list[list[str]]:
    """Give the added latency as a table: rows of text, the head first."""
    head = ["answer, tokens", "answers", "p50, ms", "p95, ms", "p99, ms", "tokens a second"]
    return [head] + [
        [name, str(row.answers), *(f"{value:.0f}" for value in (row.p50, row.p95, row.p99, row.tokens_per_second))]
        for name, row in comparison.latencies.items()
    ]


def _rate(tally: Tally) -> list[str]:
    if math.isnan(tally.rate):
        return ["", ""]
    return [f"{tally.rate:+.1%}", f"{tally.low:+.1%} to {tally.high:+.1%}"]


def _html(comparison: Comparison) -> str:
    summary = comparison.summary()
    share = summary["share_of_upstream_time"]
    facts = [
        f"{summary['prompts']} prompts, {summary['failed']} failed",
        f"judge: {comparison.judge}; upstream: {comparison.upstream or 'given answers'}",
        f"aligner: {comparison.aligner['name']}",
        f"left alone: {summary['left_alone'] or 0:.1%} of the answers",
    ] + ([f"the aligner takes {share:.1%} of the upstream model's time"] if share else [])
    changed = [row for row in comparison.rows if row.changed][:_SAMPLES]
    parts = [
        "<h1>With and without the aligner</h1>",
        "".join(f"<div>{escape(fact)}</div>" for fact in facts),
        _table(verdict_table(comparison)),
        *(f'<img alt="{name}" src="data:image/png;base64,{plot}">' for name, plot in _plots(comparison).items()),
        "<h2>Added latency</h2>",
        _table(cost_table(comparison)),
        f"<h2>Changed answers ({len(changed)} of {sum(row.changed for row in comparison.rows)})</h2>",
        *(_sample(row) for row in changed),
    ]
    head = f'<meta charset="utf-8"><title>With and without the aligner</title><style>{_STYLE}</style>'
    return f"<!doctype html><html><head>{head}</head><body>{''.join(parts)}</body></html>\n"


def _table(lines: list[list[str]]) -> str:
    head, *rows = lines
    cells = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{cells}</tr>{body}</table>"


def _sample(row: ComparisonRow) -> str:
    verdicts = ", ".join(f"{name}: {verdict}" for name, verdict in row.verdicts.items())
    diff = Diff.between(row.answer, row.correction).html()
    return f"<article><b>{escape(row.question)}</b>{diff}<div class=dim>{escape(verdicts)}</div></article>"


def _plots(comparison: Comparison) -> dict[str, str]:
    """Draw the verdicts, and the answers' lengths before and after; PNG in base64."""
    from matplotlib.figure import Figure

    tallies = comparison.tallies()
    verdicts = Figure(figsize=(8, 0.6 + 0.5 * max(1, len(tallies))), layout="constrained")
    axes = verdicts.subplots()
    for place, tally in enumerate(tallies.values()):
        left = 0
        for kind, color in _COLORS.items():
            axes.barh(place, getattr(tally, kind), left=left, color=color, label=None if place else kind)
            left += getattr(tally, kind)
    axes.set_yticks(range(len(tallies)), list(tallies))
    axes.invert_yaxis()
    axes.legend(ncols=4, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1))
    lengths = Figure(figsize=(8, 2.6), layout="constrained")
    axes = lengths.subplots()
    words = [[len(getattr(row, side).split()) for row in comparison.rows] for side in ("answer", "correction")]
    axes.hist(words, bins=20, label=["before", "after"], color=["#b8bec6", "#2a9d5c"])
    axes.set_xlabel("words of an answer")
    axes.legend(frameon=False)
    return {"verdicts": _png(verdicts), "lengths": _png(lengths)}


def _png(figure: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return base64.b64encode(buffer.getvalue()).decode()
