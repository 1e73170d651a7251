"""The fields that every `aligner.json` has, whatever form the weights beside it have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from aligner_middleware.artifact import TOKENIZER_FILE, Precision
from aligner_middleware.checkpoints.checkpoint import Checkpoint
from aligner_middleware.data.checked import sha256
from aligner_middleware.locations import folder_of
from aligner_middleware.text.template import verdict_ids
from aligner_middleware.text.tokenizer import Tokenizer, tiktoken_is_identical


def fields_of(
    checkpoint: Checkpoint,
    config: Mapping[str, Any],
    tokenizer: Tokenizer,
    ends: Sequence[int],
    out: Path,
    precision: Precision,
    tools: Sequence[str],
) -> dict[str, Any]:
    """Describe a folder that holds everything but its `aligner.json`.

    Args:
        checkpoint: What it was made from.
        config: The model's `config.json`.
        tokenizer: Its tokenizer.
        ends: Tokens that end a correction.
        out: The folder, whose files are hashed.
        precision: Of the weights in it.
        tools: Packages that made it.

    Returns:
        The fields of `artifact.Described`, by name.
    """
    return {
        "name": _name(checkpoint.name),
        "template": checkpoint.template,
        "precision": precision,
        "base": checkpoint.weights,
        "eos_token_ids": tuple(ends),
        "vocab_size": config["vocab_size"],
        "max_positions": config["max_position_embeddings"],
        "tiktoken": tiktoken_is_identical((out / TOKENIZER_FILE).read_text(encoding="utf-8")),
        "files": {path.name: sha256(path) for path in sorted(out.iterdir())},
        "built_with": {tool: version(tool) for tool in tools},
        "verdict_ids": verdict_ids(tokenizer, checkpoint.template),
        "calibration": checkpoint.calibration(),
    }


def _name(model: str) -> str:
    """Name an aligner for wherever it is served: without the path that it had on this machine."""
    folder = folder_of(model) if model != "default" else None
    name = model if folder is None else folder.resolve().name
    return "".join(char if char.isprintable() else "?" for char in name)[:300] or "aligner"
