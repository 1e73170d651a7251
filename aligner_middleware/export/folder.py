"""From a checkpoint to an aligner folder; needs the `[build]` extra.

`load_cached` is what `Aligner.load` calls for a model that has a place in the cache; `export_folder` is `aligner export`.
"""

from __future__ import annotations

from pathlib import Path

from aligner_middleware.artifact import EXPORTED, MODEL_FILE, Artifact, Precision, cached_folder
from aligner_middleware.checkpoints.cache import build_once
from aligner_middleware.checkpoints.checkpoint import open_checkpoint
from aligner_middleware.data.folders import check_replaceable, write_folder
from aligner_middleware.engine.onnx import OnnxModel
from aligner_middleware.export.export import STEPS, Report, export
from aligner_middleware.text.template import PromptTemplate

__all__ = ["STEPS", "build_cached", "export_folder", "load_cached"]


def build_cached(
    model: str,
    precision: Precision,
    template: str | PromptTemplate | None = None,
    report: Report = lambda step: None,
    *,
    tried: bool = False,
) -> Path:
    """Give the cached folder of a model, exporting it first if it is not there, or damaged.

    Args:
        model: What to export.
        precision: Of the weights.
        template: The prompt; `None` for the one that belongs to it.
        report: Called with each of `STEPS` as it begins.
        tried: Also see that ONNX Runtime runs it here as it did where it was exported; it is exported anew if not.

    Raises:
        BuildError: If the model cannot be had or exported, or the cache not written; nothing is left behind then.
    """
    return load_cached(model, precision, template, report, tried=tried)[0]


def load_cached(
    model: str,
    precision: Precision,
    template: str | PromptTemplate | None = None,
    report: Report = lambda step: None,
    *,
    tried: bool = False,
) -> tuple[Path, Artifact]:
    """Do the same, and also give what stands in the folder's `aligner.json`."""
    folder = cached_folder(model, precision, template)
    loaded: list[Artifact] = []

    def check(folder: Path) -> None:
        artifact = Artifact.load(folder)
        if tried:
            artifact.tokenizer(folder)
            OnnxModel(folder / MODEL_FILE, artifact)
        loaded.append(artifact)

    def build(out: Path) -> Artifact:
        return export(open_checkpoint(model, template), out, precision, report=report)

    build_once(folder, build, EXPORTED, check)
    return folder, loaded[-1]


def export_folder(
    model: str,
    out: Path,
    precision: Precision,
    template: str | PromptTemplate | None = None,
    *,
    fused: bool = True,
    report: Report = lambda step: None,
) -> Artifact:
    """Export a model to a folder of the user's, which appears when it is whole. It replaces an aligner, and nothing else.

    Raises:
        BuildError: If the model cannot be had or exported, or the folder holds something else or cannot be written;
            nothing is written then.
    """
    check_replaceable(out, EXPORTED)
    checkpoint = open_checkpoint(model, template)
    write_folder(out, lambda made: export(checkpoint, made, precision, fused=fused, report=report), EXPORTED)
    return Artifact.load(out)
