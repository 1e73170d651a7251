"""Metrics of a policy on held-out prompts, against the first policy's answers."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from aligner_middleware.evaluation.comparison import Tally
from aligner_middleware.evaluation.pairwise import Dimension, Pair, PairwiseJudge

_WORD = re.compile(r"\w+(?:'\w+)?")
# How refusals begin; what an answer says after its third sentence is no refusal of the question.
_REFUSES = re.compile(
    r"\b(I|we) (can ?no|can'?t|could ?n[o']t|won'?t|will not|would not|am not able|'?m not able|am unable|'?m unable|"
    r"must decline|do not feel comfortable|don'?t feel comfortable)|\b(I am|I'm) sorry\b|\bas an AI\b|\bI apologi[sz]e\b",
    re.IGNORECASE,
)
_BEGINNING = re.compile(r"(?:[^.!?\n]*[.!?\n]+){0,2}[^.!?\n]*")


class PolicyMetrics(BaseModel):
    """Metrics of a policy on held-out prompts.

    Attributes:
        verdicts: Pairwise verdicts on its answers against the first policy's, by dimension.
        kl: KL divergence from the first policy on its own answers, in nats a token.
        words: Mean length of its answers, in words.
        distinct: distinct-n, the share of distinct n-grams among all n-grams of its answers, for n = 1, 2, 3.
        refusals: Share of answers that begin with a refusal, 0 to 1.
        blank: Share of empty answers, 0 to 1.
    """

    model_config = ConfigDict(frozen=True)

    verdicts: dict[Dimension, Tally]
    kl: float
    words: float
    distinct: dict[int, float]
    refusals: float
    blank: float


def evaluate_policy(
    questions: Sequence[str], answers: Sequence[str], first: Sequence[str], judge: PairwiseJudge, kl: float
) -> PolicyMetrics:
    """Compute the metrics of a policy.

    Args:
        questions: Held-out prompts.
        answers: The policy's answers to them.
        first: The first policy's answers.
        judge: Compares the two.
        kl: KL divergence from the first policy, in nats a token.

    Raises:
        UpstreamError: If the judge fails.
    """
    pairs = [Pair(*texts) for texts in zip(questions, first, answers, strict=True)]
    verdicts = judge.judge(pairs)
    return PolicyMetrics(
        verdicts={name: Tally.of(verdict[name] for verdict in verdicts) for name in judge.dimensions},
        kl=kl,
        words=statistics.fmean(len(answer.split()) for answer in answers),
        distinct={n: distinct(answers, n) for n in (1, 2, 3)},
        refusals=statistics.fmean(refuses(answer) for answer in answers),
        blank=statistics.fmean(not answer.strip() for answer in answers),
    )


def distinct(answers: Sequence[str], n: int) -> float:
    """Give distinct-n, the share of distinct n-grams of words among all n-grams of some answers; 0 where there are none."""
    seen, count = set(), 0
    for answer in answers:
        words = _WORD.findall(answer.lower())
        grams = list(zip(*(words[start:] for start in range(n)), strict=False))
        seen.update(grams)
        count += len(grams)
    return len(seen) / count if count else 0.0


def refuses(answer: str) -> bool:
    """Tell whether an answer declines, by words in its first three sentences."""
    beginning = _BEGINNING.match(answer)
    return bool(beginning and _REFUSES.search(beginning.group()))
