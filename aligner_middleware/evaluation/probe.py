"""Finds the direction of keep against correct in each layer's hidden states, and how well it separates answers.

The method is that of the paper (section 3.4, appendix B.6), a linear artificial tomography of Zou et al. (2023): the first
principal component of differences between the states of bad answers and of good ones. Pure functions of arrays.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from aligner_middleware.errors import JobError
from aligner_middleware.evaluation.detection import Auc, Floats, Gain, roc_curve
from aligner_middleware.evaluation.labelled_rows import LabelledRow

if TYPE_CHECKING:
    from aligner_middleware.evaluation.hidden_states import ReadRows, States

LEAST = 20  # good rows, and bad ones, to find a direction or to test it
NEAR = 0.01  # of the best AUC, from which on a layer counts as holding the decision
LOST = 0.01  # share of the good answers that a threshold may change
_PAIRS = 1000  # of which differences are taken, at most
_SMALLEST = 1e-12  # of a difference that has a direction


@dataclass(frozen=True)
class Directions:
    """The direction of keep against correct in each of L layers.

    Attributes:
        vectors: `[L, W]`, of length 1, from good to bad; zeros in a layer whose states do not differ.
        middles: `[L]`, the mean of the mean projections of good rows and of bad ones.
        spreads: `[L]`, half of their distance, at least a tiny one.
    """

    vectors: Floats
    middles: Floats
    spreads: Floats

    def scores(self, states: States) -> Floats:
        """Project states, `[..., L, W]`, on each layer's direction: in the mean -1 for good rows, 1 for bad ones."""
        scores: Floats = (np.einsum("...lw,lw->...l", states, self.vectors) - self.middles) / self.spreads
        return scores


class TestScores(BaseModel):
    """How well directions, and the verdict, tell bad answers from good ones on some rows.

    Attributes:
        name: Of the rows.
        good, bad: Their number.
        layers: AUC of each layer's direction, from the first layer on.
        first: The first layer, from 1, whose AUC is within `NEAR` of the best one's: there the decision sits.
        changed: Share of the bad answers changed by the chosen layer's direction where it changes at most 1 % of the good
            ones.
        verdict: AUC of the verdict's log odds; `None` without verdicts, as the next two are.
        verdict_changed: As `changed`, of the verdict.
        gain: The chosen direction's AUC less the verdict's.
    """

    __test__ = False  # pytest takes it for a class of tests
    model_config = ConfigDict(frozen=True)

    name: str
    good: int
    bad: int
    layers: list[Auc]
    first: int
    changed: float
    verdict: Auc | None
    verdict_changed: float | None
    gain: Gain | None

    @property
    def better(self) -> bool:
        """Whether the direction is better than the verdict, beyond the 95 % interval."""
        return self.gain is not None and self.gain.low > 0


class ProbeReport(BaseModel):
    """What `probe` finds.

    Attributes:
        good, bad: Number of rows that the directions were found on.
        layer: The chosen layer, from 1: the first with the best AUC on those rows.
        direction: Its direction, `[W]`, of length 1, from good to bad.
        tests: The scores on other rows.
    """

    model_config = ConfigDict(frozen=True)

    good: int
    bad: int
    layer: int
    direction: list[float]
    tests: list[TestScores]


def halves(rows: Sequence[LabelledRow]) -> NDArray[np.bool_]:
    """Choose half of the rows, `[N]`, by their questions, so that no question is in both halves."""
    return np.array([zlib.crc32(row.question.strip().casefold().encode()) % 2 == 0 for row in rows], np.bool_)


def check_enough(unsafe: NDArray[np.bool_], name: str) -> None:
    """Refuse rows with fewer than `LEAST` good ones or bad ones.

    Raises:
        JobError: If they are too few; the message has their numbers.
    """
    bad = int(unsafe.sum())
    good = unsafe.size - bad
    if min(good, bad) < LEAST:
        raise JobError(
            name, f"{good} good and {bad} bad answers can be used, at least {LEAST} of each are needed: add rows"
        )


def find_directions(states: States, unsafe: NDArray[np.bool_], *, seed: int = 0) -> Directions:
    """Find each layer's direction by PCA over differences of pairs, bad minus good, each scaled to length 1.

    Pairs are drawn; every row is in one of them, as long as there are no more than 1,000 of its class. The differences are
    not centred: their mean is the direction that is looked for, and to subtract it would remove that. (The source draws
    pairs in either order, so that the mean is 0.)

    Args:
        states: `[N, L, W]`, of rows of both classes.
        unsafe: `[N]`, whether each answer is bad.
        seed: Of the pairs.
    """
    rng = np.random.default_rng(seed)
    bad, good = (rng.permutation(np.flatnonzero(side)) for side in (unsafe, ~unsafe))
    count = min(max(bad.size, good.size), _PAIRS)
    bad, good = np.resize(bad, count), np.resize(good, count)
    vectors = np.stack(
        [_component(layer[bad] - layer[good]) for layer in np.moveaxis(states, 1, 0)]  # [L, W]
    )
    projected = np.einsum("nlw,lw->nl", states, vectors)
    high, low = projected[unsafe].mean(axis=0), projected[~unsafe].mean(axis=0)
    signs = np.where(high < low, -1.0, 1.0)
    spreads = np.maximum(np.abs(high - low) / 2, _SMALLEST)
    return Directions(vectors * signs[:, None], signs * (high + low) / 2, spreads)


def probe(fitted: ReadRows, tests: Mapping[str, ReadRows], *, seed: int = 0) -> tuple[Directions, ProbeReport]:
    """Find directions on some rows, and test them on others.

    Args:
        fitted: Rows to find the directions on, at least `LEAST` of each class.
        tests: Other rows by name, as many.
        seed: Of the pairs, and of the bootstrap.
    """
    directions = find_directions(fitted.states, fitted.unsafe, seed=seed)
    own = directions.scores(fitted.states)
    areas = [Auc.of(own[:, layer], fitted.unsafe, draws=1).value for layer in range(own.shape[1])]
    layer = int(np.argmax(areas))
    bad = int(fitted.unsafe.sum())
    return directions, ProbeReport(
        good=len(fitted.rows) - bad,
        bad=bad,
        layer=layer + 1,
        direction=directions.vectors[layer].tolist(),
        tests=[_tested(name, rows, directions, layer, seed) for name, rows in tests.items()],
    )


def _tested(name: str, rows: ReadRows, directions: Directions, layer: int, seed: int) -> TestScores:
    unsafe, scores = rows.unsafe, directions.scores(rows.states)
    layers = [Auc.of(scores[:, at], unsafe, seed=seed) for at in range(scores.shape[1])]
    best = max(area.value for area in layers)
    bad = int(unsafe.sum())
    verdict = rows.log_odds
    return TestScores(
        name=name,
        good=unsafe.size - bad,
        bad=bad,
        layers=layers,
        first=1 + next(at for at, area in enumerate(layers) if area.value >= best - NEAR),
        changed=_changed(scores[:, layer], unsafe),
        verdict=None if verdict is None else Auc.of(verdict, unsafe, seed=seed),
        verdict_changed=None if verdict is None else _changed(verdict, unsafe),
        gain=None if verdict is None else Gain.of(scores[:, layer], verdict, unsafe, seed=seed),
    )


def _component(differences: States) -> Floats:
    """Give the first principal component, `[W]`, of differences `[N, W]` scaled to length 1."""
    lengths = np.linalg.norm(differences, axis=1, keepdims=True)
    if lengths.max() < _SMALLEST:
        return np.zeros(differences.shape[1])
    scaled = differences / np.maximum(lengths, _SMALLEST)
    return np.asarray(np.linalg.svd(scaled, full_matrices=False)[2][0], np.float64)


def _changed(scores: Floats, unsafe: NDArray[np.bool_]) -> float:
    """Give the share of bad answers above the lowest threshold that at most `LOST` of the good ones are above."""
    good, bad = roc_curve(scores, unsafe)
    return float(bad[good <= LOST + 1e-9].max())
