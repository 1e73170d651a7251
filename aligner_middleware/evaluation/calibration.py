"""From evidence to probabilities and strengths: how sure must an aligner be before it changes an answer?"""

from __future__ import annotations

import contextlib
import io
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from aligner_middleware.aligner import Aligner
from aligner_middleware.artifact import Artifact, Calibration, Level
from aligner_middleware.data.files import write_bytes
from aligner_middleware.errors import DataError, InputError
from aligner_middleware.evaluation.detection import (
    Auc,
    Bin,
    Detection,
    Floats,
    Share,
    calibration_error,
    reliability,
    roc_curve,
)
from aligner_middleware.evaluation.guard import LabelledRow

KEPT: dict[Level, float] = {"low": 0.99, "medium": 0.97, "high": 0.9}  # least share of good answers kept
REFUSALS_KEPT = 0.99  # least share of good refusals kept at medium, if that costs no more than ...
REFUSALS_COST = 0.02  # ... this share of the bad answers, which are then no longer changed
LEAST_GOOD, LEAST_BAD = 50, 20  # rows; fewer say nothing of a share of 97 %
_RIDGE = 1e-4  # pulls the fit towards the evidence as it is, where classes are told apart without a mistake
_MARGIN = 1e-3  # nats above the highest score of all, which another kernel may round up
_STEPS = 100  # of Newton's method; it takes less than ten


@dataclass(frozen=True)
class Measured:
    """A row, the aligner's evidence (`Aligner.evidence`) that its answer is bad, in nats, and the file that it is from."""

    row: LabelledRow
    evidence: float
    file: str = ""


class LevelScores(BaseModel):
    """What a strength does to the rows.

    Attributes:
        threshold: Scores above it change the answer: a probability, or without verdicts the largest surprise, in nats.
        kept: Of the good answers, refusals among them.
        refusals: Of the good refusals, those kept.
        changed: Of the bad answers.
        detection: The same as a guard's.
    """

    model_config = ConfigDict(frozen=True)

    threshold: float
    kept: Share
    refusals: Share
    changed: Share
    detection: Detection


class CalibrationReport(BaseModel):
    """A calibration, and how good it is on the rows that it was made from.

    Attributes:
        calibration: What an aligner folder holds.
        good, bad: Number of rows.
        levels: By strength.
        auc: How well the evidence orders the answers.
        error: Expected calibration error, 0 to 1; not a number without verdicts, where nothing is a probability.
        bins: Predicted against observed, in ten bins, with the weights of the fit; none without verdicts.
    """

    model_config = ConfigDict(frozen=True)

    calibration: Calibration
    good: int
    bad: int
    levels: dict[Level, LevelScores]
    auc: Auc
    error: float
    bins: list[Bin]

    @property
    def refusals_given_up(self) -> bool:
        """Whether medium changes more of the good refusals than it should, as it would change too few bad answers else."""
        return self.levels["medium"].refusals.share < REFUSALS_KEPT


def check_enough(rows: Sequence[LabelledRow], name: str) -> None:
    """Refuse rows that are too few to calibrate with.

    Raises:
        DataError: If fewer than `LEAST_GOOD` are good or fewer than `LEAST_BAD` are bad.
    """
    bad = sum(row.unsafe for row in rows)
    good = len(rows) - bad
    if good < LEAST_GOOD or bad < LEAST_BAD:
        raise DataError(
            name,
            1,
            f"holds {good} good and {bad} bad answers that can be used: a calibration needs at least {LEAST_GOOD} good "
            f"ones (keep, refusal) and {LEAST_BAD} bad ones; add rows, or another file",
        )


def measure(
    aligner: Aligner,
    rows: Sequence[LabelledRow],
    report: Callable[[int, int], None] = lambda done, of: None,
    file: str = "",
) -> list[Measured]:
    """Get an aligner's evidence for each row of a file; rows that do not fit into its context are left out."""
    measured = []
    for done, row in enumerate(rows, 1):
        with contextlib.suppress(InputError):
            measured.append(Measured(row, aligner.evidence(row.question, row.answer), file))
        report(done, len(rows))
    return measured


def calibrate(
    measured: Sequence[Measured], *, verdicts: bool, balance: bool = True, name: str = "rows"
) -> CalibrationReport:
    """Turn evidence into probabilities, and choose the thresholds of the strengths.

    Each source counts the same within its class (good, bad), so that no large file decides what a probability is. The
    thresholds are chosen on the rows as they are: low, medium and high keep 99 %, 97 % and 90 % of the good answers, of all
    together and of each file that has enough of them, so that none pays for another. Where medium would keep less than 99 %
    of the good refusals it is raised until it does, and low with it, unless that leaves more than 2 % of the bad answers
    unchanged.

    Args:
        measured: Rows that the aligner was not trained on.
        verdicts: Whether the evidence is log odds. Without verdicts it is the largest surprise, and thresholds are
            tolerances; nothing is fitted.
        balance: Whether good and bad count the same. If not, probabilities are those for as many bad answers as these rows
            hold.
        name: What to call the rows in an error.

    Raises:
        DataError: If there are too few rows, or the evidence is no higher for bad answers than for good ones.
    """
    rows = [one.row for one in measured]
    check_enough(rows, name)
    evidence = np.array([one.evidence for one in measured], np.float64)
    unsafe = np.array([row.unsafe for row in rows])
    refusal = np.array([row.kind == "refusal" for row in rows])
    auc = Auc.of(evidence, unsafe)
    found = thresholds(evidence, unsafe, refusal, np.array([one.file for one in measured]))
    bins: list[Bin] = []
    if verdicts:
        weights = row_weights(rows, balance=balance)
        scale, bias = fit(evidence, unsafe, weights)
        if scale <= 0:
            raise DataError(
                name, 1, f"its bad answers score no higher than its good ones (AUC {auc.value:.2f}): check the labels"
            )
        scores = sigmoid(scale * evidence + bias)
        levels = dict(zip(found, sigmoid(scale * np.array([*found.values()]) + bias).tolist(), strict=True))
        bins = reliability(scores, unsafe, weights)
        calibration = Calibration(scale=scale, bias=bias, levels=levels, rows=len(rows))
    else:
        scores, levels = evidence, found
        calibration = Calibration(tolerances=levels, rows=len(rows))
    return CalibrationReport(
        calibration=calibration,
        good=int((~unsafe).sum()),
        bad=int(unsafe.sum()),
        levels={level: _level(at, scores > at, unsafe, refusal) for level, at in levels.items()},
        auc=auc,
        error=calibration_error(bins) if verdicts else math.nan,
        bins=bins,
    )


def row_weights(rows: Sequence[LabelledRow], *, balance: bool) -> Floats:
    """Weigh rows, `[N]`, so that each source counts the same within its class; together the weights are N."""
    sizes = Counter((row.unsafe, row.source) for row in rows)
    sources = Counter(unsafe for unsafe, _ in sizes)
    members = Counter(row.unsafe for row in rows)
    shares = {unsafe: 1 / len(members) if balance else count / len(rows) for unsafe, count in members.items()}
    return np.array(
        [len(rows) * shares[row.unsafe] / sources[row.unsafe] / sizes[row.unsafe, row.source] for row in rows]
    )


def fit(evidence: Floats, unsafe: NDArray[np.bool_], weights: Floats) -> tuple[float, float]:
    """Fit sigmoid(scale * evidence + bias) to the labels: logistic regression, by Newton's method with halved steps.

    Args:
        evidence: `[N]`, in nats.
        unsafe: `[N]`, whether each answer is bad.
        weights: `[N]`, what each counts.

    Returns:
        Scale and bias.
    """
    inputs = np.stack([evidence, np.ones_like(evidence)], axis=1)
    signs = np.where(unsafe, 1.0, -1.0)
    start = np.array([1.0, 0.0])

    def loss(at: Floats) -> float:
        return float(weights @ np.logaddexp(0, -signs * (inputs @ at)) + _RIDGE / 2 * ((at - start) ** 2).sum())

    at = start
    for _ in range(_STEPS):
        scores = sigmoid(inputs @ at)
        gradient = inputs.T @ (weights * (scores - unsafe)) + _RIDGE * (at - start)
        curvature = (inputs.T * (weights * scores * (1 - scores))) @ inputs + _RIDGE * np.eye(2)
        step = np.linalg.solve(curvature, gradient)
        before, length = loss(at), 1.0
        while loss(at - length * step) > before and length > 1e-9:
            length /= 2
        at = at - length * step
        if np.abs(length * step).max() < 1e-9:
            break
    return float(at[0]), float(at[1])


def thresholds(
    evidence: Floats, unsafe: NDArray[np.bool_], refusal: NDArray[np.bool_], files: NDArray[np.str_] | None = None
) -> dict[Level, float]:
    """Choose the evidence above which each strength changes an answer; see `calibrate`.

    Args:
        evidence: `[N]`, in nats.
        unsafe: `[N]`, whether each answer is bad.
        refusal: `[N]`, whether it is a good refusal.
        files: `[N]`, where each is from; `None` for one file.

    Returns:
        In nats, in descending order from low to high.
    """
    groups = [~unsafe]
    if files is not None:
        groups += [group for name in np.unique(files) if (group := ~unsafe & (files == name)).sum() >= LEAST_GOOD]
    found = {level: max(_keeping(share, evidence[good], evidence) for good in groups) for level, share in KEPT.items()}
    if refusal.any():
        raised = _keeping(REFUSALS_KEPT, evidence[refusal], evidence)
        given_up = (evidence[unsafe] > found["medium"]).mean() - (evidence[unsafe] > raised).mean()
        if raised > found["medium"] and given_up <= REFUSALS_COST:
            found |= {"medium": raised, "low": max(raised, found["low"])}
    return found


def save_calibration(calibration: Calibration, folder: Path) -> None:
    """Write a calibration into an aligner folder's `aligner.json`.

    Raises:
        ArtifactError: If it is no intact aligner folder.
        JobError: If it cannot be written.
    """
    Artifact.load(folder).model_copy(update={"calibration": calibration}).save(folder)


def draw_calibration(measured: Sequence[Measured], report: CalibrationReport, folder: Path) -> None:
    """Draw `roc.png`, with the strengths on the curve, and, for an aligner with verdicts, `reliability.png`.

    Raises:
        JobError: If they cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.subplots()
    curve = roc_curve([one.evidence for one in measured], [one.row.unsafe for one in measured])
    axes.plot(*curve, color="#2a9d5c", label=f"AUC {report.auc}")
    axes.plot([0, 1], [0, 1], color="#b8bec6", linewidth=0.8)
    for (level, scores), color in zip(report.levels.items(), ("#4472c4", "#b8860b", "#d1495b"), strict=True):
        axes.plot(1 - scores.kept.share, scores.changed.share, "o", color=color, label=level)
    axes.set_xlabel("good answers changed")
    axes.set_ylabel("bad answers changed")
    axes.legend(frameon=False, loc="lower right")
    _save(figure, folder / "roc.png")
    if not report.bins:
        return
    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.subplots()
    predicted, observed = ([getattr(one, name) for one in report.bins] for name in ("predicted", "observed"))
    low = [max(0.0, one.observed - one.low) for one in report.bins]
    high = [max(0.0, one.high - one.observed) for one in report.bins]
    axes.plot([0, 1], [0, 1], color="#b8bec6", linewidth=0.8)
    axes.errorbar(predicted, observed, (low, high), color="#2a9d5c", marker="o", capsize=3)
    axes.set_xlabel("score")
    axes.set_ylabel("share of bad answers")
    axes.set_title(f"expected calibration error {report.error:.3f}", fontsize=10)
    _save(figure, folder / "reliability.png")


def sigmoid(values: Floats) -> Floats:
    """Turn log odds, in nats, into probabilities."""
    return np.exp(-np.logaddexp(0, -values))


def _keeping(share: float, good: Floats, everything: Floats) -> float:
    """The threshold that keeps this share of the good: midway up to the next score, so that rounding changes nothing."""
    at = np.sort(good)[max(0, math.ceil(share * good.size - 1e-9) - 1)]
    above = everything[everything > at]
    return float(at + (above.min() - at) / 2) if above.size else float(at + _MARGIN)


def _level(
    threshold: float, flagged: NDArray[np.bool_], unsafe: NDArray[np.bool_], refusal: NDArray[np.bool_]
) -> LevelScores:
    return LevelScores(
        threshold=threshold,
        kept=Share.count(~flagged[~unsafe]),
        refusals=Share.count(~flagged[refusal]),
        changed=Share.count(flagged[unsafe]),
        detection=Detection.of(flagged.tolist(), unsafe.tolist()),
    )


def _save(figure: Any, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_bytes(path, buffer.getvalue())
