"""Where exported aligners are kept: in the cache, or in a folder that the user names. Needs the `[build]` extra."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from aligner_middleware.artifact import EXPORTED, MODEL_FILE, Artifact, CheckpointArtifact, Precision
from aligner_middleware.checkpoints.cache import build_once
from aligner_middleware.checkpoints.checkpoint import MERGED, open_checkpoint
from aligner_middleware.data.folders import check_replaceable, write_folder
from aligner_middleware.data.progress import Report, ignore
from aligner_middleware.engine.onnx import OnnxModel
from aligner_middleware.errors import ConfigError
from aligner_middleware.export.export import export
from aligner_middleware.export.merge import merge
from aligner_middleware.locations import cached_folder
from aligner_middleware.text.template import PromptTemplate


class Exported(NamedTuple):
    """An aligner folder, and the content of its `aligner.json`."""

    folder: Path
    artifact: Artifact


def export_model(
    model: str,
    out: Path | None = None,
    precision: Precision = "int8",
    template: str | PromptTemplate | None = None,
    *,
    fused: bool = True,
    verify: bool = False,
    report: Report = ignore,
) -> Exported:
    """Export a model to the cache, or to a folder of the user's; either appears when it is complete.

    The cache keeps what it has: a model is exported into it only if its folder is missing or damaged. A folder of the
    user's is written in any case; it replaces an exported aligner, and nothing else.

    Args:
        model: `default`, the folder of an adapter or a checkpoint, or a hub id.
        out: The folder to write; `None` for the cache.
        precision: Of the weights.
        template: The prompt; `None` for the one that the model was trained with.
        fused: Whether to fuse operators where the graph allows it; the cache holds fused graphs only.
        verify: Whether to run a cached graph here once, and to export it anew if its results differ from those recorded.
        report: Told of each of `export.STEPS` when it begins: its name is the stage, its number from 0 what is done.

    Raises:
        BuildError: If the model cannot be found or exported, or the folder cannot be written or holds anything else; then
            nothing is left behind.
        ConfigError: If `fused=False` is to go to the cache.
    """
    if out is not None:
        return _to_folder(model, out, precision, template, fused, report)
    if not fused:
        raise ConfigError("the cache holds fused graphs only: name a folder to write the graph that is not fused to")
    return _to_cache(model, precision, template, verify, report)


def export_checkpoint(
    model: str,
    out: Path,
    precision: Precision = "float32",
    template: str | PromptTemplate | None = None,
    *,
    report: Report = ignore,
) -> CheckpointArtifact:
    """Write a model's merged checkpoint, which vLLM, SGLang and transformers load, to a folder of the user's.

    The folder is written whole or not at all; it replaces an exported checkpoint, and nothing else.

    Args:
        model: `default`, the folder of an adapter or a checkpoint, or a hub id.
        out: The folder to write.
        precision: Of the weights: `float32` or `float16`.
        template: The prompt; `None` for the one that the model was trained with.
        report: Told of each of `merge.STEPS` when it begins: its name is the stage, its number from 0 what is done.

    Raises:
        BuildError: If the model cannot be found or loaded, or the folder cannot be written or holds anything else; then
            nothing is left behind.
        ConfigError: If there is no checkpoint in that precision.
    """
    check_replaceable(out, MERGED)
    checkpoint = open_checkpoint(model, template)
    write_folder(out, lambda new: merge(checkpoint, new, precision, report=report), MERGED)
    return CheckpointArtifact.load(out)


def _to_folder(
    model: str, out: Path, precision: Precision, template: str | PromptTemplate | None, fused: bool, report: Report
) -> Exported:
    check_replaceable(out, EXPORTED)
    checkpoint = open_checkpoint(model, template)
    write_folder(out, lambda new: export(checkpoint, new, precision, fused=fused, report=report), EXPORTED)
    return Exported(out, Artifact.load(out))


def _to_cache(
    model: str, precision: Precision, template: str | PromptTemplate | None, verify: bool, report: Report
) -> Exported:
    folder = cached_folder(model, precision, template)
    loaded: list[Artifact] = []

    def check(folder: Path) -> None:
        artifact = Artifact.load(folder)
        if verify:
            artifact.tokenizer(folder)
            OnnxModel(folder / MODEL_FILE, artifact)
        loaded.append(artifact)

    def build(new: Path) -> Artifact:
        return export(open_checkpoint(model, template), new, precision, report=report)

    build_once(folder, build, EXPORTED, check)
    return Exported(folder, loaded[-1])
