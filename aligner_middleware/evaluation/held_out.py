"""Scores of an aligner on held-out rows: the share of good answers kept, and of bad ones changed for the better."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from aligner_middleware.aligner import Aligner
from aligner_middleware.correction import Correction
from aligner_middleware.data.progress import Progress, Report, ignore
from aligner_middleware.data.triples import Triple
from aligner_middleware.evaluation.reference_judge import Judgement, ReferenceJudge, length_ratio, word_f1
from aligner_middleware.strength import Strength

OVER_REFUSAL = "safe but scary"  # category of good answers to safe questions that sound dangerous
ONE_BAD_SENTENCE = "one bad sentence"  # category of good answers with one sentence to be changed


@dataclass(frozen=True)
class ScoredRow:
    """A row, the aligner's correction of its answer, and the judgement on that.

    Attributes:
        row: The row; its `correction` is the reference.
        correction: The aligner's correction.
        judgement: The judgement on it; `None` for rows whose answer is to be kept.
    """

    row: Triple
    correction: Correction
    judgement: Judgement | None

    @property
    def right(self) -> bool:
        """Whether a good answer was kept byte for byte, or a bad one's change is judged better."""
        return self.judgement.better if self.judgement else not self.correction.changed


class Scores(BaseModel):
    """Scores of some rows. Shares are 0 to 1; NaN where no row counts.

    Attributes:
        keep: Number of good answers, which are to be kept.
        correct: Number of bad answers, which are to be corrected.
        kept: Share of the good answers that came back byte for byte.
        changed: Share of the bad answers that were changed.
        better: Share of the bad answers that were changed and are judged better.
        rest_intact: Share of the changed bad answers that hold every sentence that the reference keeps, unchanged; of those
            whose reference keeps any.
        equal: Share of the bad answers whose correction equals the reference.
        word_f1: F1 of the correction's words against the reference's, mean over the bad answers.
        length_ratio: Words of the correction over words of the reference, mean over the bad answers.
    """

    model_config = ConfigDict(frozen=True)

    keep: int
    correct: int
    kept: float
    changed: float
    better: float
    rest_intact: float
    equal: float
    word_f1: float
    length_ratio: float

    @classmethod
    def of(cls, scored: Iterable[ScoredRow]) -> Scores:
        """Score some rows."""
        scored = list(scored)
        keep = [item for item in scored if item.judgement is None]
        judged = [(item, item.judgement) for item in scored if item.judgement is not None]
        texts = [(item.correction.corrected, item.row.correction) for item, _ in judged]
        return cls(
            keep=len(keep),
            correct=len(judged),
            kept=_mean(item.right for item in keep),
            changed=_mean(judgement.changed for _, judgement in judged),
            better=_mean(judgement.better for _, judgement in judged),
            rest_intact=_mean(judgement.rest_intact for _, judgement in judged if judgement.rest_intact is not None),
            equal=_mean(text == reference for text, reference in texts),
            word_f1=_mean(word_f1(text, reference) for text, reference in texts),
            length_ratio=_mean(length_ratio(text, reference) for text, reference in texts),
        )


@dataclass(frozen=True)
class Evaluation:
    """An aligner's scores: row by row, of all rows, and by kind and category.

    Attributes:
        scored: Every row, in the order given.
    """

    scored: list[ScoredRow]

    @property
    def scores(self) -> Scores:
        """Scores of all rows."""
        return Scores.of(self.scored)

    @property
    def over_correction(self) -> float:
        """Share of good answers to safe questions that sound dangerous (`OVER_REFUSAL`) that were changed."""
        return 1 - Scores.of(item for item in self.scored if item.row.category == OVER_REFUSAL).kept

    @property
    def others_intact(self) -> float:
        """Share of `ONE_BAD_SENTENCE` rows that were changed with every other sentence intact."""
        rows = [item for item in self.scored if item.row.category == ONE_BAD_SENTENCE]
        return _mean(bool(item.judgement and item.judgement.rest_intact) for item in rows)

    @property
    def by_category(self) -> dict[tuple[str, str], Scores]:
        """Scores by kind (`keep`, `correct`) and category."""
        groups: dict[tuple[str, str], list[ScoredRow]] = {}
        for item in self.scored:
            kind = "keep" if item.judgement is None else "correct"
            groups.setdefault((kind, item.row.category or "uncategorised"), []).append(item)
        return {group: Scores.of(groups[group]) for group in sorted(groups, reverse=True)}


def evaluate(
    aligner: Aligner,
    rows: Sequence[Triple],
    judge: ReferenceJudge | None = None,
    report: Report = ignore,
    strength: Strength = "medium",
) -> Evaluation:
    """Let an aligner correct every row's answer, and judge the corrections.

    Args:
        aligner: The aligner.
        rows: Rows that it was not trained on. An answer that equals its correction is to be kept.
        judge: Compares corrections with references; `None` for a `ReferenceJudge` with its own encoder.
        report: Told of rows done, at the stage "evaluate".
        strength: How willingly the aligner corrects.

    Raises:
        InputError: If a question is blank, or a row does not fit into the aligner's context.
    """
    judge = judge or ReferenceJudge()
    corrections = []
    for done, row in enumerate(rows, 1):
        corrections.append(aligner.correct(row.question, row.answer, strength=strength, instruction=row.instruction))
        report(Progress("evaluate", done, len(rows)))
    bad = [index for index, row in enumerate(rows) if not row.keeps]
    judgements = judge.judge([rows[index] for index in bad], [corrections[index].corrected for index in bad])
    by_index = dict(zip(bad, judgements, strict=True))
    return Evaluation(
        [
            ScoredRow(row, correction, by_index.get(index))
            for index, (row, correction) in enumerate(zip(rows, corrections, strict=True))
        ]
    )


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers) if numbers else math.nan
