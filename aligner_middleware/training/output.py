"""The files of a trained aligner: an adapter, a compact difference or a whole checkpoint, with its recipe."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from aligner_middleware.checkpoints.checkpoint import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    CHECKPOINT_FILES,
    RECIPE_FILE,
)
from aligner_middleware.checkpoints.difference import DIFFERENCE_FILE, save_difference
from aligner_middleware.training.recipe import Recipe


def write_trained(trained: Path, base: Path, recipe: Recipe, out: Path) -> None:
    """Write a trained aligner to a folder.

    Args:
        trained: Folder of the last stage's weights.
        base: The base model's folder.
        recipe: Of the run; its method decides which files are written.
        out: An empty folder.
    """
    if recipe.config.method == "lora":
        _write_adapter(trained, recipe.config.base, out)
    elif recipe.config.method == "difference":
        _write_difference(trained, base, recipe.config.difference_bits, out)
    else:
        _write_checkpoint(trained, base, out)
    (out / RECIPE_FILE).write_text(recipe.model_dump_json(indent=2) + "\n", encoding="utf-8")


def _write_adapter(trained: Path, base: str, out: Path) -> None:
    """Write an adapter in float16, under the base model's own name."""
    weights = {name: value.half() for name, value in load_file(trained / ADAPTER_FILE).items()}
    save_file(weights, out / ADAPTER_FILE)
    settings = json.loads((trained / ADAPTER_CONFIG_FILE).read_text(encoding="utf-8"))
    settings |= {"base_model_name_or_path": base, "inference_mode": True}
    (out / ADAPTER_CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _write_difference(trained: Path, base: Path, bits: int, out: Path) -> None:
    before = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).state_dict()
    after = AutoModelForCausalLM.from_pretrained(trained, dtype=torch.float32)
    weights = {name: weight.detach() for name, weight in after.named_parameters()}
    save_difference(weights, before, bits, out / DIFFERENCE_FILE)


def _write_checkpoint(trained: Path, base: Path, out: Path) -> None:
    """Copy the trained weights beside the base model's tokenizer and settings."""
    for path in [base / name for name in CHECKPOINT_FILES if (base / name).is_file()]:
        shutil.copy(path, out)
    for path in [*trained.glob("*.safetensors"), *trained.glob("*.index.json"), trained / "config.json"]:
        shutil.copy(path, out)
