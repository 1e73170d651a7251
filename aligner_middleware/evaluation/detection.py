"""Metrics of a detector of bad answers: AUC, precision and recall, calibration error. Pure functions of numbers.

The positive class is the bad answer, which is to be changed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ConfigDict

_Z = 1.959963984540054  # between -z and z lies 95 % of a normal distribution
_DRAWS = 1000  # of the bootstrap

Floats = NDArray[np.float64]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)


class Share(_Frozen):
    """A share of some rows.

    Attributes:
        hits: Number of rows that count.
        rows: Number of all rows.
        share: hits / rows, 0 to 1; NaN where there are no rows, as `low` and `high` are.
        low, high: Wilson's 95 % interval of the share.
    """

    hits: int
    rows: int
    share: float
    low: float
    high: float

    @classmethod
    def count(cls, values: Iterable[Any]) -> Self:
        """Count the true values."""
        flags = [bool(value) for value in values]
        hits, rows = sum(flags), len(flags)
        low, high = wilson(hits, rows)
        return cls(hits=hits, rows=rows, share=hits / rows if rows else math.nan, low=low, high=high)

    def __str__(self) -> str:
        return f"{self.share:.1%} ({self.low:.1%} to {self.high:.1%})" if self.rows else ""


class Detection(_Frozen):
    """A guard's verdicts against the labels; NaN where the denominator is 0.

    Attributes:
        precision: Share of bad answers among those flagged.
        recall: Share of flagged ones among the bad answers.
        f1: Their harmonic mean.
    """

    precision: float
    recall: float
    f1: float

    @classmethod
    def of(cls, flagged: Sequence[bool], unsafe: Sequence[bool]) -> Self:
        """Compare verdicts with labels, row by row."""
        pairs = list(zip(flagged, unsafe, strict=True))
        hits = sum(flag and bad for flag, bad in pairs)
        precision, recall, f1 = (
            part / whole if whole else math.nan
            for part, whole in (
                (hits, sum(flag for flag, _ in pairs)),
                (hits, sum(bad for _, bad in pairs)),
                (2 * hits, sum(flag + bad for flag, bad in pairs)),
            )
        )
        return cls(precision=precision, recall=recall, f1=f1)


class Auc(_Frozen):
    """Area under the ROC curve: how often a bad answer scores above a good one.

    Attributes:
        value: 0 to 1; NaN where there are no bad answers, or no good ones.
        low, high: Its 95 % interval, by bootstrap within each class.
    """

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, scores: ArrayLike, unsafe: ArrayLike, *, seed: int = 0, draws: int = _DRAWS) -> Self:
        """Measure the area of some scores; equal ones count half.

        Args:
            scores: `[N]`, larger for answers that are likelier bad.
            unsafe: `[N]`, whether each is bad.
            seed: Of the bootstrap.
            draws: Of the bootstrap, too: their number.
        """
        bad, good = _by_class(scores, unsafe)
        value = _area(bad, good)
        if math.isnan(value):
            return cls(value=value, low=value, high=value)
        rng = np.random.default_rng(seed)
        drawn = [_area(rng.choice(bad, bad.size), rng.choice(good, good.size)) for _ in range(draws)]
        low, high = np.quantile(drawn, (0.025, 0.975))
        return cls(value=value, low=float(low), high=float(high))

    def __str__(self) -> str:
        return "" if math.isnan(self.value) else f"{self.value:.4f} ({self.low:.4f} to {self.high:.4f})"


class Gain(_Frozen):
    """The AUC of some scores less that of others, on the same rows.

    Attributes:
        value: -1 to 1; NaN where there are no bad answers, or no good ones.
        low, high: Its 95 % interval, by bootstrap within each class; both scores are drawn together.
    """

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, scores: ArrayLike, others: ArrayLike, unsafe: ArrayLike, *, seed: int = 0, draws: int = _DRAWS) -> Self:
        """Measure the gain of some scores over others.

        Args:
            scores: `[N]`, larger for answers that are likelier bad.
            others: `[N]`, too.
            unsafe: `[N]`, whether each is bad.
            seed: Of the bootstrap.
            draws: Of the bootstrap, too: their number.
        """
        sides = [_by_class(one, unsafe) for one in (scores, others)]
        value = _area(*sides[0]) - _area(*sides[1])
        if math.isnan(value):
            return cls(value=value, low=value, high=value)
        rng = np.random.default_rng(seed)
        drawn = []
        for _ in range(draws):
            bad, good = (rng.integers(side.size, size=side.size) for side in sides[0])
            first, second = (_area(side[0][bad], side[1][good]) for side in sides)
            drawn.append(first - second)
        low, high = np.quantile(drawn, (0.025, 0.975))
        return cls(value=value, low=float(low), high=float(high))

    def __str__(self) -> str:
        return "" if math.isnan(self.value) else f"{self.value:+.4f} ({self.low:+.4f} to {self.high:+.4f})"


class Bin(_Frozen):
    """A bin of answers with similar scores.

    Attributes:
        rows: Number of answers.
        weight: Their share of the total weight.
        predicted: Mean score.
        observed: Share of bad answers.
        low, high: Wilson's 95 % interval of `observed`, for the effective number of rows.
    """

    rows: int
    weight: float
    predicted: float
    observed: float
    low: float
    high: float


def wilson(hits: float, rows: float) -> tuple[float, float]:
    """Give Wilson's 95 % interval of the share hits / rows; NaN where there are no rows."""
    if not rows:
        return math.nan, math.nan
    share, spread = hits / rows, _Z**2 / rows
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread**2 / 4) / (1 + spread)
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))  # rounding would leave 0 and 1 out


def roc_curve(scores: ArrayLike, unsafe: ArrayLike) -> tuple[Floats, Floats]:
    """Give the points of the ROC curve, from (0, 0) to (1, 1), one for each score that occurs.

    Returns:
        Share of good answers flagged, and share of bad ones, where everything above a threshold is flagged.
    """
    bad, good = _by_class(scores, unsafe)
    thresholds = np.unique(np.concatenate([bad, good]))[::-1]
    shares = (1 - np.searchsorted(np.sort(side), thresholds, "left") / max(1, side.size) for side in (good, bad))
    flagged_good, flagged_bad = (np.concatenate([[0.0], share]) for share in shares)
    return flagged_good, flagged_bad


def reliability(scores: ArrayLike, unsafe: ArrayLike, weights: ArrayLike | None = None, bins: int = 10) -> list[Bin]:
    """Compare probabilities with labels, in bins of equal width; empty bins are left out.

    Args:
        scores: `[N]`, the probability that each answer is bad, 0 to 1.
        unsafe: `[N]`, whether each is bad.
        weights: `[N]`, the weight of each; `None` for equal weights.
        bins: Number of bins.
    """
    probabilities, truth = np.asarray(scores, np.float64), np.asarray(unsafe, np.bool_)
    weighing = np.ones(probabilities.size) if weights is None else np.asarray(weights, np.float64)
    places = np.minimum((probabilities * bins).astype(np.int64), bins - 1)
    filled = []
    for place in np.unique(places):
        inside = places == place
        weight = weighing[inside]
        amount = weight.sum()
        observed = float(weight @ truth[inside] / amount)
        count = float(amount**2 / (weight**2).sum())
        low, high = wilson(observed * count, count)
        filled.append(
            Bin(
                rows=int(inside.sum()),
                weight=float(amount / weighing.sum()),
                predicted=float(weight @ probabilities[inside] / amount),
                observed=observed,
                low=low,
                high=high,
            )
        )
    return filled


def calibration_error(bins: Iterable[Bin]) -> float:
    """Give the expected calibration error: the mean distance of predicted and observed, by the bins' weights."""
    return sum(item.weight * abs(item.predicted - item.observed) for item in bins)


def _by_class(scores: ArrayLike, unsafe: ArrayLike) -> tuple[Floats, Floats]:
    values, bad = np.asarray(scores, np.float64), np.asarray(unsafe, np.bool_)
    return values[bad], values[~bad]


def _area(bad: Floats, good: Floats) -> float:
    if not bad.size or not good.size:
        return math.nan
    good = np.sort(good)
    below = np.searchsorted(good, bad, "left") + np.searchsorted(good, bad, "right")
    return float(below.mean() / 2 / good.size)
