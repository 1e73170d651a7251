"""What a training run is made of; the command line's defaults and help are read from here."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from aligner_middleware.build.base import DEFAULT_BASE

LEARNING_RATES = {"lora": 4e-4, "full": 2e-5}  # full fine-tuning: the paper's; LoRA wants more than ten times as much


class Stage(BaseModel):
    """One pass through the data.

    Attributes:
        epochs: How often each row is seen; 0 leaves the stage out.
        identity_share: Share of identity rows. The warm-up has nothing else: each answer, good or bad, is to be copied. In
            the correction stage they are corrections that stand as answers too: the same question, now answered well.
        learning_rate: Peak of the schedule; `None` for 4e-4 with LoRA, and 2e-5 (the paper's) without.
        schedule: What the learning rate does after its rise.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: float = Field(ge=0)
    identity_share: float = Field(default=0.0, ge=0, le=1)
    learning_rate: float | None = Field(default=None, gt=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"


class TrainConfig(BaseModel):
    """A training run: identity warm-up, then correction (paper, section 2).

    Attributes:
        base: Model to start from, a hub id or a folder.
        template: Prompt template, by name or as a text with `{question}` and `{answer}`.
        method: `lora` trains an adapter, `full` all weights.
        warm_up: The identity stage: correction := answer. Half an epoch: copying is learnt within fifty steps.
        correction: The stage on the corrections themselves. The paper's three epochs.
        decision_weight: How much the tokens count at which a correction begins to differ from the answer (or ends, like it):
            one token decides what becomes of an answer, dozens only word it. 1 for the paper's plain mean.
        batch_size: Rows in a pass, on each device.
        accumulation: Passes in a step.
        checkpointing: Compute activations anew in the backward pass: a third slower, far less memory.
        bfloat16: Matrix products in bfloat16; `None` where the device has units for it.
        max_length: Longest row, in tokens; longer ones are left out and counted.
        lora_rank, lora_alpha, lora_dropout: LoRA on every linear layer but the head.
        warm_up_ratio: Share of a stage's steps in which the learning rate rises (paper: 0.03).
        weight_decay: Of AdamW (paper: 0).
        save_steps: Steps between checkpoints, and between evaluations. A killed run goes on from its last checkpoint.
        patience: Stop a stage when the loss on held-out rows has not fallen for so many evaluations, and take the best
            weights; `None` for never.
        seed: Of weights, order and dropout.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: str = DEFAULT_BASE
    template: str | None = None
    method: Literal["lora", "full"] = "lora"
    warm_up: Stage = Stage(epochs=0.5, identity_share=1.0)
    correction: Stage = Stage(epochs=3, identity_share=0.2)
    decision_weight: float = Field(default=1.0, ge=1)
    batch_size: int = Field(default=8, ge=1)
    accumulation: int = Field(default=1, ge=1)
    checkpointing: bool = False
    bfloat16: bool | None = None
    max_length: int = Field(default=1024, ge=16)
    lora_rank: int = Field(default=16, ge=1)
    lora_alpha: int = Field(default=32, ge=1)
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    warm_up_ratio: float = Field(default=0.03, ge=0, le=1)
    weight_decay: float = Field(default=0.0, ge=0)
    save_steps: int = Field(default=100, ge=1)
    patience: int | None = Field(default=None, ge=1)
    seed: int = 0
