"""Compares an exported graph with the PyTorch model that it came from: their logits on the same real text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from aligner_middleware.artifact import (
    MODEL_FILE,
    TOKENIZER_FILE,
    Artifact,
    Parity,
    Precision,
    Probe,
)
from aligner_middleware.checkpoints.checkpoint import Checkpoint, end_token_ids
from aligner_middleware.engine.model import log_probabilities
from aligner_middleware.engine.onnx_session import session_options
from aligner_middleware.errors import BuildError
from aligner_middleware.text.targets import encode_target
from aligner_middleware.text.template import PromptTemplate, encode_prompt
from aligner_middleware.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TOP = 16  # logits of a probe
# (smallest share of equal arg max, largest rise of perplexity): float32 differs by rounding only; the others were measured
# on the default aligner with room to spare (benchmarks/README.md): in int8 it agrees on 94.4 % of 2,072 tokens, and the few
# hundred of the sample give that share with a standard error of a point.
_TOLERANCE: dict[Precision, tuple[float, float]] = {
    "float32": (0.995, 0.001),
    "float16": (0.98, 0.01),
    "int8": (0.91, 0.05),
    "int4": (0.75, 0.40),
}


def measure(
    network: PreTrainedModel, checkpoint: Checkpoint, graph: Path, triples: Sequence[tuple[str, str, str]]
) -> Parity:
    """Compare a graph with the network that it was exported from, under teacher forcing.

    Args:
        network: The PyTorch model in float32.
        checkpoint: Where it came from.
        graph: The `model.onnx`.
        triples: Questions, answers and corrections; at the corrections' tokens logits are compared.
    """
    session = ort.InferenceSession(graph, session_options(), providers=["CPUExecutionProvider"])
    differences, agreements, losses, references = [], [], [], []
    end = end_token_ids(checkpoint.folder, checkpoint.tokenizer(), checkpoint.template)[0]
    for ids, count in encode(checkpoint.tokenizer(), checkpoint.template, end, triples):
        expected = _torch_logits(network, ids, count)
        found = _onnx_logits(session, ids, count)
        targets = np.asarray(ids[-count:])
        differences.append(float(np.abs(found - expected).max()))
        agreements.append(found.argmax(-1) == expected.argmax(-1))
        losses.append(_nll(found, targets))
        references.append(_nll(expected, targets))
    return Parity(
        max_logit_difference=max(differences),
        same_argmax=float(np.concatenate(agreements).mean()),
        perplexity=float(np.exp(np.concatenate(losses).mean())),
        reference_perplexity=float(np.exp(np.concatenate(references).mean())),
        tokens=sum(map(len, losses)),
    )


def within_tolerance(parity: Parity, precision: Precision) -> bool:
    """Whether a graph is near enough to the PyTorch model."""
    share, rise = _TOLERANCE[precision]
    return parity.same_argmax >= share and parity.perplexity <= parity.reference_perplexity * (1 + rise)


def check(parity: Parity, precision: Precision) -> None:
    """Refuse a graph that has drifted too far.

    Raises:
        BuildError: With the figures and the tolerance.
    """
    share, rise = _TOLERANCE[precision]
    allowed = parity.reference_perplexity * (1 + rise)
    if not within_tolerance(parity, precision):
        raise BuildError(
            f"the {precision} graph is too far from the PyTorch model: it agrees on {parity.same_argmax:.1%} of "
            f"{parity.tokens} tokens (at least {share:.1%} expected), with perplexity {parity.perplexity:.3f} (at most "
            f"{allowed:.3f} expected): nothing was written; export a higher precision"
        )


def probe(graph: Path, tokens: Sequence[int]) -> Probe:
    """Record the largest logits of a graph after a text, which `OnnxModel` compares with its own."""
    session = ort.InferenceSession(graph, session_options(), providers=["CPUExecutionProvider"])
    logits = _onnx_logits(session, [*tokens, 0], 1)[0]
    top = np.argsort(-logits)[:_TOP]
    return Probe(tokens=tuple(tokens), top=tuple(map(int, top)), logits=tuple(map(float, logits[top])))


def perplexity(folder: Path, triples: Sequence[tuple[str, ...]]) -> float:
    """Perplexity of corrections and their end tokens, given question and answer, under an exported aligner.

    Args:
        folder: The aligner's.
        triples: Questions, answers, corrections, and maybe instructions.
    """
    artifact = Artifact.load(folder)
    session = ort.InferenceSession(folder / MODEL_FILE, session_options(), providers=["CPUExecutionProvider"])
    tokenizer = Tokenizer.from_file(folder / TOKENIZER_FILE)
    rows = encode(tokenizer, artifact.template, artifact.eos_token_ids[0], triples)
    losses = [_nll(_onnx_logits(session, ids, count), np.asarray(ids[-count:])) for ids, count in rows]
    return float(np.exp(np.concatenate(losses).mean()))


def encode(
    tokenizer: Tokenizer, template: PromptTemplate, end_token_id: int, triples: Sequence[tuple[str, ...]]
) -> list[tuple[list[int], int]]:
    """Encode questions, answers and corrections as prompt and target, with the number of tokens that are scored."""
    rows = []
    for question, answer, correction, *instruction in triples:
        target = encode_target(tokenizer, template, end_token_id, answer, correction).ids
        rows.append(([*encode_prompt(tokenizer, template, question, answer, *instruction), *target], len(target)))
    return rows


def _torch_logits(network: PreTrainedModel, ids: Sequence[int], count: int) -> NDArray[np.float32]:
    """Logits at the positions that predict the last `count` tokens, `[count, V]`."""
    import torch

    with torch.inference_mode():
        output = network(input_ids=torch.tensor([list(ids)]), logits_to_keep=count + 1).logits
    result: NDArray[np.float32] = output[0, :-1].float().numpy()
    return result


def _onnx_logits(session: Any, ids: Sequence[int], count: int) -> NDArray[np.float32]:
    length = len(ids)
    feed: dict[str, NDArray[Any]] = {
        "input_ids": np.array([ids], dtype=np.int64),
        "positions": np.arange(length - count - 1, length - 1, dtype=np.int64)[None],
        "attention_mask": np.ones((1, length), dtype=np.int64),
        "position_ids": np.arange(length, dtype=np.int64)[None],
        "seqlens_k": np.array([length - 1], dtype=np.int32),
        "total_sequence_length": np.array(length, dtype=np.int32),
    }
    inputs = {value.name: value for value in session.get_inputs()}
    for name, value in inputs.items():
        if name.startswith("past_key_values"):
            dtype = np.float16 if value.type == "tensor(float16)" else np.float32
            feed[name] = np.zeros((1, value.shape[1], 0, value.shape[3]), dtype=dtype)
    (logits,) = session.run(["logits"], {name: feed[name] for name in inputs})
    result: NDArray[np.float32] = logits[0].astype(np.float32)
    return result


def _nll(logits: NDArray[np.float32], targets: NDArray[Any]) -> NDArray[np.float32]:
    """Negative log likelihood of each target, in nats."""
    return -log_probabilities(logits, targets)
