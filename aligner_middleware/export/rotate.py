"""Rotates a decoder's residual stream, which spreads outlier channels, so that activations fit into 8 bits.

RMSNorm is invariant under rotation. With each norm's weight folded into the layers that read it, the weights that write to
the stream can be multiplied by an orthogonal matrix, and those that read it by the transpose: the logits stay the same, and
outliers of single channels are spread over all of them (QuaRot, Ashkboos et al. 2024, arXiv 2404.00456, section 4).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx

from aligner_middleware.export.graph import Array, Graph

_NORMS = {"SimplifiedLayerNormalization": 1, "SkipSimplifiedLayerNormalization": 2}  # where their weight is
_SEED = 2402


class NotRotatable(ValueError):
    """An operator that is no norm and no linear layer uses the residual stream; the message names it."""


@dataclass
class _Stream:
    """The weights around the residual stream.

    Attributes:
        table: Name of the embedding, `[V, hidden]`.
        written: Names of weights `[in, hidden]` and biases `[hidden]` of the layers that write to it.
        read: Names of weights `[hidden, out]` that read it through a norm, by the name of that norm's weight `[hidden]`.
    """

    table: str
    written: list[str] = field(default_factory=list)
    read: dict[str, list[str]] = field(default_factory=dict)


def rotate(model: onnx.ModelProto) -> None:
    """Rotate a fused model in place. Its logits stay the same, except for rounding.

    Raises:
        NotRotatable: If the model has another shape (Gemma 2 and 3 also norm what they write); it is unchanged then.
    """
    graph = Graph(model)
    stream = _stream(graph)
    size = graph.array(stream.table).shape[1]
    rotation = _orthogonal(size)
    for name in (stream.table, *stream.written):
        graph.replace_initializer(name, graph.array(name) @ rotation)
    for norm, weights in stream.read.items():
        scale = graph.array(norm)[:, None]
        for name in weights:
            graph.replace_initializer(name, rotation.T @ (scale * graph.array(name)))
        graph.replace_initializer(norm, np.ones(size, dtype=np.float32))


def _orthogonal(size: int) -> Array:
    """Make a random orthogonal matrix, the same one each time."""
    q, r = np.linalg.qr(np.random.default_rng(_SEED).standard_normal((size, size)))
    return np.asarray(q * np.sign(np.diag(r)), dtype=np.float32)


def _stream(graph: Graph) -> _Stream:
    """Follow the residual stream from the embedding to the head."""
    start = next((node for node in graph.nodes("Gather") if graph.is_weight(node.input[0])), None)
    if start is None:
        raise NotRotatable("no embedding was found")
    stream = _Stream(start.input[0])
    waiting, seen = [start.output[0]], {start.output[0]}
    while waiting:
        value = waiting.pop(0)
        for node in graph.readers[value]:
            if node.op_type == "Mul" and graph.constant_input(node) is not None:  # Gemma scales its embedding
                sums = [node.output[0]]
            elif node.op_type in _NORMS:
                stream.written += [name for other in node.input[:2] for name in _writer(graph, other, node, seen)]
                stream.read.setdefault(node.input[_NORMS[node.op_type]], []).extend(_readers(graph, node.output[0]))
                sums = list(node.output[3:])
            else:
                raise NotRotatable(f"{node.name} reads the residual stream by {node.op_type}")
            waiting += [name for name in sums if name and name not in seen]
            seen.update(sums)
    touched = [*stream.written, *(name for names in stream.read.values() for name in names)]
    stream.written = list(dict.fromkeys(stream.written))
    stream.read = {norm: list(dict.fromkeys(names)) for norm, names in stream.read.items()}
    if any(len(graph.readers[name]) > 1 for name in touched):
        raise NotRotatable("layers share their weights")
    return stream


def _writer(graph: Graph, value: str, norm: onnx.NodeProto, seen: set[str]) -> list[str]:
    """Name the weight and bias of the linear layer that a norm adds to the stream."""
    if value in seen or (norm.op_type == "SimplifiedLayerNormalization" and value == norm.input[1]):
        return []
    node, names = graph.maker.get(value), []
    if node is not None and node.op_type == "Add" and (bias := graph.weight_input(node)) is not None:
        names.append(bias)
        node = next((maker for name in node.input if (maker := graph.maker.get(name)) is not None), None)
    if node is None or node.op_type != "MatMul" or not graph.is_weight(node.input[1]):
        raise NotRotatable(f"{node.name if node else value} is added to the residual stream, expected a linear layer")
    return [*names, node.input[1]]


def _readers(graph: Graph, normed: str) -> list[str]:
    """Name the weights that a norm's output is multiplied by."""
    names = []
    for node in graph.readers[normed]:
        if node.op_type == "GatherND":  # selects the positions that the head predicts at
            names += _readers(graph, node.output[0])
        elif node.op_type == "MatMul" and node.input[0] == normed and graph.is_weight(node.input[1]):
            names.append(node.input[1])
        else:
            raise NotRotatable(f"{node.name} reads a norm by {node.op_type}, expected a linear layer")
    return names
