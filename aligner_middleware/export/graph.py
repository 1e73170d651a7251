"""An index of an ONNX graph for rewriting it: which node makes a value, which ones read it, which values are constants."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

MICROSOFT = "com.microsoft"

Array = NDArray[Any]


class Graph:
    """An index over a model's graph. Call `reindex` after adding or removing nodes."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.proto = model.graph
        self.initializers = {tensor.name: tensor for tensor in self.proto.initializer}
        self.reindex()

    def reindex(self) -> None:
        """Build the index again."""
        self.maker: dict[str, onnx.NodeProto] = {name: node for node in self.proto.node for name in node.output if name}
        self.named: dict[str, onnx.NodeProto] = {node.name: node for node in self.proto.node}
        self.readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in self.proto.node:
            for name in node.input:
                if name:
                    self.readers[name].append(node)

    def nodes(self, *op_types: str) -> list[onnx.NodeProto]:
        """List the nodes of these types; the list stays as it is while the graph changes."""
        return [node for node in self.proto.node if node.op_type in op_types]

    def only_reader(self, name: str, *op_types: str) -> onnx.NodeProto | None:
        """Give the only reader of a value with one of these types; `None` where there is none or more than one."""
        found = [node for node in self.readers[name] if node.op_type in op_types]
        return found[0] if len(found) == 1 else None

    def constant(self, name: str) -> Array | None:
        """Give the array behind a value: an initializer or a constant, seen through a cast or an identity."""
        if name in self.initializers:
            return numpy_helper.to_array(self.initializers[name])
        node = self.maker.get(name)
        if node is None:
            return None
        if node.op_type == "Constant":
            return numpy_helper.to_array(node.attribute[0].t)
        return self.constant(node.input[0]) if node.op_type in ("Identity", "Cast", "Expand") else None

    def constant_input(self, node: onnx.NodeProto) -> Array | None:
        """Give the first input of a node that is a constant."""
        return next((array for name in node.input if (array := self.constant(name)) is not None), None)

    def is_weight(self, name: str) -> bool:
        """Whether a value is a matrix stored in the model."""
        return name in self.initializers and len(self.initializers[name].dims) == 2

    def weight_input(self, node: onnx.NodeProto) -> str | None:
        """Name the input of a node that is stored in the model."""
        return next((name for name in node.input if name in self.initializers), None)

    def array(self, name: str) -> Array:
        """Give the array of an initializer."""
        return numpy_helper.to_array(self.initializers[name])

    def ancestors(self, name: str) -> Iterator[onnx.NodeProto]:
        """Walk the nodes that a value depends on, the nearest first."""
        seen, waiting = set(), [name]
        while waiting:
            node = self.maker.get(waiting.pop(0))
            if node is not None and node.name not in seen:
                seen.add(node.name)
                yield node
                waiting.extend(node.input)

    def add_initializer(self, name: str, array: Array) -> str:
        """Add a constant, unless one of that name is there, and give its name."""
        if name not in self.initializers:
            tensor = numpy_helper.from_array(np.ascontiguousarray(array), name)
            self.proto.initializer.append(tensor)
            self.initializers[name] = self.proto.initializer[-1]
        return name

    def replace_initializer(self, name: str, array: Array) -> None:
        """Replace the array of an initializer."""
        self.initializers[name].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array), name))

    def add(
        self,
        op_type: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
        name: str,
        domain: str = "",
        **attributes: Any,
    ) -> str:
        """Add a node and give the name of its first output."""
        self.proto.node.append(helper.make_node(op_type, inputs, outputs, name=name, domain=domain, **attributes))
        return outputs[0]

    def remove(self, *nodes: onnx.NodeProto) -> None:
        """Remove nodes."""
        for node in nodes:
            self.proto.node.remove(node)

    def redirect(self, old: str, new: str) -> None:
        """Make every reader of a value read another one."""
        for node in self.readers[old]:
            for place, name in enumerate(node.input):
                if name == old:
                    node.input[place] = new

    def remove_inputs(self, *names: str) -> None:
        """Remove inputs of the graph; names that it does not have are ignored."""
        for value in [value for value in self.proto.input if value.name in names]:
            self.proto.input.remove(value)

    def tidy(self) -> None:
        """Keep only the nodes that the outputs need, in topological order."""
        self.reindex()
        kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in self._in_order()]
        del self.proto.node[:]
        self.proto.node.extend(kept)
        used = {name for node in kept for name in node.input}
        for place in reversed(range(len(self.proto.initializer))):
            if self.proto.initializer[place].name not in used:
                del self.proto.initializer[place]
        del self.proto.value_info[:]
        self.initializers = {tensor.name: tensor for tensor in self.proto.initializer}
        self.reindex()

    def _in_order(self) -> list[onnx.NodeProto]:
        """Sort the nodes that the outputs need, each after those that it reads."""
        order: list[onnx.NodeProto] = []
        entered: set[int] = set()
        done: set[int] = set()
        waiting = [node for output in self.proto.output if (node := self.maker.get(output.name))]
        while waiting:
            node = waiting[-1]
            key = id(node)
            if key in done:
                waiting.pop()
            elif key in entered:
                done.add(key)
                order.append(waiting.pop())
            else:
                entered.add(key)
                made = (self.maker.get(name) for name in node.input if name)
                waiting.extend(other for other in made if other is not None and id(other) not in entered)
        return order


def attribute(node: onnx.NodeProto, name: str) -> Any:
    """Read an attribute of a node."""
    return next(helper.get_attribute_value(value) for value in node.attribute if value.name == name)
