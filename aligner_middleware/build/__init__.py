"""From a checkpoint to an aligner folder; needs the `[build]` extra.

`build_cached` is what `Aligner.load` calls for a model that is not in the cache yet; `export_folder` is `aligner export`.
"""

from __future__ import annotations

from pathlib import Path

from aligner_middleware.artifact import Artifact, Precision, cached_folder
from aligner_middleware.build.cache import build_once, write_folder
from aligner_middleware.build.checkpoint import open_checkpoint
from aligner_middleware.build.export import STEPS, Report, export
from aligner_middleware.prompt import PromptTemplate

__all__ = ["STEPS", "build_cached", "export_folder"]


def build_cached(
    model: str, precision: Precision, template: str | PromptTemplate | None = None, report: Report = lambda step: None
) -> Path:
    """Give the cached folder of a model, exporting it first if it is not there.

    Raises:
        BuildError: If the model cannot be had or exported; nothing is left behind then.
    """
    folder = cached_folder(model, precision, template)
    if not folder.is_dir():
        build_once(folder, lambda out: export(open_checkpoint(model, template), out, precision, report=report))
    return folder


def export_folder(
    model: str,
    out: Path,
    precision: Precision,
    template: str | PromptTemplate | None = None,
    *,
    fused: bool = True,
    report: Report = lambda step: None,
) -> Artifact:
    """Export a model to a folder of the user's, which appears when it is whole and replaces what stood there.

    Raises:
        BuildError: If the model cannot be had or exported; nothing is written then.
    """
    checkpoint = open_checkpoint(model, template)
    write_folder(out, lambda made: export(checkpoint, made, precision, fused=fused, report=report))
    return Artifact.load(out)
