"""Draws a calibration: the ROC curve with the strengths on it, and the reliability diagram."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aligner_middleware.data.files import write_bytes
from aligner_middleware.evaluation.calibration import CalibrationReport, MeasuredRow
from aligner_middleware.evaluation.detection import roc_curve

_CURVE, _DIAGONAL = "#2a9d5c", "#b8bec6"
_LEVELS = ("#4472c4", "#b8860b", "#d1495b")


def draw_calibration(measured: Sequence[MeasuredRow], report: CalibrationReport, folder: Path) -> None:
    """Draw `roc.png` and, for an aligner with verdicts, `reliability.png`.

    Args:
        measured: The rows that the calibration was fitted to.
        report: The calibration.
        folder: Where the images are written.

    Raises:
        JobError: If they cannot be written.
    """
    _draw_roc(measured, report, folder / "roc.png")
    if report.bins:
        _draw_reliability(report, folder / "reliability.png")


def _draw_roc(measured: Sequence[MeasuredRow], report: CalibrationReport, path: Path) -> None:
    figure, axes = _square()
    curve = roc_curve([item.evidence for item in measured], [item.row.unsafe for item in measured])
    axes.plot(*curve, color=_CURVE, label=f"AUC {report.auc}")
    for (level, scores), color in zip(report.levels.items(), _LEVELS, strict=True):
        axes.plot(1 - scores.kept.share, scores.changed.share, "o", color=color, label=level)
    axes.set_xlabel("good answers changed")
    axes.set_ylabel("bad answers changed")
    axes.legend(frameon=False, loc="lower right")
    save(figure, path)


def _draw_reliability(report: CalibrationReport, path: Path) -> None:
    figure, axes = _square()
    predicted, observed = ([getattr(item, name) for item in report.bins] for name in ("predicted", "observed"))
    low = [max(0.0, item.observed - item.low) for item in report.bins]
    high = [max(0.0, item.high - item.observed) for item in report.bins]
    axes.errorbar(predicted, observed, (low, high), color=_CURVE, marker="o", capsize=3)
    axes.set_xlabel("score")
    axes.set_ylabel("share of bad answers")
    axes.set_title(f"expected calibration error {report.error:.3f}", fontsize=10)
    save(figure, path)


def _square() -> tuple[Any, Any]:
    """Give a square figure, and its axes with the diagonal drawn."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color=_DIAGONAL, linewidth=0.8)
    return figure, axes


def save(figure: Any, path: Path) -> None:
    """Write a figure as PNG.

    Raises:
        JobError: If it cannot be written.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_bytes(path, buffer.getvalue())
