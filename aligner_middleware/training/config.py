"""What a training run is made of; the command line's defaults and help are read from here."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from aligner_middleware.build.base import DEFAULT_BASE


class Stage(BaseModel):
    """One pass through the data.

    Attributes:
        epochs: How often each row is seen.
        learning_rate: Peak of a cosine schedule. LoRA wants about ten times the paper's 2e-5 for full fine-tuning.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: float = Field(ge=0)
    learning_rate: float = Field(gt=0)


class TrainConfig(BaseModel):
    """A training run: identity warm-up, then correction (paper, section 2), with LoRA.

    Attributes:
        base: Model to start from, a hub id or a folder.
        template: Prompt template, by name or as a text with `{question}` and `{answer}`.
        warm_up: The identity stage: correction := answer.
        correction: The stage on the corrections themselves.
        batch_size: Rows in a step.
        max_length: Longest row, in tokens; longer ones are left out and counted.
        lora_rank, lora_alpha, lora_dropout: LoRA on every linear layer but the head.
        warm_up_ratio: Share of a stage's steps in which the learning rate rises (paper: 0.03).
        seed: Of weights, order and dropout.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: str = DEFAULT_BASE
    template: str | None = None
    warm_up: Stage = Stage(epochs=1, learning_rate=4e-4)
    correction: Stage = Stage(epochs=3, learning_rate=4e-4)
    batch_size: int = Field(default=8, ge=1)
    max_length: int = Field(default=1024, ge=16)
    lora_rank: int = Field(default=16, ge=1)
    lora_alpha: int = Field(default=32, ge=1)
    lora_dropout: float = Field(default=0.05, ge=0, lt=1)
    warm_up_ratio: float = Field(default=0.03, ge=0, le=1)
    seed: int = 0
