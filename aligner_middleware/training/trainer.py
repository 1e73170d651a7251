"""What aligners and policies have in common when they are trained: the network, its checkpoints, and a run's progress."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from aligner_middleware.data.files import write_text

_MEMORY_SHARE = 0.85  # of the memory: a process that holds more ends its run


@dataclass(frozen=True)
class Progress:
    """Where a run is.

    Attributes:
        stage: What is being trained, such as `warm_up` or `correction`.
        step, steps: Optimiser steps done and to do in it.
        loss: Of the latest step, in nats a token (of DPO: in nats a pair); `nan` when a run has just been resumed.
        tokens: Prompt and target tokens seen in it.
    """

    stage: str
    step: int
    steps: int
    loss: float
    tokens: int


Report = Callable[[Progress], None]


def lora(rank: int, alpha: int, dropout: float, tokens: Sequence[int] = ()) -> LoraConfig:
    """Say what is trained: low-rank matrices beside every linear layer but the head, and the embeddings of some tokens."""
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        trainable_token_indices=list(tokens) or None,
    )


def train_embeddings_of(model: Any, tokens: Sequence[int]) -> None:
    """Leave all embeddings as they are, but for those of some tokens; the same for a head of its own."""
    for weight in {
        id(layer.weight): layer.weight for layer in (model.get_input_embeddings(), model.get_output_embeddings())
    }.values():
        if not tokens:
            weight.requires_grad_(False)
            continue
        chosen = torch.zeros(len(weight), 1)
        chosen[list(tokens)] = 1.0
        weight.register_hook(lambda gradient, chosen=chosen: gradient * chosen.to(gradient.device))


def trainable(base: Path, adapter: LoraConfig | None, trained: Path | None, half: bool) -> Any:
    """Load what a stage starts from: the base model, or what the stage before it has made.

    Args:
        base: Folder of the base model.
        adapter: Shape of the adapter that is trained; `None` to train all weights.
        trained: Folder of what was trained before: an adapter, or all weights.
        half: Whether matrix products are made in bfloat16.
    """
    options: dict[str, Any] = {"dtype": torch.float32}
    if torch.cpu._is_amx_tile_supported() and not torch.cuda.is_available():
        options["attn_implementation"] = (
            "eager"  # its products run on the tiles; elsewhere the fused one is up to 2 x faster
        )
    if adapter is None:
        return AutoModelForCausalLM.from_pretrained(trained or base, **options)
    frozen = AutoModelForCausalLM.from_pretrained(base, **options)
    if trained is not None:
        model = PeftModel.from_pretrained(frozen, str(trained), is_trainable=True)
    else:
        model = get_peft_model(frozen, adapter)
    if half:
        for layer in model.modules():
            if isinstance(layer, LoraLayer):  # autocast would cast these matrices anew in every step
                layer.get_base_layer().weight.data = layer.get_base_layer().weight.data.bfloat16()
    return model


def bfloat16(wanted: bool | None) -> bool:
    """Decide on bfloat16: as it is wanted, or where the device has units for it."""
    if wanted is not None:
        return wanted
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def last_checkpoint(folder: Path) -> str | None:
    """Find the newest whole checkpoint; the trainer writes its state last."""
    whole = []
    for checkpoint in folder.glob("checkpoint-*"):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        whole.append(checkpoint)
    newest = max(whole, key=lambda checkpoint: int(checkpoint.name.split("-")[1]), default=None)
    if newest is None:
        return None
    state = newest / "trainer_state.json"
    content = json.loads(state.read_text(encoding="utf-8"))
    if best := content.get("best_model_checkpoint"):  # a path of where the run began; its folder may have moved
        content["best_model_checkpoint"] = str(folder / Path(best).name)
        write_text(state, json.dumps(content, indent=2))
    return str(newest)


def memory_share() -> float:
    """Give the share, 0 to 1, of this machine's or container's memory that this process holds."""
    limit = int(psutil.virtual_memory().total)
    with suppress(OSError, ValueError):  # not Linux, or "max"
        limit = min(limit, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    return int(psutil.Process().memory_info().rss) / limit


class MemoryGuard(TrainerCallback):
    """Ends a run with a checkpoint before the system would kill it: an allocator may keep more memory with each new shape.

    Attributes:
        exceeded: Whether it did.
    """

    def __init__(self) -> None:
        self.exceeded = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """See `TrainerCallback.on_step_end`."""
        if state.global_step < state.max_steps and memory_share() > _MEMORY_SHARE:
            self.exceeded = control.should_save = control.should_training_stop = True


class Reporter(TrainerCallback):
    """Tells `report` of every step."""

    def __init__(self, stage: str, report: Report) -> None:
        self._stage = stage
        self._report = report

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """See `TrainerCallback.on_train_begin`; tells of a run that goes on from a checkpoint."""
        if state.global_step and state.is_world_process_zero:
            tokens = int(state.num_input_tokens_seen)
            self._report(Progress(self._stage, state.global_step, state.max_steps, math.nan, tokens))

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """See `TrainerCallback.on_log`."""
        if logs and "loss" in logs and state.is_world_process_zero:
            tokens = int(state.num_input_tokens_seen)
            self._report(Progress(self._stage, state.global_step, state.max_steps, float(logs["loss"]), tokens))
