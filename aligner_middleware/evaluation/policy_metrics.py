"""Metrics of a policy on held-out prompts, against the first policy's answers, and the rules that stop a collapsing run."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field

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


class StopRules(BaseModel):
    """Bounds beyond which a policy counts as collapsed, relative to the first policy or the best round so far.

    Attributes:
        max_kl: Largest KL divergence from the first policy, in nats a token.
        max_drop: Largest drop of the judge's rate below the best earlier round's, in any dimension. It counts only where
            their 95 % intervals do not overlap: on a few dozen prompts a rate varies that much by chance.
        length: Least and largest mean length of an answer, as shares of the first policy's.
        min_distinct: Least distinct-3, as a share of the first policy's.
        max_refusals: Largest rise of the share of refusals.
        max_blank: Largest share of empty answers.
        min_pairs: Fewest preference pairs that a round trains on.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_kl: float = Field(default=1.0, gt=0)
    max_drop: float = Field(default=0.1, ge=0)
    length: tuple[float, float] = (0.5, 2.0)
    min_distinct: float = Field(default=0.7, ge=0, le=1)
    max_refusals: float = Field(default=0.2, ge=0)
    max_blank: float = Field(default=0.05, ge=0)
    min_pairs: int = Field(default=8, ge=1)

    def broken(self, history: Sequence[PolicyMetrics]) -> list[str]:
        """Give the rules that the last of these policies breaks, a sentence each; the first one is the first policy."""
        first, *_, now = history
        reasons = []
        if now.kl > self.max_kl:
            reasons.append(f"KL to the first policy is {now.kl:.2f} nats a token, over {self.max_kl:g}")
        for dimension, tally in now.verdicts.items():
            best = max((past.verdicts[dimension] for past in history[:-1]), key=lambda tally: tally.rate)
            if tally.rate < best.rate - self.max_drop and tally.high < best.low:
                reasons.append(f"judged {dimension}: {tally.rate:+.1%}, where an earlier round had {best.rate:+.1%}")
        if not self.length[0] * first.words <= now.words <= self.length[1] * first.words:
            reasons.append(f"answers have {now.words:.0f} words, the first policy's {first.words:.0f}")
        if now.distinct[3] < self.min_distinct * first.distinct[3]:
            reasons.append(f"{now.distinct[3]:.0%} of 3-grams are distinct, the first policy's {first.distinct[3]:.0%}")
        if now.refusals > first.refusals + self.max_refusals:
            reasons.append(f"{now.refusals:.0%} of answers are refusals, the first policy's {first.refusals:.0%}")
        if now.blank > self.max_blank:
            reasons.append(f"{now.blank:.0%} of answers are empty")
        return reasons


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
