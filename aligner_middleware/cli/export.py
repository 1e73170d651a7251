"""`aligner export`: from a checkpoint or an adapter to a folder that `Aligner.load` serves."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from aligner_middleware.cli.arguments import JsonOption, PrecisionOption, precision_of
from aligner_middleware.cli.info import print_artifact
from aligner_middleware.cli.progress import showing
from aligner_middleware.errors import MissingExtraError


def export(
    model: Annotated[str, typer.Argument(help="`default`, the folder of an adapter or a checkpoint, or a hub id.")],
    out: Annotated[
        Path | None,
        typer.Argument(
            help="Folder to write. By default one in the cache, where Aligner.load finds it.", show_default=False
        ),
    ] = None,
    precision: PrecisionOption = None,
    template: Annotated[
        str | None,
        typer.Option(
            help="Prompt template: a name, or a text with {question} and {answer}. By default the model's own."
        ),
    ] = None,
    fused: Annotated[bool, typer.Option(help="Fuse operators where the graph allows it.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Make an aligner's folder: merge, export by optimum, fuse, quantise, and check against PyTorch."""
    try:
        from aligner_middleware.export.store import export_model
    except ImportError as exc:
        raise MissingExtraError("aligner export", "build") from exc
    chosen = precision_of(precision) or "int8"
    with showing(f"export {model}", "steps") as report:
        exported = export_model(model, out, chosen, template, fused=fused, verify=True, report=report)
    print_artifact(exported.folder, as_json)
