"""Train an aligner: identity warm-up, then correction, on the trainer of transformers with peft and accelerate."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from pydantic import BaseModel
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    EarlyStoppingCallback,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from aligner_middleware.artifact import TOKENIZER_FILE, BaseWeights
from aligner_middleware.checkpoints.base import base_folder
from aligner_middleware.checkpoints.checkpoint import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    CHECKPOINT_FILES,
    RECIPE_FILE,
    RECIPE_VERSION,
    TRAINED,
    Checkpoint,
    end_token_ids,
    open_checkpoint,
    read_recipe,
)
from aligner_middleware.checkpoints.difference import DIFFERENCE_FILE, save_difference
from aligner_middleware.data.disk import disk_errors
from aligner_middleware.data.files import write_text
from aligner_middleware.data.folders import FolderKind, check_owned, check_replaceable, remove_folder, write_folder
from aligner_middleware.data.locks import exclusive_lock
from aligner_middleware.data.triples import Triple, with_identity
from aligner_middleware.errors import BuildError, DataError
from aligner_middleware.text.template import (
    TEMPLATES,
    VERDICTS,
    PromptTemplate,
    resolve_template,
    special_token_id,
    verdict_ids,
    with_verdicts,
)
from aligner_middleware.text.tokenizer import Tokenizer
from aligner_middleware.training.batches import (
    Example,
    collate,
    correction_loss,
    count_targets,
    encode_identity,
    encode_triple,
    pack,
    predicting_at,
    supervised,
    verdict_weights,
)
from aligner_middleware.training.config import LEARNING_RATES, Stage, TrainConfig
from aligner_middleware.training.packing import is_packed, use_packing
from aligner_middleware.training.trainer import (
    MemoryGuard,
    Report,
    Reporter,
    bfloat16,
    last_checkpoint,
    lora,
    train_embeddings_of,
    trainable,
)

logger = logging.getLogger(__name__)


class Recipe(BaseModel):
    """What stands in `training.json` beside an adapter, so that the run can be repeated.

    Attributes:
        config: The run's settings.
        template: The prompt that it was trained with, to be used in inference too.
        base: The weights that it started from.
        start: The weights of the aligner that it went on from; `None` where that was the base.
        rows, rows_left_out: Rows trained on, and those that were longer than `max_length`, or that have no correction
            where there are no verdicts.
        verdicts: Rows that teach each verdict.
        losses: Mean loss of the last steps of each stage, and on the held-out rows after it, in nats a token.
        devices: Processes that took part; a step has `batch_size * accumulation * devices` rows.
        versions: Of the tools.
        format_version: Of this file.
    """

    format_version: int = RECIPE_VERSION
    config: TrainConfig
    template: PromptTemplate
    base: BaseWeights
    start: BaseWeights | None = None
    rows: int
    rows_left_out: int
    verdicts: dict[str, int] = {}
    losses: dict[str, float]
    devices: int
    versions: dict[str, str]


def train(
    triples: Sequence[Triple],
    out: Path,
    config: TrainConfig | None = None,
    *,
    held_out: Sequence[Triple] = (),
    logs: Path | None = None,
    report: Report = lambda progress: None,
) -> Recipe:
    """Train an adapter, or all weights.

    Checkpoints go to the folder `.<out>.run` beside `out`. Called again with the same rows and settings, a run that was
    killed goes on from the last of them. Under `accelerate launch` every process calls this, and the first one writes.

    Args:
        triples: Rows to train on.
        out: Folder to write to: `adapter_model.safetensors` (float16) and `adapter_config.json`, a whole checkpoint, or
            `difference.safetensors`; and `training.json`. It appears when the run is over, and replaces a trained aligner,
            but nothing else.
        config: Settings of the run.
        held_out: Rows that are only scored.
        logs: Folder for TensorBoard's logs.
        report: Called after every step.

    Returns:
        What was written to `training.json`.

    Raises:
        BuildError: If the base model cannot be had, lacks a special token of the template; if `out` holds something else,
            or an unfinished run with other rows or settings lies in the way; or if they cannot be written.
        DataError: If no row is short enough to be trained on, or another process trains to `out`.
    """
    process = PartialState(cpu=not torch.cuda.is_available())
    out = out.resolve()
    run = out.with_name(f".{out.name}.run")
    with ExitStack() as stack:
        if process.is_main_process:
            check_replaceable(out, TRAINED)
            stack.enter_context(exclusive_lock(run))
        stack.enter_context(disk_errors(run, "free some space, and repeat the command to go on"))
        return _train(triples, out, run, config or TrainConfig(), held_out, logs, report)


def _train(
    triples: Sequence[Triple],
    out: Path,
    run: Path,
    config: TrainConfig,
    held_out: Sequence[Triple],
    logs: Path | None,
    report: Report,
) -> Recipe:
    set_seed(config.seed)
    process = PartialState()
    with process.main_process_first():
        folder, weights = base_folder(config.base)
        start = _start(config, weights)
    tokenizer = Tokenizer.from_file(folder / TOKENIZER_FILE)
    template = start.template if start else _template(config, tokenizer)
    end = end_token_ids(folder, tokenizer, template)[0]

    def encode(rows: Sequence[Triple]) -> list[Example]:
        encoded = (
            encode_triple(tokenizer, template, end, row, config.edit_share)
            for row in rows
            if row.correction or template.verdicts
        )
        return [example for example in encoded if len(example) <= config.max_length]

    def encode_copies(rows: Sequence[Triple]) -> list[Example]:
        encoded = (encode_identity(tokenizer, template, end, row) for row in rows)
        return [example for example in encoded if example and len(example) <= config.max_length]

    examples = encode(triples)
    if not examples:
        raise DataError("triples", 1, f"every row is longer than {config.max_length} tokens: raise max_length")
    mixed = encode(with_identity(triples, config.correction.identity_share, config.seed))
    verdicts = _weights(config, tokenizer, template, mixed)
    stages = [
        _Rows("warm_up", config.warm_up, encode_copies(triples), encode_copies(held_out), None),
        _Rows("correction", config.correction, mixed, encode(held_out), verdicts),
    ]
    with process.main_process_first():
        _claim(run, config, stages)
    losses: dict[str, float] = {}
    trained: Path | None = None
    for stage in stages:
        if stage.settings.epochs > 0 and stage.rows:
            if not (run / stage.name / _DONE).is_file():
                network = _network(folder, start, config, trained, _own_tokens(tokenizer, template))
                _run_stage(network, stage, run / stage.name, config, logs, report)
                process.wait_for_everyone()
            losses |= json.loads((run / stage.name / _DONE).read_text(encoding="utf-8"))
            trained = run / stage.name / _WEIGHTS
    if trained is None:
        raise BuildError("both stages have 0 epochs: nothing would be trained")
    recipe = Recipe(
        config=config,
        template=template,
        base=weights,
        start=start.weights if start else None,
        rows=len(examples),
        rows_left_out=len(triples) - len(examples),
        verdicts=dict(Counter(example.verdict for example in examples if example.verdict)),
        losses=losses,
        devices=process.num_processes,
        versions={package: version(package) for package in ("torch", "transformers", "peft", "accelerate")},
    )
    if process.is_main_process:
        final = trained
        write_folder(out, lambda made: _publish(final, folder, recipe, made), TRAINED)
        remove_folder(run, _RUN)
    process.wait_for_everyone()
    return recipe


_RUN_FILE = "run.json"
_RUN = FolderKind("an unfinished training run", _RUN_FILE, ("warm_up/", "correction/"))
_DONE = "done.json"
_WEIGHTS = "weights"


@dataclass(frozen=True)
class _Rows:
    """A stage with its rows, those that it is scored on, and the weights of its verdicts by their tokens."""

    name: str
    settings: Stage
    rows: list[Example]
    held_out: list[Example]
    weights: dict[int, float] | None


def _start(config: TrainConfig, base: BaseWeights) -> Checkpoint | None:
    """Open the aligner that a run goes on from."""
    if config.start is None:
        return None
    if config.method == "lora":
        raise BuildError("start= needs method 'full' or 'difference': an adapter is trained on its base model")
    checkpoint = open_checkpoint(config.start, config.template)
    made_of = checkpoint.weights.sha256
    if checkpoint.adapter is None and (checkpoint.folder / RECIPE_FILE).is_file():  # trained by us in full
        made_of = read_recipe(checkpoint.folder).base.sha256
    if made_of != base.sha256:
        raise BuildError(f"{config.start} was not made of {config.base}: name its base model as base=")
    return checkpoint


def _template(config: TrainConfig, tokenizer: Tokenizer) -> PromptTemplate:
    """Find the prompt, with verdicts if they are wanted."""
    template = resolve_template(config.template, config.base)
    wanted = config.verdict if config.verdict is not None else template == TEMPLATES["default"]
    if not wanted or template.verdicts:
        return template
    try:
        return with_verdicts(template, tokenizer, marks=config.edits == "operations")
    except BuildError as exc:
        if config.verdict:
            raise
        logger.warning("this aligner is trained to copy, without verdicts: %s", exc)
        return template


def _weights(
    config: TrainConfig, tokenizer: Tokenizer, template: PromptTemplate, examples: Sequence[Example]
) -> dict[int, float] | None:
    ids = verdict_ids(tokenizer, template)
    if ids is None:
        return None
    weights = verdict_weights(examples, config.verdict_balance)
    return {token: weights[verdict] for token, verdict in zip(ids, VERDICTS, strict=True)}


def _own_tokens(tokenizer: Tokenizer, template: PromptTemplate) -> list[int]:
    """Give the ids of verdicts and mark, which the base model has never used."""
    names = [*(template.verdicts or ()), *([template.mark] if template.mark else [])]
    return [special_token_id(tokenizer, template, name) for name in names]


def _claim(run: Path, config: TrainConfig, stages: Sequence[_Rows]) -> None:
    """Make the folder of a run, or see that the one that is there is this run's."""
    rows = hashlib.sha256(repr([(stage.rows, stage.held_out) for stage in stages]).encode()).hexdigest()
    identity = {"config": config.model_dump(mode="json"), "rows_sha256": rows}
    path = run / _RUN_FILE
    check_owned(run, _RUN)
    if not path.is_file():
        write_text(path, json.dumps(identity, indent=2))
        return
    try:
        same = json.loads(path.read_text(encoding="utf-8")) == identity
    except ValueError:
        same = False
    if not same:
        raise BuildError(
            f"{run} holds an unfinished run with other rows or settings: "
            "repeat its command to finish it, delete the folder to give it up, or write to another folder"
        )


def _network(
    base: Path, start: Checkpoint | None, config: TrainConfig, trained: Path | None, own_tokens: Sequence[int]
) -> torch.nn.Module:
    shape = (config.lora_rank, config.lora_alpha, config.lora_dropout)
    adapter = lora(*shape, own_tokens) if config.method == "lora" else None
    network: torch.nn.Module
    network = start.load() if start and not trained else trainable(base, adapter, trained, bfloat16(config.bfloat16))
    use_packing(network)
    if config.method == "difference":
        train_embeddings_of(network, own_tokens)
    return network


def _run_stage(
    model: torch.nn.Module, stage: _Rows, folder: Path, config: TrainConfig, logs: Path | None, report: Report
) -> None:
    """Run a stage from its beginning or its last checkpoint, and leave weights and losses in its folder."""
    stoppers = [EarlyStoppingCallback(config.patience)] if config.patience and stage.held_out else []
    packed = is_packed(model)
    guard, single = MemoryGuard(), PartialState().num_processes == 1
    trainer = _Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            num_train_epochs=stage.settings.epochs,
            learning_rate=stage.settings.learning_rate or LEARNING_RATES[config.method],
            lr_scheduler_type=stage.settings.schedule
            if stage.settings.schedule != "constant"
            else "constant_with_warmup",
            warmup_ratio=config.warm_up_ratio,
            weight_decay=config.weight_decay,
            adam_beta2=0.95,
            per_device_train_batch_size=config.batch_size,
            per_device_eval_batch_size=config.batch_size,
            gradient_accumulation_steps=config.accumulation,
            gradient_checkpointing=config.checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False} if config.checkpointing else None,
            bf16=bfloat16(config.bfloat16),
            use_cpu=not torch.cuda.is_available(),
            group_by_length=not packed,
            include_num_input_tokens_seen="non_padding",
            prediction_loss_only=True,
            seed=config.seed,
            logging_steps=1,
            save_strategy="steps",
            save_steps=config.save_steps,
            save_total_limit=2,
            eval_strategy="steps" if stage.held_out else "no",
            eval_steps=config.save_steps,
            load_best_model_at_end=bool(stoppers),
            disable_tqdm=True,
            ddp_find_unused_parameters=False,
            report_to=["tensorboard"] if logs else [],
            logging_dir=str(logs / stage.name) if logs else None,
            remove_unused_columns=False,
        ),
        train_dataset=_TrainerRows(stage.rows),
        eval_dataset=_TrainerRows(stage.held_out) if stage.held_out else None,
        data_collator=lambda rows: (pack if packed else collate)([row["example"] for row in rows]),
        callbacks=[Reporter(stage.name, report), *stoppers, *([guard] if single else [])],
    )
    trainer.model_accepts_loss_kwargs = True  # the loss is given the number of targets in the step
    trainer.loss = partial(
        correction_loss,
        decision_weight=config.decision_weight,
        verdict_weight=config.verdict_weight,
        weights=stage.weights,
    )
    trainer.pop_callback(PrinterCallback)  # it prints every log entry
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of the trainer's own way to count tokens
        trainer.train(resume_from_checkpoint=last_checkpoint(folder))
    if guard.exceeded:
        raise BuildError(
            f"this process held nearly all memory after step {trainer.state.global_step} of {trainer.state.max_steps}, and "
            "ended before it would be killed: repeat the command to go on from there, with a smaller batch_size or with "
            "jemalloc (docs/training.md) if it happens again"
        )
    recent = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-20:]
    losses = {stage.name: sum(recent) / len(recent)}
    if stage.held_out:
        losses[f"{stage.name}_held_out"] = trainer.evaluate()["eval_loss"]
    trainer.save_model(str(folder / _WEIGHTS))
    if trainer.is_world_process_zero():
        write_text(folder / _DONE, json.dumps(losses))


def _publish(trained: Path, base: Path, recipe: Recipe, out: Path) -> None:
    """Write what users take away: an adapter in float16, or a checkpoint that loads like any other."""
    if recipe.config.method == "lora":
        weights = {name: value.half() for name, value in load_file(trained / ADAPTER_FILE).items()}
        save_file(weights, out / ADAPTER_FILE)
        settings = json.loads((trained / ADAPTER_CONFIG_FILE).read_text(encoding="utf-8"))
        settings |= {"base_model_name_or_path": recipe.config.base, "inference_mode": True}
        (out / ADAPTER_CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    elif recipe.config.method == "difference":
        start = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).state_dict()
        end = AutoModelForCausalLM.from_pretrained(trained, dtype=torch.float32)
        weights = {name: weight.detach() for name, weight in end.named_parameters()}
        save_difference(weights, start, recipe.config.difference_bits, out / DIFFERENCE_FILE)
    else:
        for path in [base / name for name in CHECKPOINT_FILES if (base / name).is_file()]:
            shutil.copy(path, out)
        for path in [*trained.glob("*.safetensors"), *trained.glob("*.index.json"), trained / "config.json"]:
            shutil.copy(path, out)
    (out / RECIPE_FILE).write_text(recipe.model_dump_json(indent=2) + "\n", encoding="utf-8")


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
        places, targets = supervised(labels)
        head = self.accelerator.unwrap_model(model).get_output_embeddings()
        with predicting_at(head, places):
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
