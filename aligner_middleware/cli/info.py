"""`aligner info`: what is in an exported folder, and on which device its graph runs here."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from aligner_middleware.artifact import MODEL_FILE, Artifact, CheckpointArtifact, Described
from aligner_middleware.cli.arguments import JsonOption, ModelOption, PrecisionOption, aligner_folder
from aligner_middleware.cli.output import write, write_json
from aligner_middleware.errors import ArtifactError
from aligner_middleware.locations import merged_folder


def info(model: ModelOption = "default", precision: PrecisionOption = None, as_json: JsonOption = False) -> None:
    """Show what an exported folder holds: the one given, or a model's folder in the cache."""
    if (folder := merged_folder(model)) is not None:
        print_checkpoint(folder, CheckpointArtifact.load(folder), as_json)
    else:
        print_artifact(aligner_folder(model, precision), as_json)


def print_checkpoint(folder: Path, artifact: CheckpointArtifact, as_json: bool) -> None:
    """Print what the folder of an exported checkpoint holds."""
    if as_json:
        write_json({"folder": str(folder)} | artifact.model_dump())
        return
    table = _table(folder, artifact, f"{artifact.precision}, safetensors")
    table.add_row("runs in", f"transformers, SGLang and vLLM: vllm serve {folder}")
    table.add_row("ends with", " ".join(map(str, artifact.eos_token_ids)))
    table.add_row("verdicts", " ".join(map(str, artifact.verdict_ids or ())) or "none: it copies")
    write(table, width=0)


def print_artifact(folder: Path, as_json: bool) -> None:
    """Print what an exported folder holds.

    Raises:
        ArtifactError: If it is no aligner's folder, or is damaged.
    """
    artifact = Artifact.load(folder)
    device = _device(folder, artifact)
    if as_json:
        write_json({"folder": str(folder), "device": device} | artifact.model_dump())
        return
    table = _table(folder, artifact, f"{artifact.precision}, {artifact.graph} graph")
    table.add_row("runs on", device)
    if artifact.parity:
        parity = artifact.parity
        table.add_row("agrees with PyTorch", f"{parity.same_argmax:.1%} of {parity.tokens} tokens")
        table.add_row("largest logit difference", f"{parity.max_logit_difference:.3g}")
        table.add_row("perplexity", f"{parity.perplexity:.3f} (PyTorch {parity.reference_perplexity:.3f})")
    write(table, width=0)


def _table(folder: Path, artifact: Described, form: str) -> Table:
    table = Table(title=artifact.name, show_header=False)
    megabytes = sum((folder / name).stat().st_size for name in artifact.files) / 1e6
    table.add_row("folder", str(folder))
    table.add_row("size", f"{megabytes:.0f} MB, {form}")
    table.add_row("base", f"{artifact.base.source} {next(iter(artifact.base.sha256.values()), '')[:12]}")
    table.add_row("prompt", artifact.template.name)
    return table


def _device(folder: Path, artifact: Artifact) -> str:
    """Name the device that runs its passes, or the reason why none does."""
    from aligner_middleware.engine.onnx import OnnxModel

    try:
        return OnnxModel(folder / MODEL_FILE, artifact).device
    except ArtifactError as exc:
        return f"nothing here: {exc}"
