"""What a policy's answers to held-out prompts tell of its health: is it better than the first policy, or collapsing?"""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from aligner_middleware.evaluation.comparison import Tally
from aligner_middleware.evaluation.pairwise import Dimension, Pair, PairJudge

_WORD = re.compile(r"\w+(?:'\w+)?")
# How refusals begin; what an answer says after its third sentence is no refusal of the question.
_REFUSES = re.compile(
    r"\b(I|we) (can ?no|can'?t|could ?n[o']t|won'?t|will not|would not|am not able|'?m not able|am unable|'?m unable|"
    r"must decline|do not feel comfortable|don'?t feel comfortable)|\b(I am|I'm) sorry\b|\bas an AI\b|\bI apologi[sz]e\b",
    re.IGNORECASE,
)
_BEGINNING = re.compile(r"(?:[^.!?\n]*[.!?\n]+){0,2}[^.!?\n]*")


class Health(BaseModel):
    """Scores of a policy on held-out prompts.

    Attributes:
        verdicts: Its answers against the first policy's, by dimension.
        kl: Divergence from the first policy, in nats a token of its own answers.
        words: Mean length of its answers, in words.
        distinct: Share of different ones among all n-grams of its answers, for n = 1, 2, 3.
        refusals: Share of answers that begin by declining.
        blank: Share of empty answers.
    """

    model_config = ConfigDict(frozen=True)

    verdicts: dict[Dimension, Tally]
    kl: float
    words: float
    distinct: dict[int, float]
    refusals: float
    blank: float


def examine(
    questions: Sequence[str], answers: Sequence[str], first: Sequence[str], judge: PairJudge, kl: float
) -> Health:
    """Score a policy.

    Args:
        questions: Held-out prompts.
        answers: The policy's answers to them.
        first: The first policy's.
        judge: Compares the two.
        kl: Divergence from the first policy, in nats a token.

    Raises:
        UpstreamError: If the judge fails.
    """
    pairs = [Pair(*texts) for texts in zip(questions, first, answers, strict=True)]
    verdicts = judge.judge(pairs)
    return Health(
        verdicts={name: Tally.of(verdict[name] for verdict in verdicts) for name in judge.dimensions},
        kl=kl,
        words=statistics.fmean(len(answer.split()) for answer in answers),
        distinct={n: distinct(answers, n) for n in (1, 2, 3)},
        refusals=statistics.fmean(refuses(answer) for answer in answers),
        blank=statistics.fmean(not answer.strip() for answer in answers),
    )


def distinct(answers: Sequence[str], n: int) -> float:
    """Give the share of different n-grams of words among all n-grams of some answers; 0 where there are none."""
    seen, count = set(), 0
    for answer in answers:
        words = _WORD.findall(answer.lower())
        grams = list(zip(*(words[at:] for at in range(n)), strict=False))
        seen.update(grams)
        count += len(grams)
    return len(seen) / count if count else 0.0


def refuses(answer: str) -> bool:
    """Tell whether an answer declines, by words in its first three sentences."""
    beginning = _BEGINNING.match(answer)
    return bool(beginning and _REFUSES.search(beginning.group()))
