"""Draws runs of rounds side by side: what the judge says, and what would tell of a collapse."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path

from aligner_middleware.data.files import write_bytes
from aligner_middleware.evaluation.policy_metrics import PolicyMetrics
from aligner_middleware.rlhf.rounds import Rounds

_COLORS = ("#2a9d5c", "#c0504d", "#4472c4", "#b8860b")
_LINES: dict[str, Callable[[PolicyMetrics], float]] = {
    "KL to the first policy, nats a token": lambda health: health.kl,
    "words an answer": lambda health: health.words,
    "distinct 3-grams": lambda health: health.distinct[3],
    "refusals": lambda health: health.refusals,
}


def draw_rounds(runs: Mapping[str, Rounds], path: Path) -> None:
    """Draw runs, by name, into a PNG: a panel for each dimension judged, with 95 % intervals, and one for each measure.

    Raises:
        DataError: If it cannot be written.
    """
    from matplotlib.figure import Figure

    first = next(iter(runs.values())).rounds[0].health
    dimensions = list(first.verdicts) if first else []
    count = len(dimensions) + len(_LINES)
    figure = Figure(figsize=(11, 2.9 * -(-count // 3)), layout="constrained")
    panels = figure.subplots(-(-count // 3), 3, squeeze=False).ravel()
    for (name, run), color in zip(runs.items(), _COLORS, strict=False):
        scored = [(one.number, one.health) for one in run.rounds if one.health]
        numbers = [number for number, _ in scored]
        for panel, dimension in zip(panels, dimensions, strict=False):
            tallies = [health.verdicts[dimension] for _, health in scored]
            low = [max(0.0, tally.rate - tally.low) for tally in tallies]
            high = [max(0.0, tally.high - tally.rate) for tally in tallies]
            rates = [tally.rate for tally in tallies]
            panel.errorbar(numbers, rates, (low, high), color=color, marker="o", capsize=3, label=name)
            panel.set_title(f"{dimension}: (wins - losses) / all, against the first policy", fontsize=9)
            panel.axhline(0, color="#b8bec6", linewidth=0.8)
        for panel, (title, measure) in zip(panels[len(dimensions) :], _LINES.items(), strict=False):
            panel.plot(numbers, [measure(health) for _, health in scored], color=color, marker="o", label=name)
            panel.set_title(title, fontsize=9)
    for panel in panels[:count]:
        panel.set_xlabel("round", fontsize=8)
        panel.xaxis.get_major_locator().set_params(integer=True)
    for panel in panels[len(dimensions) : count]:
        panel.margins(y=0.15)
        panel.set_ylim(bottom=0)
    for panel in panels[count:]:
        panel.axis("off")
    panels[0].legend(frameon=False, fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_bytes(path, buffer.getvalue())
