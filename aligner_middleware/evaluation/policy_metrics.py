"""What a policy's answers to held-out prompts tell of its health: is it better than the first policy, or collapsing?"""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field

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


class StopRules(BaseModel):
    """Bounds beyond which a policy counts as collapsed; it is compared with the first policy, or with the best round so far."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_kl: float = Field(
        default=1.0,
        gt=0,
        description="Stop when the KL divergence from the first policy exceeds this, in nats a token.",
    )
    max_drop: float = Field(
        default=0.1,
        ge=0,
        description="Stop when the judge's rate, in any dimension, is more than this below the best earlier round's, and "
        "their 95 % intervals do not overlap.",
    )
    length: tuple[float, float] = Field(
        default=(0.5, 2.0),
        description="Stop when the mean words of an answer leave this range, as shares of the first policy's: least, most.",
    )
    min_distinct: float = Field(
        default=0.7, ge=0, le=1, description="Stop below this share of the first policy's distinct 3-grams, 0 to 1."
    )
    max_refusals: float = Field(
        default=0.2, ge=0, description="Stop when the share of refusals exceeds the first policy's by more than this."
    )
    max_blank: float = Field(default=0.05, ge=0, description="Stop when a larger share of answers is empty, 0 to 1.")
    min_pairs: int = Field(
        default=8, ge=1, description="Stop when a round has fewer preference pairs: too little is left to learn."
    )

    def broken(self, history: Sequence[Health]) -> list[str]:
        """Say which rules the last of these policies breaks; the first one is what it is compared with."""
        first, *_, now = history
        found = []
        if now.kl > self.max_kl:
            found.append(f"KL to the first policy is {now.kl:.2f} nats a token, over {self.max_kl:g}")
        for dimension, tally in now.verdicts.items():
            best = max((health.verdicts[dimension] for health in history[:-1]), key=lambda tally: tally.rate)
            if tally.rate < best.rate - self.max_drop and tally.high < best.low:
                found.append(f"judged {dimension}: {tally.rate:+.1%}, where an earlier round had {best.rate:+.1%}")
        if not self.length[0] * first.words <= now.words <= self.length[1] * first.words:
            found.append(f"answers have {now.words:.0f} words, the first policy's {first.words:.0f}")
        if now.distinct[3] < self.min_distinct * first.distinct[3]:
            found.append(f"{now.distinct[3]:.0%} of 3-grams are distinct, the first policy's {first.distinct[3]:.0%}")
        if now.refusals > first.refusals + self.max_refusals:
            found.append(f"{now.refusals:.0%} of answers are refusals, the first policy's {first.refusals:.0%}")
        if now.blank > self.max_blank:
            found.append(f"{now.blank:.0%} of answers are empty")
        return found


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
