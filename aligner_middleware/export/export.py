"""A checkpoint to an aligner folder: PyTorch, optimum's ONNX, fused, quantised, checked, written.

Optimum exports every decoder-only model. Its graph is fused where the shape allows that, and otherwise stays as it is; the
fused graph is a rewrite of optimum's own, so there is one exporter and one tokenizer to trust.
"""

from __future__ import annotations

import gc
import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx

from aligner_middleware.artifact import (
    MODEL_FILE,
    TOKENIZER_FILE,
    Artifact,
    GraphKind,
    Parity,
    Precision,
    Weights,
)
from aligner_middleware.checkpoints.checkpoint import Checkpoint, end_token_ids
from aligner_middleware.data.progress import Progress, Report, ignore
from aligner_middleware.errors import BuildError
from aligner_middleware.export import parity
from aligner_middleware.export.describe import fields_of
from aligner_middleware.export.fuse import NotFusable, fuse
from aligner_middleware.export.logits_to_keep import predict_at_positions
from aligner_middleware.export.parity_text import SAMPLE
from aligner_middleware.export.quantize import WEIGHTS, quantise
from aligner_middleware.export.rotate import NotRotatable
from aligner_middleware.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

STEPS = (
    "loading the checkpoint",
    "exporting by optimum",
    "fusing",
    "quantising",
    "checking against PyTorch",
    "writing",
)
_TOOLS = ("torch", "transformers", "optimum", "optimum-onnx", "onnx", "peft")
_SINGLE_FILE = 2**31 - 2**20  # protobuf's limit; larger weights lie beside the graph


@dataclass(frozen=True)
class _Form:
    """The form in which a graph was written, and how far it is from PyTorch."""

    graph: GraphKind
    weights: Weights
    parity: Parity


def export(
    checkpoint: Checkpoint, out: Path, precision: Precision, *, fused: bool = True, report: Report = ignore
) -> Artifact:
    """Fill an empty folder with an aligner.

    Args:
        checkpoint: What to export.
        out: The folder; the one around it gets temporary files.
        precision: Of the weights.
        fused: Whether to fuse operators where the graph allows it.
        report: Told of each of `STEPS` when it begins: its name is the stage, its number from 0 what is done. Where a form
            of the graph is too far from PyTorch, the steps from fusing on are repeated for the next form.

    Raises:
        BuildError: If optimum cannot export the model, or the result is too far from it.
    """
    _begin("loading the checkpoint", report)
    tokenizer = checkpoint.tokenizer()
    ends = end_token_ids(checkpoint.folder, tokenizer, checkpoint.template)
    network = checkpoint.load()
    # Beside `out`, where there is as much room as for the rest, and which the next export clears after a killed process.
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        _begin("exporting by optimum", report)
        _by_optimum(network, checkpoint, Path(scratch))
        form = _write_graph(network, checkpoint, Path(scratch) / MODEL_FILE, out / MODEL_FILE, precision, fused, report)
    _begin("writing", report)
    (out / TOKENIZER_FILE).write_bytes((checkpoint.folder / TOKENIZER_FILE).read_bytes())
    artifact = _describe(checkpoint, network.config.to_dict(), tokenizer, ends, out, precision, form)
    artifact.save(out)
    return artifact


def _begin(step: str, report: Report) -> None:
    report(Progress(step, STEPS.index(step), len(STEPS)))


def _write_graph(
    network: PreTrainedModel,
    checkpoint: Checkpoint,
    source: Path,
    target: Path,
    precision: Precision,
    fused: bool,
    report: Report,
) -> _Form:
    """Write optimum's graph in the fastest form that is near enough to PyTorch.

    Raises:
        BuildError: If none is.
    """
    config = network.config.to_dict()
    for wanted, weights in _forms(precision, fused):
        _begin("fusing", report)
        model, kind = _fused_or_not(source, config, wanted and fused)
        fused = kind == "fused"
        predict_at_positions(model)
        _begin("quantising", report)
        try:
            with _quiet():
                model = quantise(model, precision, weights)
        except NotRotatable as exc:
            logger.info("weights are stored in blocks, which is slower: %s", exc)
            continue
        _save(model, target)
        del model
        gc.collect()
        _begin("checking against PyTorch", report)
        measured = parity.measure(network, checkpoint, target, SAMPLE)
        if parity.within_tolerance(measured, precision) or (kind, weights) == ("standard", WEIGHTS[precision][-1]):
            break
        logger.warning("the %s graph with weights as %s is too far from PyTorch: trying a slower form", kind, weights)
    parity.check(measured, precision)
    return _Form(kind, weights, measured)


def _describe(
    checkpoint: Checkpoint,
    config: dict[str, Any],
    tokenizer: Tokenizer,
    ends: Sequence[int],
    out: Path,
    precision: Precision,
    form: _Form,
) -> Artifact:
    """Describe a folder that holds the graph and the tokenizer; this runs the graph once, for the probe."""
    heads = config["num_attention_heads"]
    return Artifact(
        **fields_of(checkpoint, config, tokenizer, ends, out, precision, _TOOLS),
        graph=form.graph,
        weights=form.weights,
        layers=config["num_hidden_layers"],
        kv_heads=config.get("num_key_value_heads") or heads,
        head_size=config.get("head_dim") or config["hidden_size"] // heads,
        parity=form.parity,
        probe=parity.probe(out / MODEL_FILE, tokenizer.encode(SAMPLE[0][1])),
    )


def _by_optimum(network: PreTrainedModel, checkpoint: Checkpoint, scratch: Path) -> None:
    from optimum.exporters.onnx import onnx_export_from_model

    with _quiet():
        try:
            onnx_export_from_model(network, scratch, task="text-generation-with-past", do_validation=False)
        except Exception as exc:  # the exporter raises whatever the model's own code raises under tracing
            raise BuildError(f"optimum cannot export {checkpoint.name}: {type(exc).__name__}: {exc}") from exc


def _forms(precision: Precision, fused: bool) -> list[tuple[bool, Weights]]:
    """List the forms to try, the fastest first: whether to fuse, and how to store weights."""
    forms = WEIGHTS[precision]
    return [(fused, weights) for weights in forms] + ([(False, forms[-1])] if fused else [])


def _fused_or_not(path: Path, config: dict[str, Any], wanted: bool) -> tuple[onnx.ModelProto, GraphKind]:
    model = onnx.load(path)
    if wanted:
        try:
            fuse(model, config)
            return model, "fused"
        except NotFusable as exc:
            logger.warning("the graph stays as optimum exported it, which is slower: %s", exc)
            model = onnx.load(path)
    return model, "standard"


def _save(model: onnx.ModelProto, path: Path) -> None:
    for old in path.parent.glob(path.name + "*"):  # of a form that was rejected: external data would be appended to it
        old.unlink()
    external = model.ByteSize() > _SINGLE_FILE
    onnx.save(model, path, save_as_external_data=external, location=path.name + ".data")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the tools' notices about their own internals from the user."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
