"""Draws a probe: AUC by layer, and maps of layers and last tokens, as in the paper's figure (section 3.4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aligner_middleware.evaluation.calibration_plot import save
from aligner_middleware.evaluation.detection import Floats
from aligner_middleware.evaluation.probe import ProbeReport

_COLORS = ("#2a9d5c", "#4472c4", "#b8860b", "#d1495b", "#7b5ea7")
_GREY = "#b8bec6"


@dataclass(frozen=True)
class Scan:
    """A row's map.

    Attributes:
        title: Of the map.
        tokens: The text of the prompt's last tokens.
        scores: `[P, L]`, by token and layer: in the mean -1 for good rows and 1 for bad ones at the last token.
    """

    title: str
    tokens: list[str]
    scores: Floats


def draw_layers(report: ProbeReport, path: Path) -> None:
    """Draw the AUC of each layer's direction on each test, with its 95 % interval, and the verdict's as a dashed line.

    Args:
        report: The probe.
        path: The image.

    Raises:
        JobError: If it cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes: Any = figure.subplots()
    for place, test in enumerate(report.tests):
        color = _COLORS[place % len(_COLORS)]
        numbers = range(1, len(test.layers) + 1)
        axes.plot(numbers, [area.value for area in test.layers], color=color, marker=".", label=test.name)
        low, high = ([getattr(area, side) for area in test.layers] for side in ("low", "high"))
        axes.fill_between(numbers, low, high, color=color, alpha=0.15, linewidth=0)
        if test.verdict is not None:
            axes.axhline(test.verdict.value, color=color, linestyle="--", linewidth=1)
    axes.axhline(0.5, color=_GREY, linewidth=0.8)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("layer")
    axes.set_ylabel("AUC of its direction; dashed: the verdict's")
    axes.legend(frameon=False, fontsize=8)
    save(figure, path)


def draw_scans(scans: Sequence[Scan], path: Path) -> None:
    """Draw maps side by side: layers upwards, tokens to the right, blue for keep and red for correct.

    Args:
        scans: At least one.
        path: The image.

    Raises:
        JobError: If it cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * len(scans) + 0.8, 4.4), layout="constrained")
    panels = figure.subplots(1, len(scans), squeeze=False, sharey=True)[0]
    for panel, scan in zip(panels, scans, strict=True):
        count, layers = scan.scores.shape
        limits = {"vmin": -2, "vmax": 2, "extent": (-0.5, count - 0.5, 0.5, layers + 0.5)}
        image = panel.imshow(scan.scores.T, origin="lower", aspect="auto", cmap="RdBu_r", **limits)
        panel.set_xticks(range(count), [_shown(token) for token in scan.tokens], rotation=90, fontsize=6)
        for label in panel.get_xticklabels():
            label.set_parse_math(False)
        panel.set_title(scan.title, fontsize=9)
    panels[0].set_ylabel("layer")
    figure.colorbar(image, ax=list(panels), label="keep  <  >  correct", shrink=0.8)
    save(figure, path)


def _shown(token: str) -> str:
    """Give a token in ASCII, which every font has."""
    return token.encode("unicode_escape").decode()
