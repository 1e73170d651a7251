"""A plot of runs of rounds side by side: the judge's comparisons, and measures that show a collapse."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from aligner_middleware.data.files import write_bytes
from aligner_middleware.evaluation.pairwise import Dimension
from aligner_middleware.evaluation.policy_metrics import PolicyMetrics
from aligner_middleware.rlhf.round_results import Rounds

_COLORS = ("#2a9d5c", "#c0504d", "#4472c4", "#b8860b")
_COLUMNS = 3
_LINES: dict[str, Callable[[PolicyMetrics], float]] = {
    "KL to the first policy, nats a token": lambda metrics: metrics.kl,
    "words an answer": lambda metrics: metrics.words,
    "distinct 3-grams": lambda metrics: metrics.distinct[3],
    "refusals": lambda metrics: metrics.refusals,
}


def draw_rounds(runs: Mapping[str, Rounds], path: Path) -> None:
    """Draw runs, by name, into a PNG: a panel for each dimension judged, with 95 % intervals, and one for each measure.

    Raises:
        JobError: If it cannot be written.
    """
    from matplotlib.figure import Figure

    first = next(iter(runs.values())).rounds[0].metrics
    dimensions: list[Dimension] = list(first.verdicts) if first else []
    count = len(dimensions) + len(_LINES)
    lines = -(-count // _COLUMNS)
    figure = Figure(figsize=(11, 2.9 * lines), layout="constrained")
    panels = figure.subplots(lines, _COLUMNS, squeeze=False).ravel()
    for (name, run), color in zip(runs.items(), _COLORS, strict=False):
        scored = [(result.number, result.metrics) for result in run.rounds if result.metrics]
        for panel, dimension in zip(panels, dimensions, strict=False):
            _draw_dimension(panel, dimension, scored, color, name)
        for panel, (title, measure) in zip(panels[len(dimensions) :], _LINES.items(), strict=False):
            values = [measure(metrics) for _, metrics in scored]
            panel.plot([number for number, _ in scored], values, color=color, marker="o", label=name)
            panel.set_title(title, fontsize=9)
    _finish(panels, len(dimensions), count)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_bytes(path, buffer.getvalue())


def _draw_dimension(
    panel: Any, dimension: Dimension, scored: Sequence[tuple[int, PolicyMetrics]], color: str, name: str
) -> None:
    """Draw a run's comparisons with the first policy in one dimension."""
    tallies = [metrics.verdicts[dimension] for _, metrics in scored]
    low = [max(0.0, tally.rate - tally.low) for tally in tallies]
    high = [max(0.0, tally.high - tally.rate) for tally in tallies]
    rates = [tally.rate for tally in tallies]
    numbers = [number for number, _ in scored]
    panel.errorbar(numbers, rates, (low, high), color=color, marker="o", capsize=3, label=name)
    panel.set_title(f"{dimension}: (wins - losses) / all, against the first policy", fontsize=9)
    panel.axhline(0, color="#b8bec6", linewidth=0.8)


def _finish(panels: Any, judged: int, count: int) -> None:
    """Label the axes of `count` panels, of which the first `judged` show comparisons, and hide the others."""
    for panel in panels[:count]:
        panel.set_xlabel("round", fontsize=8)
        panel.xaxis.get_major_locator().set_params(integer=True)
    for panel in panels[judged:count]:
        panel.margins(y=0.15)
        panel.set_ylim(bottom=0)
    for panel in panels[count:]:
        panel.axis("off")
    panels[0].legend(frameon=False, fontsize=8)
