"""Train an aligner: identity warm-up, then correction. An interrupted run resumes from its last checkpoint."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import set_seed

from aligner_middleware.checkpoints.checkpoint import TRAINED
from aligner_middleware.data.disk import disk_errors
from aligner_middleware.data.files import write_text
from aligner_middleware.data.folders import FolderKind, check_owned, check_replaceable, remove_folder, write_folder
from aligner_middleware.data.locks import exclusive_lock
from aligner_middleware.data.progress import Report, ignore
from aligner_middleware.data.triples import Triple
from aligner_middleware.errors import ConfigError
from aligner_middleware.training.config import TrainConfig
from aligner_middleware.training.encoding import EncodedRows, StageData, encode_rows
from aligner_middleware.training.origin import Origin
from aligner_middleware.training.output import write_trained
from aligner_middleware.training.recipe import Recipe, tool_versions
from aligner_middleware.training.stages import run_stage, stage_losses, stage_weights
from aligner_middleware.training.trainer import RUN_FILE, run_folder

_RECORDED = 100  # instructions
_RUN = FolderKind("an unfinished training run", RUN_FILE, ("warm_up/", "correction/"))


def train(
    triples: Sequence[Triple],
    out: Path,
    config: TrainConfig | None = None,
    *,
    held_out: Sequence[Triple] = (),
    logs: Path | None = None,
    report: Report = ignore,
) -> Recipe:
    """Train an adapter, or all weights.

    Checkpoints go to the folder `.<out>.run` beside `out`. Called again with the same rows and settings, an interrupted run
    resumes from the last of them. Under `accelerate launch` every process calls this, and the first one writes.

    Args:
        triples: Rows to train on.
        out: Folder to write to: `adapter_model.safetensors` (float16) and `adapter_config.json`, a whole checkpoint, or
            `difference.safetensors`; and `training.json`. It appears when the run is over, and replaces a trained aligner,
            but nothing else.
        config: Settings of the run.
        held_out: Rows that are only scored.
        logs: Folder for TensorBoard's logs.
        report: Called after every step, with the stage `warm_up` or `correction` and its steps; and where a stage resumes.

    Returns:
        The record that was written to `training.json`.

    Raises:
        BuildError: If the base model is missing, or lacks a special token of the template; if `out` holds other files, or
            cannot be written.
        ConfigError: If settings do not fit together or leave nothing to train; if no row can be trained on; if `.<out>.run`
            holds an unfinished run with other rows or settings.
        JobError: If another process trains to `out`.
    """
    process = PartialState(cpu=not torch.cuda.is_available())
    out = out.resolve()
    folder = run_folder(out)
    with ExitStack() as stack:
        if process.is_main_process:
            check_replaceable(out, TRAINED)
            stack.enter_context(exclusive_lock(folder))
        stack.enter_context(disk_errors(folder, "free some space, and repeat the command to resume"))
        return _Run(out, folder, config or TrainConfig(), logs, report).train(triples, held_out)


@dataclass(frozen=True)
class _Run:
    """A training run.

    Attributes:
        out: Folder for the trained aligner.
        folder: Folder for checkpoints.
        config, logs, report: As in `train`.
    """

    out: Path
    folder: Path
    config: TrainConfig
    logs: Path | None
    report: Report

    def train(self, triples: Sequence[Triple], held_out: Sequence[Triple]) -> Recipe:
        """Run the stages that are not finished, and write the aligner."""
        set_seed(self.config.seed)
        process = PartialState()
        with process.main_process_first():
            origin = Origin.open(self.config, instructions=[bool(row.instruction) for row in (*triples, *held_out)])
        rows = encode_rows(origin, self.config, triples, held_out)
        with process.main_process_first():
            self._claim_folder(rows.stages)
        losses, trained = self._run_stages(origin, rows.stages)
        recipe = self._recipe(origin, rows, triples, losses)
        if process.is_main_process:
            write_folder(self.out, lambda folder: write_trained(trained, origin.folder, recipe, folder), TRAINED)
            remove_folder(self.folder, _RUN)
        process.wait_for_everyone()
        return recipe

    def _claim_folder(self, stages: Sequence[StageData]) -> None:
        """Make the folder for checkpoints, or check that the existing one belongs to this run."""
        examples = repr([(stage.examples, stage.held_out) for stage in stages])
        rows = hashlib.sha256(examples.encode()).hexdigest()
        identity = {"config": self.config.model_dump(mode="json"), "rows_sha256": rows}
        path = self.folder / RUN_FILE
        check_owned(self.folder, _RUN)
        if not path.is_file():
            write_text(path, json.dumps(identity, indent=2))
            return
        try:
            same = json.loads(path.read_text(encoding="utf-8")) == identity
        except ValueError:
            same = False
        if not same:
            raise ConfigError(
                f"{self.folder} holds an unfinished run with other rows or settings: "
                "repeat its command to finish it, delete the folder to give it up, or write to another folder"
            )

    def _run_stages(self, origin: Origin, stages: Sequence[StageData]) -> tuple[dict[str, float], Path]:
        """Run the stages; give their losses, and the folder of the last one's weights."""
        losses: dict[str, float] = {}
        trained: Path | None = None
        for stage in stages:
            if not (stage.settings.epochs > 0 and stage.examples):
                continue
            folder = self.folder / stage.name
            if stage_losses(folder) is None:
                network = origin.network(self.config, trained)
                run_stage(network, stage, folder, self.config, self.logs, self.report)
                PartialState().wait_for_everyone()
            losses |= stage_losses(folder) or {}
            trained = stage_weights(folder)
        if trained is None:
            raise ConfigError("no stage trains anything: give the correction stage more than 0 epochs")
        return losses, trained

    def _recipe(self, origin: Origin, rows: EncodedRows, triples: Sequence[Triple], losses: dict[str, float]) -> Recipe:
        return Recipe(
            config=self.config,
            template=origin.template,
            base=origin.weights,
            start=origin.start.weights if origin.start else None,
            rows=len(rows.examples),
            rows_left_out=len(triples) - len(rows.examples),
            verdicts=dict(Counter(example.verdict for example in rows.examples if example.verdict)),
            instructions=dict(Counter(row.instruction for row in triples if row.instruction).most_common(_RECORDED)),
            losses=losses,
            devices=PartialState().num_processes,
            versions=tool_versions(),
        )
