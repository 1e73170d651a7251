"""Train a policy's adapter for a round, on trl: DPO or SFT. An interrupted training resumes."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import PrinterCallback, set_seed
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from aligner_middleware.checkpoints.base import base_folder
from aligner_middleware.checkpoints.checkpoint import ADAPTER_CONFIG_FILE, ADAPTER_FILE
from aligner_middleware.data.disk import disk_errors
from aligner_middleware.data.files import write_text
from aligner_middleware.data.folders import FolderKind, check_owned, remove_folder, sweep, write_folder
from aligner_middleware.data.progress import Report, ignore
from aligner_middleware.training.config import POLICY_LEARNING_RATES, PolicyConfig
from aligner_middleware.training.network import load_network, lora_config, use_bfloat16
from aligner_middleware.training.policy import policy_tokenizer
from aligner_middleware.training.trainer import RUN_FILE, Reporter, last_checkpoint, run_folder

_ADAPTER = FolderKind("a policy's adapter", ADAPTER_CONFIG_FILE, (ADAPTER_FILE,))
_RUN = FolderKind("a policy's unfinished training", RUN_FILE, ("*", "*/"))  # trl may write files of any name there


def train_policy(
    rows: Sequence[dict[str, Any]],
    out: Path,
    config: PolicyConfig,
    *,
    start: Path | None = None,
    report: Report = ignore,
) -> None:
    """Train a policy's adapter for a round.

    Checkpoints go to `.<out>.run` beside `out`, and an interrupted training resumes from the last of them.

    Args:
        rows: `prompt`, `chosen` and `rejected` for DPO, `prompt` and `completion` for SFT.
        out: Folder for the adapter; it appears when the training is over.
        config: Settings of the training.
        start: Adapter of the round before, which DPO also takes as its reference; `None` for the base model itself.
        report: Called after every step, with the stage `dpo` or `sft`; and where the training resumes.

    Raises:
        BuildError: If the base model is missing, or the folder holds other files or cannot be written.
    """
    with disk_errors(out, "free some space, and repeat the command to resume"):
        disable_progress_bars()
        set_seed(config.seed)
        folder, _ = base_folder(config.base)
        shape = lora_config(config.lora_rank, config.lora_alpha, config.lora_dropout)
        network = load_network(folder, shape, start, use_bfloat16(config.bfloat16))
        checkpoints = run_folder(out)
        check_owned(checkpoints, _RUN)
        write_text(checkpoints / RUN_FILE, "{}")
        trainer = _make_trainer(network, folder, checkpoints, rows, config)
        trainer.add_callback(Reporter(config.method, report))
        _train(trainer, network, last_checkpoint(checkpoints))
        write_folder(out, lambda folder: _write_adapter(network, config.base, folder), _ADAPTER)
        remove_checkpoints(out)


def remove_checkpoints(out: Path) -> None:
    """Remove checkpoints and temporary files that a killed process may have left beside a finished adapter."""
    sweep(out.parent)
    remove_folder(run_folder(out), _RUN)


def _make_trainer(
    network: PeftModel, base: Path, checkpoints: Path, rows: Sequence[dict[str, Any]], config: PolicyConfig
) -> Any:
    settings = _settings(config, checkpoints)
    parts: dict[str, Any] = {
        "model": network,
        "train_dataset": Dataset.from_list([_without_provenance(row) for row in rows]),
        "processing_class": policy_tokenizer(base),
    }
    if config.method == "dpo":
        loss: dict[str, Any] = {
            "loss_type": ["sigmoid", "sft"],
            "loss_weights": [1.0, config.nll_weight],
            "beta": config.beta,
        }
        trainer: Any = DPOTrainer(args=DPOConfig(**settings, **loss), **parts)
    else:
        trainer = SFTTrainer(args=SFTConfig(**settings), **parts)
    trainer.pop_callback(PrinterCallback)  # it prints every log entry
    return trainer


def _settings(config: PolicyConfig, checkpoints: Path) -> dict[str, Any]:
    """Give the settings that DPO and SFT share."""
    return {
        "output_dir": str(checkpoints),
        "num_train_epochs": config.epochs,
        "max_steps": config.steps or -1,
        "learning_rate": config.learning_rate or POLICY_LEARNING_RATES[config.method],
        "lr_scheduler_type": "cosine",
        "warmup_ratio": config.warm_up_ratio,
        "per_device_train_batch_size": config.batch_size,
        "gradient_accumulation_steps": config.accumulation,
        "gradient_checkpointing": config.checkpointing,
        "bf16": use_bfloat16(config.bfloat16),
        "use_cpu": not torch.cuda.is_available(),
        "max_length": config.max_length,
        "pad_to_multiple_of": 32,  # few shapes: the CPU's kernels are compiled for each new one
        "logging_steps": 1,
        "include_num_input_tokens_seen": "non_padding",
        "save_strategy": "steps",
        "save_steps": config.save_steps,
        "save_total_limit": 2,
        "seed": config.seed,
        "disable_tqdm": True,
        "report_to": [],
    }


def _train(trainer: Any, network: PeftModel, checkpoint: str | None) -> None:
    if checkpoint:
        # Beside the copy that DPO compares with, transformers 4.57 would load that copy alone.
        set_peft_model_state_dict(network, load_file(Path(checkpoint) / ADAPTER_FILE))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of the trainer's own way to count tokens
        trainer.train(resume_from_checkpoint=checkpoint)


def _write_adapter(network: PeftModel, base: str, out: Path) -> None:
    """Write the adapter under the base model's own name, without the copy of it that DPO compares with."""
    network.save_pretrained(str(out), selected_adapters=["default"], save_embedding_layers=False)
    settings = json.loads((out / ADAPTER_CONFIG_FILE).read_text(encoding="utf-8")) | {"base_model_name_or_path": base}
    (out / ADAPTER_CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (out / "README.md").unlink(missing_ok=True)  # an empty form


def _without_provenance(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "provenance"}
