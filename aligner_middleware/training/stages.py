"""One stage of training, on the trainer of transformers: it resumes, and leaves weights and losses in its folder."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch.utils.data import Dataset
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from aligner_middleware.data.files import write_text
from aligner_middleware.data.progress import Report
from aligner_middleware.errors import BuildError
from aligner_middleware.training.batches import (
    Example,
    collate,
    correction_loss,
    count_targets,
    pack,
    predicting_at,
    supervised,
)
from aligner_middleware.training.config import LEARNING_RATES, TrainConfig
from aligner_middleware.training.encoding import StageData
from aligner_middleware.training.network import use_bfloat16
from aligner_middleware.training.packing import is_packed
from aligner_middleware.training.trainer import MemoryGuard, Reporter, last_checkpoint

_DONE_FILE = "done.json"
_RECENT = 20  # steps whose mean loss is a stage's loss


def stage_weights(folder: Path) -> Path:
    """Give the folder of a finished stage's weights."""
    return folder / "weights"


def stage_losses(folder: Path) -> dict[str, float] | None:
    """Read the losses of a finished stage; `None` where it is not finished."""
    path = folder / _DONE_FILE
    if not path.is_file():
        return None
    losses: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
    return losses


def run_stage(
    network: torch.nn.Module, stage: StageData, folder: Path, config: TrainConfig, logs: Path | None, report: Report
) -> None:
    """Run a stage from its beginning or from its last checkpoint.

    Args:
        network: To train.
        stage: Settings and examples.
        folder: For checkpoints, and at the end for weights and losses.
        config: Settings of the run.
        logs: Folder for TensorBoard's logs.
        report: Called after every step.

    Raises:
        BuildError: If the process comes near the end of the memory; a checkpoint is written before.
    """
    guard = MemoryGuard()
    callbacks: list[TrainerCallback] = [Reporter(stage.name, report)]
    if PartialState().num_processes == 1:
        callbacks.append(guard)
    trainer = _make_trainer(network, stage, callbacks, _arguments(network, stage, folder, config, logs), config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of the trainer's own way to count tokens
        trainer.train(resume_from_checkpoint=last_checkpoint(folder))
    if guard.exceeded:
        raise BuildError(
            f"this process held nearly all memory after step {trainer.state.global_step} of {trainer.state.max_steps}, and "
            "ended before the system would end it: repeat the command to resume, with a smaller batch_size or with "
            "jemalloc (docs/training.md) if it happens again"
        )
    recent = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-_RECENT:]
    losses = {stage.name: sum(recent) / len(recent)}
    if stage.held_out:
        losses[f"{stage.name}_held_out"] = trainer.evaluate()["eval_loss"]
    trainer.save_model(str(stage_weights(folder)))
    if trainer.is_world_process_zero():
        write_text(folder / _DONE_FILE, json.dumps(losses))


def _make_trainer(
    network: torch.nn.Module,
    stage: StageData,
    callbacks: list[TrainerCallback],
    arguments: TrainingArguments,
    config: TrainConfig,
) -> _Trainer:
    packed = is_packed(network)
    if config.patience and stage.held_out:
        callbacks = [*callbacks, EarlyStoppingCallback(config.patience)]
    trainer: _Trainer = _Trainer(
        model=network,
        args=arguments,
        train_dataset=_TrainerRows(stage.examples),
        eval_dataset=_TrainerRows(stage.held_out) if stage.held_out else None,
        data_collator=lambda rows: (pack if packed else collate)([row["example"] for row in rows]),
        callbacks=callbacks,
    )
    trainer.model_accepts_loss_kwargs = True  # the loss is given the number of targets in the step
    trainer.loss = partial(
        correction_loss,
        decision_weight=config.decision_weight,
        verdict_weight=config.verdict_weight,
        weights=stage.verdict_weights,
    )
    trainer.pop_callback(PrinterCallback)  # type: ignore[no-untyped-call]  # it prints every log entry
    return trainer


def _arguments(
    network: torch.nn.Module, stage: StageData, folder: Path, config: TrainConfig, logs: Path | None
) -> TrainingArguments:
    schedule = stage.settings.schedule
    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=stage.settings.epochs,
        learning_rate=stage.settings.learning_rate or LEARNING_RATES[config.method],
        lr_scheduler_type="constant_with_warmup" if schedule == "constant" else schedule,
        warmup_ratio=config.warm_up_ratio,
        weight_decay=config.weight_decay,
        adam_beta2=0.95,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        gradient_checkpointing=config.checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if config.checkpointing else None,
        bf16=use_bfloat16(config.bfloat16),
        use_cpu=not torch.cuda.is_available(),
        group_by_length=not is_packed(network),
        include_num_input_tokens_seen="non_padding",
        prediction_loss_only=True,
        seed=config.seed,
        logging_steps=1,
        save_strategy="steps",
        save_steps=config.save_steps,
        save_total_limit=2,
        eval_strategy="steps" if stage.held_out else "no",
        eval_steps=config.save_steps,
        load_best_model_at_end=bool(config.patience and stage.held_out),
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
        report_to=["tensorboard"] if logs else [],
        logging_dir=str(logs / stage.name) if logs else None,
        remove_unused_columns=False,
    )


class _Trainer(Trainer):
    """Predicts at the targets only.

    Attributes:
        loss: `correction_loss` with its weights.
    """

    loss: Callable[..., torch.Tensor]

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """See `Trainer.get_batch_samples`; tokens of corrections and verdicts are counted apart, `[2]`."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = sum((count_targets(batch["labels"]) for batch in batches), torch.zeros(2, dtype=torch.long))
        return batches, self.accelerator.reduce(counts.to(device), "sum")

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """See `Trainer.compute_loss`."""
        labels = inputs.pop("labels")
        if "boundaries" in inputs:
            del inputs["attention_mask"]  # there only for the trainer, which counts tokens by it
        positions, targets = supervised(labels)
        head = self.accelerator.unwrap_model(model).get_output_embeddings()
        with predicting_at(head, positions):
            outputs = model(**inputs, use_cache=False)
        shares = None
        if model.training:  # gradients are averaged over processes, the step's targets are counted over all of them
            shares = self.accelerator.num_processes * count_targets(labels) / num_items_in_batch.clamp(min=1)
        loss = self.loss(outputs["logits"], targets, shares)
        return (loss, outputs) if return_outputs else loss


class _TrainerRows(Dataset[dict[str, Any]]):
    """Examples as the trainer wants them: it groups rows of like length by `input_ids`."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self._examples[index]
        return {"example": example, "input_ids": example.prompt + example.target}
