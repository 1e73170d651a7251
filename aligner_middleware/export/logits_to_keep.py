"""Restricts the head of an exported decoder to the requested positions.

The head is a fifth of a small model's arithmetic, and the logits are by far its largest output. Their arg max is computed
by numpy, which was measured to be faster than the operator in the graph.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper

from aligner_middleware.errors import BuildError
from aligner_middleware.export.graph import Graph

# Operators between the last product and the logits (Gemma 2 caps them); all of them work row by row.
_ROWWISE = ("Mul", "Div", "Add", "Tanh", "Cast", "Identity")


def predict_at_positions(model: onnx.ModelProto) -> None:
    """Give a model the input `positions` `[B, P]`, and cut its logits to `[B, P, V]`.

    Raises:
        BuildError: If the logits are not made by a product of hidden states and a weight.
    """
    graph = Graph(model)
    head = _head(graph)
    _untie(graph, head)
    indices = graph.add_initializer("head.axes", np.array([-1], dtype=np.int64))
    columns = graph.add("Unsqueeze", ["positions", indices], ["head/columns"], "/head/Unsqueeze")  # [B, P, 1]
    head.input[0] = graph.add("GatherND", [head.input[0], columns], ["head/hidden"], "/head/GatherND", batch_dims=1)
    graph.proto.input.append(helper.make_tensor_value_info("positions", TensorProto.INT64, ["batch_size", "positions"]))
    logits = next(output for output in graph.proto.output if output.name == "logits")
    logits.type.tensor_type.shape.dim[1].dim_param = "positions"
    graph.tidy()


def _head(graph: Graph) -> onnx.NodeProto:
    """Find the product that gives the logits."""
    node = graph.maker.get("logits")
    while node is not None and node.op_type in _ROWWISE:
        node = next((maker for name in node.input if (maker := graph.maker.get(name)) is not None), None)
    if node is None or node.op_type != "MatMul":
        raise BuildError(
            f"the logits are made by {node.op_type if node else 'nothing'}, expected a product with the head"
        )
    return node


def _untie(graph: Graph, head: onnx.NodeProto) -> None:
    """Give a head that is the transposed embedding a weight of its own, `[hidden, V]`, for the quantisers to see."""
    maker = graph.maker.get(head.input[1])
    if maker is not None and maker.op_type == "Transpose" and (table := graph.constant(maker.input[0])) is not None:
        head.input[1] = graph.add_initializer("lm_head.weight", table.T)
