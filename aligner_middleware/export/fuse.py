"""Rewrites a decoder that optimum exported with ONNX Runtime's fused operators.

For every layer of a Llama-shaped decoder (Llama, Mistral, Qwen 2 and 3, Gemma 1 to 3, Phi 3):

    RMSNorm chain                       SimplifiedLayerNormalization; with the residual addition before it
                                        SkipSimplifiedLayerNormalization
    q, k and v projections              one MatMul by the three weights side by side; three where queries and keys are
                                        normed by head
    all up to o_proj (rotary embedding, GroupQueryAttention, which keeps the KV cache in place
    cache, mask, softmax)
    attention_mask, position_ids        seqlens_k [B] (length of each row after this pass, minus one) and
                                        total_sequence_length (the longest row after this pass)

Rotary frequencies and norm weights are read from the graph, so scaled frequencies or Gemma's `weight + 1` need no code
here. A graph of another shape raises `NotFusable`, and is served as it was exported.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from aligner_middleware.export.graph import MICROSOFT, Array, Graph, attribute

_LAYER = re.compile(r"(.*/layers\.(\d+)/self_attn)/(?:q|qkv)_proj/MatMul")


class NotFusable(ValueError):
    """The graph is not of the shape that can be fused; the message says where."""


@dataclass(frozen=True)
class _Linear:
    """A linear layer: `source` `[B, T, in]`, `weight` `[in, out]`, `bias` `[out]` if any, `result` `[B, T, out]`."""

    source: str
    weight: Array
    bias: Array | None
    result: str


def fuse(model: onnx.ModelProto, config: dict[str, Any]) -> None:
    """Fuse a model in place.

    Args:
        model: A decoder exported with past and present keys and values.
        config: Its `config.json`.

    Raises:
        NotFusable: If it does not have the expected shape; the model is then rewritten in part, and must be loaded again.
    """
    graph = Graph(model)
    _fuse_norms(graph)
    layers = _fuse_attention(graph, config)
    if layers != config["num_hidden_layers"]:
        raise NotFusable(f"{layers} attention layers were found, the config names {config['num_hidden_layers']}")
    graph.remove_inputs("attention_mask", "position_ids")
    for name, shape in (("seqlens_k", ["batch_size"]), ("total_sequence_length", [])):
        graph.proto.input.append(helper.make_tensor_value_info(name, TensorProto.INT32, shape))
    for output in graph.proto.output:
        if output.name.startswith("present"):
            output.type.tensor_type.shape.dim[2].dim_param = "present_sequence_length"
    graph.tidy()
    _fuse_residuals(graph)
    graph.tidy()
    left = {name for node in graph.proto.node for name in node.input} & {"attention_mask", "position_ids"}
    if left:
        raise NotFusable(f"{sorted(left)} are still read after the rewrite")
    model.opset_import.append(helper.make_opsetid(MICROSOFT, 1))


def _fuse_norms(graph: Graph) -> None:
    """Replace each `x / sqrt(mean(x ** 2) + epsilon) * weight`."""
    for mean in graph.nodes("ReduceMean"):
        square = graph.maker.get(mean.input[0])
        if square is None or square.op_type != "Pow" or graph.constant(square.input[1]) != 2:
            continue
        plus = graph.only_reader(mean.output[0], "Add")
        root = plus and graph.only_reader(plus.output[0], "Sqrt")
        inverse = root and graph.only_reader(root.output[0], "Div", "Reciprocal")
        scaled = inverse and graph.only_reader(inverse.output[0], "Mul")
        if not plus or not scaled or square.input[0] not in scaled.input:
            continue
        cast = graph.only_reader(scaled.output[0], "Cast")
        weighted = graph.only_reader((cast or scaled).output[0], "Mul")
        weight = weighted and next((name for name in weighted.input if name in graph.initializers), None)
        epsilon = graph.constant_input(plus)
        if not weighted or not weight or epsilon is None:
            continue
        name = scaled.name.rpartition("/")[0]
        graph.redirect(weighted.output[0], name + "/normed")
        source = _without_cast(graph, square.input[0])
        graph.add(
            "SimplifiedLayerNormalization",
            [source, weight],
            [name + "/normed"],
            name,
            axis=-1,
            epsilon=float(epsilon),
            stash_type=1,
        )
        graph.reindex()


def _without_cast(graph: Graph, name: str) -> str:
    """Step over a cast from float32 to itself, so that the residual is one value for all its readers."""
    node = graph.maker.get(name)
    if node is None or node.op_type != "Cast":
        return name
    graph.redirect(name, node.input[0])
    return str(node.input[0])


def _fuse_residuals(graph: Graph) -> None:
    """Replace each addition that a norm reads, and the norm, by one node that gives both the norm and the sum."""
    for norm in graph.nodes("SimplifiedLayerNormalization"):
        plus = graph.maker.get(norm.input[0])
        if plus is None or plus.op_type != "Add" or any(name in graph.initializers for name in plus.input):
            continue
        graph.remove(plus, norm)
        graph.add(
            "SkipSimplifiedLayerNormalization",
            [*plus.input, norm.input[1]],
            [norm.output[0], "", "", plus.output[0]],
            norm.name,
            MICROSOFT,
            epsilon=attribute(norm, "epsilon"),
        )
        graph.reindex()


def _fuse_attention(graph: Graph, config: dict[str, Any]) -> int:
    """Replace the attention of every layer, and give their number."""
    layers = [match for node in graph.proto.node if (match := _LAYER.fullmatch(node.name))]
    for match in layers:
        prefix, layer = match[1], int(match[2])
        present = graph.maker[f"present.{layer}.key"]
        if present.op_type != "Concat" or present.input[0] != f"past_key_values.{layer}.key":
            raise NotFusable(
                f"the key cache of layer {layer} is made by {present.op_type}, expected past and new joined"
            )
        cos, sin = _rotary_tables(graph, present.input[1], config["max_position_embeddings"])
        projected = _projections(graph, prefix)
        graph.named[prefix + "/o_proj/MatMul"].input[0] = prefix + "/attended"
        graph.remove(*(graph.maker[f"present.{layer}.{side}"] for side in ("key", "value")))
        cache = [f"past_key_values.{layer}.{side}" for side in ("key", "value")]
        graph.add(
            "GroupQueryAttention",
            [*projected, *cache, "seqlens_k", "total_sequence_length", cos, sin],
            [prefix + "/attended", f"present.{layer}.key", f"present.{layer}.value"],
            prefix + "/GroupQueryAttention",
            MICROSOFT,
            do_rotary=1,
            rotary_interleaved=0,
            **_attention_settings(config, layer),
        )
        graph.reindex()
    return len(layers)


def _projections(graph: Graph, prefix: str) -> tuple[str, str, str]:
    """Name queries, keys and values, `[B, T, heads D]` each; or one value with all of them, and nothing."""
    joined = graph.named.get(prefix + "/qkv_proj/MatMul")
    if joined is not None:  # Phi 3 has them side by side
        return _linear(graph, prefix + "/qkv_proj").result, "", ""
    parts = [_linear(graph, f"{prefix}/{side}_proj") for side in "qkv"]
    if any(f"{prefix}/{side}_norm" in graph.named for side in "qk"):  # Qwen 3, Gemma 3
        return _normed_by_head(graph, prefix, "q"), _normed_by_head(graph, prefix, "k"), parts[2].result
    weight = graph.add_initializer(f"{prefix}/qkv_proj.weight", np.concatenate([part.weight for part in parts], axis=1))
    value = graph.add("MatMul", [parts[0].source, weight], [prefix + "/qkv"], prefix + "/qkv_proj/MatMul")
    biases = [part.bias for part in parts if part.bias is not None]
    if len(biases) == len(parts):
        bias = graph.add_initializer(f"{prefix}/qkv_proj.bias", np.concatenate(biases))
        value = graph.add("Add", [value, bias], [prefix + "/qkv_biased"], prefix + "/qkv_proj/Add")
    elif biases:
        raise NotFusable(f"{prefix} has a bias on some of its projections only")
    return value, "", ""


def _normed_by_head(graph: Graph, prefix: str, side: str) -> str:
    """Norm queries or keys head by head, `[B, T, heads, D]`, and lay the heads side by side."""
    norm = graph.named[f"{prefix}/{side}_norm"]
    size = len(graph.array(norm.input[1]))
    split = graph.maker.get(norm.input[0])
    while split is not None and split.op_type in ("Transpose", "Cast"):  # Gemma 3 norms them in another order of axes
        split = graph.maker.get(split.input[0])
    if split is None or split.op_type != "Reshape" or split.input[0] != _linear(graph, f"{prefix}/{side}_proj").result:
        raise NotFusable(f"{prefix} norms something else than its {side} projection, split into heads")
    split.input[1] = graph.add_initializer(f"heads_of_{size}", np.array([0, 0, -1, size], dtype=np.int64))
    norm.input[0] = split.output[0]
    shape = graph.add_initializer("heads_side_by_side", np.array([0, 0, -1], dtype=np.int64))
    return graph.add("Reshape", [norm.output[0], shape], [f"{prefix}/{side}"], f"{prefix}/{side}_norm/Reshape")


def _linear(graph: Graph, name: str) -> _Linear:
    product, plus = graph.named.get(name + "/MatMul"), graph.named.get(name + "/Add")
    weight = graph.constant(product.input[1]) if product is not None else None
    if product is None or weight is None:
        raise NotFusable(f"{name} is not a product by a constant")
    bias = graph.constant_input(plus) if plus is not None else None
    return _Linear(product.input[0], weight, bias, (plus or product).output[0])


def _rotary_tables(graph: Graph, rotated: str, length: int) -> tuple[str, str]:
    """Tabulate cos and sin, `[length, D / 2]`, of the rotary embedding that a value goes through."""
    cos = next((node for node in graph.ancestors(rotated) if node.op_type == "Cos"), None)
    product = cos and next((node for node in graph.ancestors(cos.input[0]) if node.op_type == "MatMul"), None)
    if not cos or not product:
        raise NotFusable("keys go through no rotary embedding")
    frequencies = _frequencies(graph, product)
    scale = next(
        (float(value) for node in graph.readers[cos.output[0]] if (value := graph.constant_input(node)) is not None),
        1.0,
    )
    angles = np.arange(length, dtype=np.float32)[:, None] * frequencies[None, :]
    name = cos.name.rpartition("/")[0]
    tables = (np.cos(angles) * np.float32(scale), np.sin(angles) * np.float32(scale))
    cos_table, sin_table = (
        graph.add_initializer(f"{name}/{kind}_cache", table) for kind, table in zip(("cos", "sin"), tables, strict=True)
    )
    return cos_table, sin_table


def _frequencies(graph: Graph, product: onnx.NodeProto) -> Array:
    """Find the inverse frequencies, `[D / 2]`, that positions are multiplied by."""
    direct = (graph.constant(name) for name in product.input)
    further = (
        graph.constant(name) for value in product.input for node in graph.ancestors(value) for name in node.input
    )
    for array in (*direct, *further):
        if array is not None and array.dtype == np.float32 and array.size > 1:
            return array.reshape(-1)
    raise NotFusable("the rotary embedding's frequencies are not a constant")


def _attention_settings(config: dict[str, Any], layer: int) -> dict[str, Any]:
    heads = config["num_attention_heads"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    kinds = config.get("layer_types")
    local = kinds[layer] == "sliding_attention" if kinds else config.get("use_sliding_window", True)
    return {
        "num_heads": heads,
        "kv_num_heads": config.get("num_key_value_heads") or heads,
        "scale": float(config.get("query_pre_attn_scalar") or size) ** -0.5,
        "local_window_size": int((config.get("sliding_window") if local else None) or -1),
        "softcap": float(config.get("attn_logit_softcapping") or 0.0),
    }
