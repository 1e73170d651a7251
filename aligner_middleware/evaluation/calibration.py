"""Calibrates an aligner: its evidence becomes a probability, and each strength gets a threshold on labelled rows."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from aligner_middleware.aligner import Aligner
from aligner_middleware.artifact import Artifact
from aligner_middleware.calibration import Calibration
from aligner_middleware.data.progress import Progress, Report, ignore
from aligner_middleware.errors import InputError, JobError
from aligner_middleware.evaluation.detection import Auc, Bin, Detection, Floats, Share, calibration_error, reliability
from aligner_middleware.evaluation.labelled_rows import LabelledRow
from aligner_middleware.strength import Level

KEPT: dict[Level, float] = {"low": 0.99, "medium": 0.97, "high": 0.9}  # least share of good answers kept
# Share of the bad answers that raising a threshold may give up, to keep good answers of kinds that are not among the rows.
GIVEN_UP: dict[Level, float] = {"low": 0.2, "medium": 0.15, "high": 0.05}
REFUSALS_KEPT = 0.99  # share of good refusals that medium should keep
LEAST_GOOD, LEAST_BAD = 50, 20  # rows; a share of 97 % cannot be estimated from fewer
_RIDGE = 1e-4  # regularises the fit towards scale 1, bias 0; without it separable classes have no finite fit
_MARGIN = 1e-3  # nats above the highest score, which another kernel may round up
_STEPS = 100  # of Newton's method at most; it takes fewer than ten


@dataclass(frozen=True)
class MeasuredRow:
    """A row with the aligner's evidence.

    Attributes:
        row: The row.
        evidence: The aligner's evidence that the answer is bad (`Aligner.evidence`), in nats.
        file: The file that it is from.
    """

    row: LabelledRow
    evidence: float
    file: str = ""


class LevelScores(BaseModel):
    """The effect of a strength on the rows.

    Attributes:
        threshold: Scores above it change the answer: a probability, or without verdicts the largest surprise, in nats.
        kept: Share of the good answers kept, refusals included.
        refusals: Share of the good refusals kept.
        changed: Share of the bad answers changed.
        detection: Precision, recall and F1 of changed as "bad".
    """

    model_config = ConfigDict(frozen=True)

    threshold: float
    kept: Share
    refusals: Share
    changed: Share
    detection: Detection


class CalibrationReport(BaseModel):
    """A calibration, and its quality on the rows that it was fitted to.

    Attributes:
        calibration: The calibration, as `aligner.json` holds it.
        good, bad: Number of rows of each class.
        levels: The effect of each strength.
        auc: AUC of the evidence.
        error: Expected calibration error, 0 to 1; NaN without verdicts, where scores are no probabilities.
        bins: Predicted against observed shares of bad answers, in ten bins, with the weights of the fit; empty without
            verdicts.
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
        """Whether medium keeps fewer refusals than `REFUSALS_KEPT`: keeping them would cost more than `GIVEN_UP`."""
        return self.levels["medium"].refusals.share < REFUSALS_KEPT


def check_enough(rows: Sequence[LabelledRow], name: str) -> None:
    """Refuse rows that are too few to calibrate with.

    Args:
        rows: The rows.
        name: Their file or files, for the error.

    Raises:
        JobError: If fewer than `LEAST_GOOD` are good or fewer than `LEAST_BAD` are bad.
    """
    bad = sum(row.unsafe for row in rows)
    good = len(rows) - bad
    if good < LEAST_GOOD or bad < LEAST_BAD:
        raise JobError(
            name,
            f"holds {good} good and {bad} bad answers that can be used: a calibration needs at least {LEAST_GOOD} good "
            f"ones (keep, refusal) and {LEAST_BAD} bad ones; add rows, or another file",
        )


def measure(
    aligner: Aligner, rows: Sequence[LabelledRow], report: Report = ignore, file: str = ""
) -> list[MeasuredRow]:
    """Get an aligner's evidence for each row of a file; rows that do not fit into its context are left out.

    Args:
        aligner: The aligner.
        rows: The rows.
        report: Told of rows done, at the stage "calibrate".
        file: The file that they are from.
    """
    measured = []
    for done, row in enumerate(rows, 1):
        with contextlib.suppress(InputError):
            measured.append(MeasuredRow(row, aligner.evidence(row.question, row.answer, row.instruction), file))
        report(Progress("calibrate", done, len(rows)))
    return measured


def calibrate(
    measured: Sequence[MeasuredRow], *, verdicts: bool, balance: bool = True, name: str = "rows"
) -> CalibrationReport:
    """Turn evidence into probabilities, and choose the thresholds of the strengths.

    In the fit each source has the same weight within its class (good, bad), so that no large file dominates. The thresholds
    are chosen without weights: low, medium and high keep 99 %, 97 % and 90 % of the good answers, of all together and of
    each file that has enough of them. Each threshold is then raised as far as that gives up at most a further 20, 15
    and 5 % of the bad answers: good answers of other kinds score higher than these, and are to be kept too.

    Args:
        measured: Rows that the aligner was not trained on.
        verdicts: Whether the evidence is log odds. Without verdicts it is the largest surprise, and thresholds are
            tolerances; nothing is fitted.
        balance: Whether both classes have the same weight. If not, probabilities assume the share of bad answers of these
            rows.
        name: The file or files of the rows, for errors.

    Raises:
        JobError: If there are too few rows, or the evidence is no higher for bad answers than for good ones.
    """
    rows = [item.row for item in measured]
    check_enough(rows, name)
    evidence = np.array([item.evidence for item in measured], np.float64)
    unsafe = np.array([row.unsafe for row in rows])
    refusal = np.array([row.kind == "refusal" for row in rows])
    auc = Auc.of(evidence, unsafe)
    chosen = thresholds(evidence, unsafe, np.array([item.file for item in measured]))
    bins: list[Bin] = []
    if verdicts:
        weights = row_weights(rows, balance=balance)
        scale, bias = fit(evidence, unsafe, weights)
        if scale <= 0:
            raise JobError(
                name, f"its bad answers score no higher than its good ones (AUC {auc.value:.2f}): check the labels"
            )
        scores = sigmoid(scale * evidence + bias)
        levels = dict(zip(chosen, sigmoid(scale * np.array([*chosen.values()]) + bias).tolist(), strict=True))
        bins = reliability(scores, unsafe, weights)
        calibration = Calibration(scale=scale, bias=bias, levels=levels, rows=len(rows))
    else:
        scores, levels = evidence, chosen
        calibration = Calibration(tolerances=levels, rows=len(rows))
    return CalibrationReport(
        calibration=calibration,
        good=int((~unsafe).sum()),
        bad=int(unsafe.sum()),
        levels={level: _level(limit, scores > limit, unsafe, refusal) for level, limit in levels.items()},
        auc=auc,
        error=calibration_error(bins) if verdicts else math.nan,
        bins=bins,
    )


def row_weights(rows: Sequence[LabelledRow], *, balance: bool) -> Floats:
    """Give weights, `[N]`, that are equal in sum for each source within its class, and add up to N."""
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
        weights: `[N]`, the weight of each.

    Returns:
        Scale and bias.
    """
    inputs = np.stack([evidence, np.ones_like(evidence)], axis=1)
    signs = np.where(unsafe, 1.0, -1.0)
    start = np.array([1.0, 0.0])

    def loss(parameters: Floats) -> float:
        ridge = _RIDGE / 2 * ((parameters - start) ** 2).sum()
        return float(weights @ np.logaddexp(0, -signs * (inputs @ parameters)) + ridge)

    parameters = start
    for _ in range(_STEPS):
        scores = sigmoid(inputs @ parameters)
        gradient = inputs.T @ (weights * (scores - unsafe)) + _RIDGE * (parameters - start)
        curvature = (inputs.T * (weights * scores * (1 - scores))) @ inputs + _RIDGE * np.eye(2)
        step = np.linalg.solve(curvature, gradient)
        before, length = loss(parameters), 1.0
        while loss(parameters - length * step) > before and length > 1e-9:
            length /= 2
        parameters = parameters - length * step
        if np.abs(length * step).max() < 1e-9:
            break
    return float(parameters[0]), float(parameters[1])


def thresholds(
    evidence: Floats, unsafe: NDArray[np.bool_], files: NDArray[np.str_] | None = None
) -> dict[Level, float]:
    """Choose the evidence above which each strength changes an answer; see `calibrate`.

    Args:
        evidence: `[N]`, in nats.
        unsafe: `[N]`, whether each answer is bad.
        files: `[N]`, the file of each; `None` for one file.

    Returns:
        The evidence in nats, in descending order from low to high.
    """
    groups = [~unsafe]
    if files is not None:
        groups += [group for name in np.unique(files) if (group := ~unsafe & (files == name)).sum() >= LEAST_GOOD]
    chosen = {level: max(_keeping(share, evidence[good], evidence) for good in groups) for level, share in KEPT.items()}
    return {level: _raised(limit, GIVEN_UP[level], evidence[unsafe], evidence) for level, limit in chosen.items()}


def save_calibration(calibration: Calibration, folder: Path) -> None:
    """Write a calibration into an aligner folder's `aligner.json`.

    Raises:
        ArtifactError: If it is no intact aligner folder.
        JobError: If it cannot be written.
    """
    Artifact.load(folder).model_copy(update={"calibration": calibration}).save(folder)


def sigmoid(values: Floats) -> Floats:
    """Turn log odds into probabilities."""
    return np.exp(-np.logaddexp(0, -values))


def _keeping(share: float, good: Floats, everything: Floats) -> float:
    """Give the threshold that keeps this share of the good: midway to the next score, so that rounding changes nothing."""
    last = np.sort(good)[max(0, math.ceil(share * good.size - 1e-9) - 1)]
    above = everything[everything > last]
    return float(last + (above.min() - last) / 2) if above.size else float(last + _MARGIN)


def _raised(threshold: float, given_up: float, bad: Floats, everything: Floats) -> float:
    """Raise a threshold as far as it gives up this share of the bad at most: midway below the first that is still changed."""
    ordered = np.sort(bad)
    first_changed = int(np.searchsorted(ordered, threshold, "right"))
    first = min(first_changed + math.floor(given_up * bad.size), bad.size - 1)
    below = max(threshold, float(everything[everything < ordered[first]].max(initial=-np.inf)))
    return max(threshold, below + (float(ordered[first]) - below) / 2)


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
