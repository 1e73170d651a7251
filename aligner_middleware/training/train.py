"""Train an aligner: identity warm-up, then correction, with LoRA by peft on the trainer of transformers."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from pydantic import BaseModel
from safetensors.torch import save_file
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from aligner_middleware.artifact import TOKENIZER_FILE, BaseWeights
from aligner_middleware.build.base import base_folder
from aligner_middleware.build.cache import write_folder
from aligner_middleware.build.checkpoint import ADAPTER_FILE, RECIPE_FILE, end_token_ids
from aligner_middleware.errors import DataError
from aligner_middleware.prompt import PromptTemplate, resolve_template
from aligner_middleware.tokenizer import Tokenizer
from aligner_middleware.training.batches import Example, collate, encode_triple
from aligner_middleware.training.config import Stage, TrainConfig
from aligner_middleware.training.triples import Triple


@dataclass(frozen=True)
class Progress:
    """Where a run is.

    Attributes:
        stage: `warm_up` or `correction`.
        step, steps: Optimiser steps done and to do in it.
        loss: Of the latest step, in nats a token.
        tokens: Prompt and target tokens seen in it.
    """

    stage: str
    step: int
    steps: int
    loss: float
    tokens: int


Report = Callable[[Progress], None]


class Recipe(BaseModel):
    """What stands in `training.json` beside an adapter, so that the run can be repeated.

    Attributes:
        config: The run's settings.
        template: The prompt that it was trained with, to be used in inference too.
        base: The weights that it started from.
        rows, rows_left_out: Rows trained on, and those that were longer than `max_length`.
        losses: Mean loss of the last steps of each stage, and on the held-out rows after it, in nats a token.
        versions: Of the tools.
    """

    config: TrainConfig
    template: PromptTemplate
    base: BaseWeights
    rows: int
    rows_left_out: int
    losses: dict[str, float]
    versions: dict[str, str]


def train(
    triples: Sequence[Triple],
    out: Path,
    config: TrainConfig | None = None,
    *,
    held_out: Sequence[Triple] = (),
    report: Report = lambda progress: None,
) -> Recipe:
    """Train an adapter.

    Args:
        triples: Rows to train on.
        out: Folder to write `adapter_model.safetensors` (float16), `adapter_config.json` and `training.json` to. It
            appears when the run is over, and replaces what stood there.
        config: Settings of the run.
        held_out: Rows that are only scored.
        report: Called after every step.

    Returns:
        What was written to `training.json`.

    Raises:
        BuildError: If the base model cannot be had, or lacks a special token of the template.
        DataError: If no row is short enough to be trained on.
    """
    config = config or TrainConfig()
    set_seed(config.seed)
    folder, weights = base_folder(config.base)
    template = resolve_template(config.template, config.base)
    tokenizer = Tokenizer.from_file(folder / TOKENIZER_FILE)
    end = end_token_ids(folder, tokenizer, template)[0]

    def encode(rows: Sequence[Triple]) -> list[Example]:
        encoded = (encode_triple(tokenizer, template, end, row) for row in rows)
        return [example for example in encoded if len(example) <= config.max_length]

    examples = encode(triples)
    if not examples:
        raise DataError("triples", 1, f"every row is longer than {config.max_length} tokens: raise max_length")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), _lora(config))
    stages = [
        (
            "warm_up",
            config.warm_up,
            encode([row.identity() for row in triples]),
            encode([row.identity() for row in held_out]),
        ),
        ("correction", config.correction, examples, encode(held_out)),
    ]
    losses: dict[str, float] = {}
    for name, stage, rows, unseen in stages:
        if stage.epochs > 0:
            losses |= _run_stage(model, name, stage, rows, unseen, config, report)
    recipe = Recipe(
        config=config,
        template=template,
        base=weights,
        rows=len(examples),
        rows_left_out=len(triples) - len(examples),
        losses=losses,
        versions={package: version(package) for package in ("torch", "transformers", "peft")},
    )
    write_folder(out, lambda made: _save(model, recipe, made))
    return recipe


def _lora(config: TrainConfig) -> LoraConfig:
    return LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


def _run_stage(
    model: torch.nn.Module,
    name: str,
    stage: Stage,
    rows: Sequence[Example],
    unseen: Sequence[Example],
    config: TrainConfig,
    report: Report,
) -> dict[str, float]:
    """Run one stage over the model, in place, and give its losses."""
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=scratch,
                num_train_epochs=stage.epochs,
                learning_rate=stage.learning_rate,
                lr_scheduler_type="cosine",
                warmup_ratio=config.warm_up_ratio,
                weight_decay=0.0,
                adam_beta2=0.95,
                per_device_train_batch_size=config.batch_size,
                per_device_eval_batch_size=config.batch_size,
                bf16=True,
                use_cpu=not torch.cuda.is_available(),
                group_by_length=True,
                length_column_name="length",
                include_num_input_tokens_seen="non_padding",
                seed=config.seed,
                logging_steps=1,
                save_strategy="no",
                disable_tqdm=True,
                report_to=[],
                remove_unused_columns=False,
            ),
            train_dataset=_Rows(rows),
            eval_dataset=_Rows(unseen) if unseen else None,
            data_collator=lambda batch: collate([row["example"] for row in batch]),
            callbacks=[_Reporter(name, report)],
        )
        trainer.pop_callback(PrinterCallback)  # it prints every log entry
        trainer.train()
        recent = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-20:]
        losses = {name: sum(recent) / len(recent) if recent else math.nan}
        if unseen:
            losses[f"{name}_held_out"] = trainer.evaluate()["eval_loss"]
    return losses


def _save(model: Any, recipe: Recipe, folder: Path) -> None:
    weights = {name: value.half().contiguous() for name, value in get_peft_model_state_dict(model).items()}
    save_file(weights, folder / ADAPTER_FILE)
    settings = model.peft_config["default"]
    settings.inference_mode = True
    settings.base_model_name_or_path = recipe.config.base
    settings.save_pretrained(folder)
    (folder / RECIPE_FILE).write_text(recipe.model_dump_json(indent=2) + "\n", encoding="utf-8")


class _Rows(Dataset[dict[str, Any]]):
    """Examples as the trainer wants them; it groups rows of like length by `length`."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self._examples = examples
        self.column_names = ["example", "length"]

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: Any) -> Any:
        if index == "length":
            return [len(example) for example in self._examples]
        return {
            "example": self._examples[index],
            "input_ids": self._examples[index].prompt + self._examples[index].target,
        }


class _Reporter(TrainerCallback):
    """Tells `report` of every step."""

    def __init__(self, stage: str, report: Report) -> None:
        self._stage = stage
        self._report = report

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if logs and "loss" in logs:
            tokens = int(state.num_input_tokens_seen)
            self._report(Progress(self._stage, state.global_step, state.max_steps, float(logs["loss"]), tokens))
