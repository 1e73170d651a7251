"""`aligner export`: from a checkpoint or an adapter to a folder that `Aligner.load` or another engine serves."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, get_args

import typer

from aligner_middleware.artifact import Precision
from aligner_middleware.cli.arguments import JsonOption, PrecisionOption, choice, precision_of
from aligner_middleware.cli.info import print_artifact, print_checkpoint
from aligner_middleware.cli.progress import showing
from aligner_middleware.errors import MissingExtraError

Form = Literal["onnx", "checkpoint"]


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
    form: Annotated[
        str,
        typer.Option(
            metavar="onnx|checkpoint",
            help="onnx is what Aligner.load serves; checkpoint is merged weights, for vLLM, SGLang and transformers.",
        ),
    ] = "onnx",
    fused: Annotated[bool, typer.Option(help="Fuse operators of the graph where it allows that.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Make an aligner's folder: merge, export by optimum, fuse, quantise, and check against PyTorch.

    With --form checkpoint the merged weights are written as they are, in float32 or float16, to OUT: a folder in the form of
    Hugging Face, with the tokenizer and an aligner.json.
    """
    chosen = precision_of(precision)
    if choice(form, get_args(Form), "--form") == "onnx":
        _export_graph(model, out, chosen, template, fused, as_json)
    elif out is None:
        raise typer.BadParameter("--form checkpoint writes to a folder of yours: name it", param_hint="OUT")
    elif not fused:
        raise typer.BadParameter("--form checkpoint has no graph: leave it out", param_hint="--no-fused")
    else:
        _export_checkpoint(model, out, chosen, template, as_json)


def _export_graph(
    model: str, out: Path | None, precision: Precision | None, template: str | None, fused: bool, as_json: bool
) -> None:
    try:
        from aligner_middleware.export.store import export_model
    except ImportError as exc:
        raise MissingExtraError("aligner export", "build") from exc
    with showing(f"export {model}", "steps") as report:
        exported = export_model(model, out, precision or "int8", template, fused=fused, verify=True, report=report)
    print_artifact(exported.folder, as_json)


def _export_checkpoint(model: str, out: Path, precision: Precision | None, template: str | None, as_json: bool) -> None:
    try:
        from aligner_middleware.export.store import export_checkpoint
    except ImportError as exc:
        raise MissingExtraError("aligner export", "build") from exc
    with showing(f"export {model}", "steps") as report:
        artifact = export_checkpoint(model, out, precision or "float32", template, report=report)
    print_checkpoint(out, artifact, as_json)
