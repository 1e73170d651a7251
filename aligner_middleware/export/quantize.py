"""Quantise an exported decoder: int8 as products of integers, int8 and int4 in blocks, float16 for GPUs.

- `products`: weights and activations are 8-bit integers (`w8a8.py`); for fused graphs.
- `blocks`: weights are stored in blocks of 32 with a scale each (MatMulNBits, accuracy level 4); for every graph, but slower
  over many tokens.

Both quantise activations per token, never over a whole tensor, so that a token's prediction does not depend on the other
tokens in the pass.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper

from aligner_middleware.artifact import Precision, Weights
from aligner_middleware.export.graph import MICROSOFT, Graph
from aligner_middleware.export.w8a8 import to_integer_products

_BLOCK = 32
_BITS: dict[Precision, int] = {"int8": 8, "int4": 4}

# The forms of storage of each precision, the fastest first; the next one is for models that do not allow it.
WEIGHTS: dict[Precision, tuple[Weights, ...]] = {
    "float32": ("floats",),
    "float16": ("floats",),
    "int8": ("products", "blocks"),
    "int4": ("blocks",),
}


def quantise(model: onnx.ModelProto, precision: Precision, weights: Weights) -> onnx.ModelProto:
    """Quantise a float32 model, which may be changed in place.

    Raises:
        NotRotatable: If the weights are to be `products`, and the shape of the model does not allow that.
    """
    if weights == "products":
        to_integer_products(model)
        _quantise_embedding(model)
        return model
    if weights == "blocks":
        model = _to_blocks(model, _BITS[precision])
        if precision == "int8":
            _share_embedding(model)
        return model
    return _to_float16(model) if precision == "float16" else model


def _to_blocks(model: onnx.ModelProto, bits: int) -> onnx.ModelProto:
    """Store the weight of every MatMul in blocks of integers with a scale each; the head of an int4 model in 8 bits."""
    from onnxruntime.quantization import QuantFormat
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

    graph = Graph(model)
    products = {node.name: node.input[1] for node in graph.nodes("MatMul") if node.input[1] in graph.initializers}
    heads = [name for name, weight in products.items() if weight == "lm_head.weight"]
    passes = (
        [(bits, list(products))]
        if bits == 8
        else [(8, heads), (bits, [name for name in products if name not in heads])]
    )
    for pass_bits, wanted in passes:
        settings = DefaultWeightOnlyQuantConfig(
            block_size=_BLOCK,
            is_symmetric=True,
            accuracy_level=4,
            bits=pass_bits,
            quant_format=QuantFormat.QOperator,
            op_types_to_quantize=("MatMul",),
        )
        others = [name for name in products if name not in wanted]
        quantizer = MatMulNBitsQuantizer(model, nodes_to_exclude=others, algo_config=settings)
        quantizer.process()
        model = quantizer.model.model
    return model


def _share_embedding(model: onnx.ModelProto) -> None:
    """Let the embedding of a tied model read the bytes of the quantised head, instead of a float32 table."""
    graph = Graph(model)
    head = next((node for node in graph.nodes("MatMulNBits") if node.input[1].startswith("lm_head.weight")), None)
    gather = next((node for node in graph.nodes("Gather") if "embed_tokens" in node.input[0]), None)
    if head is None or gather is None or (table := graph.initializers.get(gather.input[0])) is None:
        return
    rows, width = table.dims
    shapes = {"embedding.shape": [rows, width], "embedding.scales_shape": [rows, width // _BLOCK]}
    for name, shape in shapes.items():
        graph.add_initializer(name, np.array(shape, dtype=np.int64))
    weights = graph.add("Reshape", [head.input[1], "embedding.shape"], ["embedding/bytes"], "/embedding/Reshape")
    scales = graph.add("Reshape", [head.input[2], "embedding.scales_shape"], ["embedding/scales"], "/embedding/Scales")
    _look_up(graph, gather, weights, scales)


def _quantise_embedding(model: onnx.ModelProto) -> None:
    """Store the embedding in blocks of 8-bit integers, if its width is a multiple of a block."""
    graph = Graph(model)
    gather = next(node for node in graph.nodes("Gather") if graph.is_weight(node.input[0]))
    table = graph.array(gather.input[0])
    if table.shape[1] % _BLOCK:
        return
    blocks = table.reshape(len(table), -1, _BLOCK)
    scales = np.maximum(np.abs(blocks).max(axis=2) / 127, 1e-12).astype(np.float32)
    stored = (np.round(blocks / scales[:, :, None]) + 128).astype(np.uint8)
    bytes_name = graph.add_initializer("embedding.bytes", stored.reshape(table.shape))
    _look_up(graph, gather, bytes_name, graph.add_initializer("embedding.scales", scales))


def _look_up(graph: Graph, gather: onnx.NodeProto, weights: str, scales: str) -> None:
    """Replace an embedding lookup by one in blocks of integers, `[V, width]`, with scales `[V, width / block]`."""
    result, indices = list(gather.output), gather.input[1]
    graph.remove(gather)
    graph.add(
        "GatherBlockQuantized",
        [weights, indices, scales],
        result,
        gather.name,
        MICROSOFT,
        bits=8,
        block_size=_BLOCK,
        gather_axis=0,
        quantize_axis=1,
    )
    graph.tidy()
    model = graph.model
    if not any(opset.domain == MICROSOFT for opset in model.opset_import):
        model.opset_import.append(helper.make_opsetid(MICROSOFT, 1))


def _to_float16(model: onnx.ModelProto) -> onnx.ModelProto:
    """Store weights and the KV cache in half precision; norms stay in float32 inside their operators."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    return convert_float_to_float16(model, keep_io_types=["logits"])  # type: ignore[no-any-return]
