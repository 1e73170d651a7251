"""Turns the evidence for a correction into a score, and holds the thresholds of the levels of strength."""

from __future__ import annotations

import math
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from aligner_middleware.strength import LEVELS, Level


class Calibration(BaseModel):
    """How willingly an aligner corrects at each level, found by `aligner calibrate` on rows that it was not trained on.

    Attributes:
        scale, bias: The score is `sigmoid(scale * log_odds + bias)`, of the log odds of not keeping (Platt's scaling).
        levels: For aligners with verdicts: an answer is corrected where its score is above this.
        tolerances: For copies, in nats: an answer's token stays if its log probability is so close to the best one's.
        rows: Number of rows that it was found on; 0 before the first calibration.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    scale: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    bias: float = Field(default=0.0, allow_inf_nan=False)
    levels: dict[Level, Annotated[float, Field(ge=0, le=1)]] = {"low": 0.9, "medium": 0.5, "high": 0.2}
    tolerances: dict[Level, Annotated[float, Field(ge=-math.inf)]] = {"low": 6.0, "medium": 3.0, "high": 1.0}
    rows: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _has_every_level(self) -> Self:
        for name, values in (("levels", self.levels), ("tolerances", self.tolerances)):
            if missing := [level for level in LEVELS if level not in values]:
                raise ValueError(f"{name} lacks {', '.join(missing)}")
        return self

    def score(self, log_odds: float) -> float:
        """Give the probability, 0 to 1, that an answer should not be kept."""
        return 1 / (1 + math.exp(-min(max(self.scale * log_odds + self.bias, -700.0), 700.0)))

    def log_odds(self, score: float) -> float:
        """Give the log odds that have this score; infinite for 0 and 1."""
        if score <= 0 or score >= 1:
            return math.copysign(math.inf, score - 0.5)
        return (math.log(score / (1 - score)) - self.bias) / self.scale
