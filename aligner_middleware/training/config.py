"""What a training run is made of; the command line's defaults and help are read from here."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from aligner_middleware.checkpoints.base import DEFAULT_BASE
from aligner_middleware.text.targets import EDIT_SHARE

# Full fine-tuning: the paper's; LoRA wants more than ten times as much; a difference is of a small model, trained briefly.
LEARNING_RATES = {"lora": 4e-4, "full": 2e-5, "difference": 1.5e-4}
POLICY_LEARNING_RATES = {"dpo": 5e-5, "sft": 4e-4}


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
        start: Aligner to go on from, made of `base` (such as `default`); `None` for the base itself. With `full` and
            `difference`; the difference is to the base still.
        template: Prompt template, by name or as a text with `{question}` and `{answer}`.
        method: `lora` trains an adapter, `full` all weights; `difference` all but the embeddings, and stores how they differ
            from the base in a few bits a weight.
        difference_bits: Bits a weight of that difference.
        verdict: Whether one token before the correction says keep, edit or rewrite; `None` where the template is ours and
            the base has special tokens to spare.
        edits: How a correction is learnt that keeps most of the answer: as `operations` on its sentences, or as a `copy`.
            Without verdicts all corrections are copies.
        edit_share: A correction in which at least this share of the answer's words stays is an edit, others rewrite.
        verdict_weight: Weight of the verdict's loss, a mean over rows, beside the corrections', a mean over tokens.
        verdict_balance: How much rare verdicts count: each by the inverse of its frequency to this power; 0 for not at all.
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
    start: str | None = None
    template: str | None = None
    method: Literal["lora", "full", "difference"] = "lora"
    difference_bits: int = Field(default=3, ge=1, le=8)
    verdict: bool | None = None
    edits: Literal["operations", "copy"] = "operations"
    edit_share: float = Field(default=EDIT_SHARE, ge=0, le=1)
    verdict_weight: float = Field(default=1.5, gt=0)
    verdict_balance: float = Field(default=0.5, ge=0, le=1)
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


class PolicyConfig(BaseModel):
    """How a policy answers, and how it is trained on what an aligner made of its answers (paper, section 4).

    Attributes:
        base: The first policy, a hub id or a folder: a chat model, or a model that continues texts.
        method: `dpo` prefers corrections over answers; `sft` imitates corrections, and answers that needed none.
        beta: Of DPO: how much leaving the policy of the round before costs.
        nll_weight: Of DPO: weight of the corrections' own likelihood beside the preference. Corrections share most words
            with their answers, and without it both become less likely.
        epochs: How often each row is seen in a round.
        learning_rate: Peak of the cosine schedule; `None` for 5e-5 in DPO and 4e-4 in SFT.
        batch_size: Rows in a pass; DPO's have two answers each.
        accumulation: Passes in a step.
        checkpointing: Compute activations anew in the backward pass: a third slower, far less memory.
        bfloat16: Matrix products in bfloat16; `None` where the device has units for it.
        max_length: Longest row, in tokens; what is longer is cut off at its end.
        lora_rank, lora_alpha, lora_dropout: LoRA on every linear layer but the head.
        warm_up_ratio: Share of a round's steps in which the learning rate rises.
        save_steps: Steps between checkpoints.
        answer_tokens: Longest answer.
        temperature, top_p: How answers to the training prompts are sampled; held-out prompts are answered greedily.
        generation_batch: Prompts that are answered at once.
        seed: Of sampling, weights, order and dropout.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: str = DEFAULT_BASE
    method: Literal["dpo", "sft"] = "dpo"
    beta: float = Field(default=0.1, gt=0)
    nll_weight: float = Field(default=0.2, ge=0)
    epochs: float = Field(default=1, gt=0)
    learning_rate: float | None = Field(default=None, gt=0)
    batch_size: int = Field(default=4, ge=1)
    accumulation: int = Field(default=2, ge=1)
    checkpointing: bool = False
    bfloat16: bool | None = None
    max_length: int = Field(default=1024, ge=16)
    lora_rank: int = Field(default=16, ge=1)
    lora_alpha: int = Field(default=32, ge=1)
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    warm_up_ratio: float = Field(default=0.1, ge=0, le=1)
    save_steps: int = Field(default=100, ge=1)
    answer_tokens: int = Field(default=256, ge=1)
    temperature: float = Field(default=0.7, gt=0)
    top_p: float = Field(default=0.95, gt=0, le=1)
    generation_batch: int = Field(default=32, ge=1)
    seed: int = 0
