"""Rules that end a run of rounds when its policy collapses: the options of `aligner rounds`; imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from aligner_middleware.evaluation.policy_metrics import PolicyMetrics


class StopRules(BaseModel):
    """Bounds beyond which a policy counts as collapsed, compared with the first policy or with the best earlier round."""

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
