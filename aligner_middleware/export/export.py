"""A checkpoint to an aligner folder: PyTorch, optimum's ONNX, fused, quantised, checked, written.

Every decoder-only model goes through optimum. What it gives is fused where its shape allows that, and otherwise kept as it
is; the fused graph is rewritten from optimum's own, so there is one exporter and one tokenizer to trust.
"""

from __future__ import annotations

import gc
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx

from aligner_middleware.artifact import (
    MODEL_FILE,
    TOKENIZER_FILE,
    Artifact,
    GraphKind,
    Precision,
    Weights,
    folder_of,
    sha256,
)
from aligner_middleware.checkpoints.checkpoint import Checkpoint, end_token_ids
from aligner_middleware.errors import BuildError
from aligner_middleware.export import parity
from aligner_middleware.export.fuse import NotFusable, fuse
from aligner_middleware.export.logits_to_keep import predict_at_positions
from aligner_middleware.export.parity_text import SAMPLE
from aligner_middleware.export.quantize import WEIGHTS, quantise
from aligner_middleware.export.rotate import NotRotatable
from aligner_middleware.text.template import verdict_ids
from aligner_middleware.text.tokenizer import tiktoken_is_identical

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

Report = Callable[[str], None]


def export(
    checkpoint: Checkpoint,
    out: Path,
    precision: Precision,
    *,
    fused: bool = True,
    report: Report = lambda step: None,
) -> Artifact:
    """Fill an empty folder with an aligner.

    Args:
        checkpoint: What to export.
        out: The folder; the one around it gets temporary files.
        precision: Of the weights.
        fused: Whether to fuse what can be fused.
        report: Called with each of `STEPS` as it begins.

    Raises:
        BuildError: If optimum cannot export the model, or the result is too far from it.
    """
    report(STEPS[0])
    tokenizer = checkpoint.tokenizer()
    ends = end_token_ids(checkpoint.folder, tokenizer, checkpoint.template)
    network = checkpoint.load()
    config = network.config.to_dict()
    report(STEPS[1])
    # Beside `out`, where there is as much room as for the rest, and where a killed process leaves nothing for ever.
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        _by_optimum(network, checkpoint, Path(scratch))
        report(STEPS[2])
        for wanted, weights in _attempts(precision, fused):
            model, kind = _fused_or_not(Path(scratch) / MODEL_FILE, config, wanted and fused)
            fused = kind == "fused"
            predict_at_positions(model)
            report(STEPS[3])
            try:
                with _quiet():
                    model = quantise(model, precision, weights)
            except NotRotatable as exc:
                logger.info("weights are stored in blocks, which is slower: %s", exc)
                continue
            _save(model, out / MODEL_FILE)
            del model
            gc.collect()
            report(STEPS[4])
            measured = parity.measure(network, checkpoint, out / MODEL_FILE, SAMPLE)
            if parity.holds(measured, precision) or (kind, weights) == ("standard", WEIGHTS[precision][-1]):
                break
            logger.warning(
                "the %s graph with weights as %s is too far from PyTorch: trying a slower form", kind, weights
            )
    parity.check(measured, precision)
    report(STEPS[5])
    (out / TOKENIZER_FILE).write_bytes((checkpoint.folder / TOKENIZER_FILE).read_bytes())
    heads = config["num_attention_heads"]
    artifact = Artifact(
        name=_name(checkpoint.name),
        template=checkpoint.template,
        precision=precision,
        graph=kind,
        weights=weights,
        base=checkpoint.weights,
        eos_token_ids=tuple(ends),
        layers=config["num_hidden_layers"],
        kv_heads=config.get("num_key_value_heads") or heads,
        head_size=config.get("head_dim") or config["hidden_size"] // heads,
        vocab_size=config["vocab_size"],
        max_positions=config["max_position_embeddings"],
        tiktoken=tiktoken_is_identical((out / TOKENIZER_FILE).read_text(encoding="utf-8")),
        files={path.name: sha256(path) for path in sorted(out.iterdir())},
        built_with={tool: version(tool) for tool in _TOOLS},
        parity=measured,
        probe=parity.probe(out / MODEL_FILE, tokenizer.encode(SAMPLE[0][1])),
        verdict_ids=verdict_ids(tokenizer, checkpoint.template),
        calibration=checkpoint.calibration(),
    )
    artifact.save(out)
    return artifact


def _name(model: str) -> str:
    """What to call an aligner wherever it is served: not by the path that it had here."""
    folder = folder_of(model) if model != "default" else None
    name = model if folder is None else folder.resolve().name
    return "".join(char if char.isprintable() else "?" for char in name)[:300] or "aligner"


def _by_optimum(network: PreTrainedModel, checkpoint: Checkpoint, scratch: Path) -> None:
    from optimum.exporters.onnx import onnx_export_from_model

    with _quiet():
        try:
            onnx_export_from_model(network, scratch, task="text-generation-with-past", do_validation=False)
        except Exception as exc:  # the exporter raises whatever the model's own code raises under tracing
            raise BuildError(f"optimum cannot export {checkpoint.name}: {type(exc).__name__}: {exc}") from exc


def _attempts(precision: Precision, fused: bool) -> list[tuple[bool, Weights]]:
    """List the forms to try until one holds, the fastest first: whether to fuse, and how to store weights."""
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
    for old in path.parent.glob(path.name + "*"):  # of an attempt that did not hold: external data would be added to
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
