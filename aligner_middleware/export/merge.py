"""A checkpoint to a folder in the form of Hugging Face, for vLLM, SGLang and transformers: merged, described, written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aligner_middleware.artifact import CONFIG_FILE, CheckpointArtifact, Precision
from aligner_middleware.checkpoints.checkpoint import CHECKPOINT_FILES, Checkpoint, end_token_ids
from aligner_middleware.data.files import is_file, write_text
from aligner_middleware.data.progress import Progress, Report, ignore
from aligner_middleware.errors import ConfigError
from aligner_middleware.export.describe import fields_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STEPS = ("loading the checkpoint", "writing")
MERGED_PRECISIONS: tuple[Precision, ...] = ("float32", "float16")
_TOOLS = ("torch", "transformers")
_WRITTEN_HERE = (CONFIG_FILE, "generation_config.json")
_TOKENIZER_CONFIG = "tokenizer_config.json"


def merge(
    checkpoint: Checkpoint, out: Path, precision: Precision = "float32", *, report: Report = ignore
) -> CheckpointArtifact:
    """Fill an empty folder with a checkpoint, its adapter or difference merged into the base weights.

    Args:
        checkpoint: What to write.
        out: The folder.
        precision: Of the weights: `float32`, which are those that PyTorch runs here, or `float16`.
        report: Told of each of `STEPS` when it begins.

    Raises:
        ArtifactError: If the adapter or difference cannot be used.
        BuildError: If the model cannot be loaded, or they do not fit it.
        ConfigError: If there is no checkpoint in that precision.
    """
    if precision not in MERGED_PRECISIONS:
        raise ConfigError(
            f"a checkpoint's weights are in float32 or float16, not in {precision}: choose one of them; the engine that "
            "loads the checkpoint can quantise it"
        )
    report(Progress(STEPS[0], 0, len(STEPS)))
    tokenizer = checkpoint.tokenizer()
    ends = end_token_ids(checkpoint.folder, tokenizer, checkpoint.template)
    network = checkpoint.load(precision)
    report(Progress(STEPS[1], 1, len(STEPS)))
    _write_network(network, ends, out)
    _write_tokenizer(checkpoint.folder, out)
    config = network.config.to_dict()
    artifact = CheckpointArtifact(**fields_of(checkpoint, config, tokenizer, ends, out, precision, _TOOLS))
    artifact.save(out)
    return artifact


def _write_network(network: PreTrainedModel, ends: Sequence[int], out: Path) -> None:
    """Write weights and settings; other engines stop at the tokens that end a correction, and decode greedily."""
    from transformers import GenerationConfig

    settings: Any = network.config
    before = network.generation_config
    tokens = {name: getattr(before, name, None) for name in ("bos_token_id", "pad_token_id")}
    settings.eos_token_id = list(ends)
    greedy: Any = {"eos_token_id": list(ends), "do_sample": False} | tokens
    network.generation_config = GenerationConfig(**greedy)  # type: ignore[no-untyped-call]
    network.save_pretrained(out)


def _write_tokenizer(source: Path, out: Path) -> None:
    """Copy the tokenizer's files; say what `tokenizer.json` is to transformers, where nothing does."""
    for name in CHECKPOINT_FILES:
        if name not in _WRITTEN_HERE and is_file(source / name):
            shutil.copyfile(source / name, out / name)
    if not is_file(out / _TOKENIZER_CONFIG):
        write_text(out / _TOKENIZER_CONFIG, json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}) + "\n")
