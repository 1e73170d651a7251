"""Settings of training, each with default, bounds and description; `aligner train` and `rounds` take their options here."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from aligner_middleware.checkpoints.base import DEFAULT_BASE
from aligner_middleware.text.targets import EDIT_SHARE

# Full fine-tuning: the paper's; LoRA wants more than ten times as much; a difference is of a small model, trained briefly.
LEARNING_RATES = {"lora": 4e-4, "full": 2e-5, "difference": 1.5e-4}
POLICY_LEARNING_RATES = {"dpo": 5e-5, "sft": 4e-4}

# Fields whose defaults differ between the two kinds of run.
Accumulation = Annotated[int, Field(ge=1, description="Forward and backward passes in an optimiser step.")]
WarmUpRatio = Annotated[
    float, Field(ge=0, le=1, description="Share of the steps in which the learning rate rises to its peak, 0 to 1.")
]


class RunConfig(BaseModel):
    """Settings that every training run has: of an aligner, and of a policy."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: str = Field(default=DEFAULT_BASE, description="Model to start from: a hub id or a folder.")
    checkpointing: bool = Field(
        default=False,
        description="Recompute activations in the backward pass: a third slower, and far less memory.",
    )
    bfloat16: bool | None = Field(
        default=None, description="Matrix products in bfloat16. By default where the device has units for it."
    )
    lora_rank: int = Field(
        default=16, ge=1, description="Rank of the LoRA matrices, beside every linear layer but the head."
    )
    lora_alpha: int = Field(default=32, ge=1, description="Scale of the LoRA matrices, times their rank.")
    lora_dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout before the LoRA matrices, 0 to 1.")
    save_steps: int = Field(
        default=100,
        ge=1,
        description="Steps between checkpoints, and between evaluations where there are held-out rows.",
    )
    seed: int = Field(default=0, description="Seed of everything random: weights, order, dropout and sampling.")


class Stage(BaseModel):
    """One stage of an aligner's training."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: float = Field(ge=0, description="Times that each row is seen in the stage; 0 leaves the stage out.")
    identity_share: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Share of identity rows, 0 to 1: a correction stands as the answer, which is to be kept. The warm-up has "
        "nothing else: it copies each answer, good or bad.",
    )
    learning_rate: float | None = Field(
        default=None,
        gt=0,
        description="Peak learning rate. By default 4e-4 with lora, 2e-5 (the paper's) with full, 1.5e-4 with difference.",
    )
    schedule: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="Shape of the learning rate after its rise."
    )


class TrainConfig(RunConfig):
    """An aligner's training run: identity warm-up, then correction (paper, section 2)."""

    start: str | None = Field(
        default=None,
        description="Aligner to continue from, made of the same base, such as `default`; not with lora. A difference is "
        "still to the base. By default training starts from the base itself.",
    )
    template: str | None = Field(
        default=None,
        description="Prompt template: a name, or a text with {question} and {answer}, and {instruction} where every row has "
        "one. By default the start's, or `default`; with a place for instructions where rows have them.",
    )
    method: Literal["lora", "full", "difference"] = Field(
        default="lora",
        description="lora trains an adapter, full all weights, difference all but the embeddings; a difference to the base "
        "is stored in a few bits a weight.",
    )
    difference_bits: int = Field(default=3, ge=1, le=8, description="Bits a weight of a stored difference.")
    verdict: bool | None = Field(
        default=None,
        description="Put one token before the correction that says keep, edit or rewrite. By default where the template is "
        "`default` and the base has special tokens to spare.",
    )
    edits: Literal["operations", "copy"] = Field(
        default="operations",
        description="How the model writes an edit: as operations on sentences, or as a copy with changes. Without verdicts "
        "all corrections are copies.",
    )
    edit_share: float = Field(
        default=EDIT_SHARE,
        ge=0,
        le=1,
        description="A correction that keeps at least this share of the answer's words is an edit, any other a rewrite.",
    )
    verdict_weight: float = Field(
        default=1.5,
        gt=0,
        description="Weight of the verdicts' loss (mean over rows) beside the corrections' (over tokens).",
    )
    verdict_balance: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="Weight of rare verdicts: their inverse frequency to this power; 0 weighs all alike.",
    )
    warm_up: Stage = Field(
        default=Stage(epochs=0.5, identity_share=1.0),
        description="The identity stage, correction := answer. Half an epoch: the model learns to copy in fifty steps.",
    )
    correction: Stage = Field(
        default=Stage(epochs=3, identity_share=0.2),
        description="The stage on the corrections themselves; three epochs, as in the paper.",
    )
    decision_weight: float = Field(
        default=1.0,
        ge=1,
        description="Weight in the loss of the tokens that decide: an operation's number, a copy's first token, and the one "
        "at which it first differs from the answer. 1 is the paper's plain mean.",
    )
    batch_size: int = Field(default=8, ge=1, description="Rows in a forward pass, on each device.")
    accumulation: Accumulation = 1
    max_length: int = Field(
        default=1024, ge=16, description="Longest row, in tokens; longer ones are left out and counted."
    )
    warm_up_ratio: WarmUpRatio = 0.03
    weight_decay: float = Field(default=0.0, ge=0, description="Weight decay of AdamW (0 in the paper).")
    patience: int | None = Field(
        default=None,
        ge=1,
        description="Stop a stage after this many evaluations without a better held-out loss, and take the best weights. By "
        "default no stage stops early.",
    )


class PolicyConfig(RunConfig):
    """How a policy answers, and how it is trained on an aligner's corrections of its answers (paper, section 4)."""

    base: str = Field(
        default=DEFAULT_BASE,
        description="The first policy: a hub id or a checkpoint's folder, of a chat model or of one that continues texts.",
    )
    method: Literal["dpo", "sft"] = Field(
        default="dpo",
        description="dpo prefers corrections over answers; sft imitates corrections, and answers that needed none.",
    )
    beta: float = Field(
        default=0.1, gt=0, description="DPO's beta: the cost of moving away from the policy of the round before."
    )
    nll_weight: float = Field(
        default=0.2,
        ge=0,
        description="In DPO, weight of the corrections' own likelihood. Without it both texts of a pair become less likely, "
        "as they share most words.",
    )
    epochs: float = Field(default=1, gt=0, description="Times that each row is seen in a round.")
    steps: int | None = Field(
        default=None,
        ge=1,
        description="Steps of a round, however few pairs it has, so that runs can be compared. By default epochs decide.",
    )
    learning_rate: float | None = Field(
        default=None, gt=0, description="Peak of the cosine schedule. By default 5e-5 with dpo, 4e-4 with sft."
    )
    batch_size: int = Field(default=4, ge=1, description="Rows in a forward pass; a row of DPO has two answers.")
    accumulation: Accumulation = 2
    max_length: int = Field(
        default=1024, ge=16, description="Longest row, in tokens; longer ones are cut at their end."
    )
    warm_up_ratio: WarmUpRatio = 0.1
    answer_tokens: int = Field(default=256, ge=1, description="Longest answer of the policy, in tokens.")
    temperature: float = Field(
        default=0.7,
        gt=0,
        description="Temperature at which the policy answers training prompts. Held-out ones are greedy.",
    )
    top_p: float = Field(
        default=0.95, gt=0, le=1, description="Nucleus of sampling: the most likely tokens of this total probability."
    )
    generation_batch: int = Field(default=32, ge=1, description="Prompts that the policy answers at once.")
