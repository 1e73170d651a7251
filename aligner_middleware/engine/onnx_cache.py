"""The KV caches of the two kinds of graph that `export/` makes.

Both kinds take `input_ids` `[B, T]` and `positions` `[B, P]` (the columns of `input_ids` to predict after) and give
`logits` `[B, P, V]`.

- `fused`: attention is one GroupQueryAttention operator a layer. It writes keys and values into buffers `[rows, H, S, D]`
  that are allocated once, and bound as input and output both, so no pass copies the past. A row is bound by its address.
- `standard`: as optimum exports it. Every pass takes keys and values and returns longer ones; each row has its own pass.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from aligner_middleware.artifact import Artifact
from aligner_middleware.engine.model import IntArray, Logits

_CHUNK = 192  # most tokens of a sequence in one pass: attention compares each with all before the chunk's end
_SHARED_TOKENS, _FILLING = 768, 0.25  # of a pass over several prompts: most tokens, and most padding for each of them


@dataclass(frozen=True)
class Graph:
    """A graph that is loaded, and the names and types of its keys and values.

    Attributes:
        session: ONNX Runtime's.
        artifact: Its `aligner.json`.
        device: Where its keys and values lie, `cpu` or `cuda`.
        inputs: Names of its inputs.
        dtype: Of keys and values.
        past, present: Names of all keys and values, before and after a pass.
    """

    session: Any
    artifact: Artifact
    device: str
    inputs: frozenset[str]
    dtype: Any
    past: tuple[str, ...]
    present: tuple[str, ...]

    @classmethod
    def of(cls, session: Any, artifact: Artifact, device: str) -> Graph:
        """Read names and types from a session."""
        inputs = {value.name: value.type for value in session.get_inputs()}
        dtype = np.float16 if inputs["past_key_values.0.key"] == "tensor(float16)" else np.float32
        sides = [(layer, side) for layer in range(artifact.layers) for side in ("key", "value")]
        past = tuple(f"past_key_values.{layer}.{side}" for layer, side in sides)
        present = tuple(f"present.{layer}.{side}" for layer, side in sides)
        return cls(session, artifact, device, frozenset(inputs), dtype, past, present)


class FusedCache:
    """Keys and values in buffers that all passes share.

    Attention adds in another order for a single token than for several. Where activations are quantised, the last bit of a
    sum can change one of them, and that one others. So a pass with a single token gets a second one, which is trimmed
    afterwards: then decoding and verification give the same logits, bit for bit. It costs a tenth to a fifth of the pass.
    """

    def __init__(self, graph: Graph, rows: int, capacity: int) -> None:
        self.capacity = capacity
        self._graph = graph
        self._lengths: IntArray = np.zeros(rows, dtype=np.int64)
        artifact = graph.artifact
        self._shape = (rows, artifact.kv_heads, capacity, artifact.head_size)
        self._buffers = [
            ort.OrtValue.ortvalue_from_numpy(_zeros(self._shape, graph.dtype), graph.device, 0) for _ in graph.past
        ]
        self._logits = np.empty((max(_CHUNK, rows), artifact.vocab_size), dtype=np.float32)
        self._bindings: dict[tuple[int, int], Any] = {}
        self._exact = artifact.weights == "products"
        self._options = ort.RunOptions()

    def extend(self, row: int, tokens: Sequence[int], wanted: int) -> Iterator[Logits]:
        """Append tokens to one row; see `KVCache.extend`."""
        unwanted = len(tokens) - wanted
        for start in range(0, len(tokens), _CHUNK):
            chunk = np.array([tokens[start : start + _CHUNK]], dtype=np.int64)
            width = chunk.shape[1]
            first = min(max(0, unwanted - start), width - 1)
            positions = np.arange(first, width)[None]
            if width == 1 and self._exact and self._lengths[row] + 2 <= self.capacity:
                chunk = chunk.repeat(2, axis=1)
            logits = self._run(row, 1, chunk, positions, np.array([width]))
            if start + width > unwanted:
                yield logits[0]

    def step(self, tokens: Mapping[int, int]) -> Logits:
        """Append one token to each of several rows; see `KVCache.step`."""
        width = max(tokens) + 1  # rows between them are in the pass too: what it writes there is overwritten later
        given = np.array([[tokens.get(row, 0)] for row in range(width)], dtype=np.int64)
        counts = np.array([row in tokens for row in range(width)], dtype=np.int64)
        logits = self._run(0, width, given, np.zeros((width, 1), dtype=np.int64), counts)
        return logits[list(tokens), 0]

    def begin(self, prompts: Mapping[int, Sequence[int]]) -> Logits:
        """Fill several empty rows; see `KVCache.begin`. Neighbouring rows of similar length share a pass."""
        found = [self._begin(group, prompts) for group in _neighbours(prompts)]
        return np.concatenate(found) if len(found) > 1 else found[0]

    def _begin(self, rows: Sequence[int], prompts: Mapping[int, Sequence[int]]) -> Logits:
        if len(rows) == 1:
            (logits,) = self.extend(rows[0], prompts[rows[0]], 1)
            return logits.copy()
        counts = np.array([len(prompts[row]) for row in rows])
        tokens = np.zeros((len(rows), counts.max()), dtype=np.int64)
        for at, row in enumerate(rows):
            tokens[at, : counts[at]] = prompts[row]
        return self._run(rows[0], len(rows), tokens, counts[:, None] - 1, counts)[:, 0].copy()

    def trim(self, row: int, length: int) -> None:
        """Remove a row's latest tokens; see `KVCache.trim`."""
        self._lengths[row] = length

    def stop(self) -> None:
        """End the current pass after its current operator; see `KVCache.stop`."""
        self._options.terminate = True

    def _run(self, row: int, count: int, tokens: IntArray, positions: IntArray, advance: IntArray) -> Logits:
        """Run `count` rows from `row` on, `[count, T]`, and give logits at `positions`, `[count, P, V]`."""
        binding = self._binding(row, count)
        lengths = self._lengths[row : row + count] + tokens.shape[1]
        lengths = np.minimum(lengths, self.capacity)  # for rows between them, which may be full
        binding.bind_cpu_input("input_ids", tokens)
        binding.bind_cpu_input("positions", positions)
        binding.bind_cpu_input("seqlens_k", (lengths - 1).astype(np.int32))
        binding.bind_cpu_input("total_sequence_length", np.array(lengths.max(), dtype=np.int32))
        shape = [*positions.shape, self._logits.shape[1]]
        binding.bind_output("logits", "cpu", 0, np.float32, shape, self._logits.ctypes.data)
        self._graph.session.run_with_iobinding(binding, self._options)
        self._lengths[row : row + count] += advance
        return self._logits[: positions.size].reshape(shape)

    def _binding(self, row: int, count: int) -> Any:
        if (row, count) not in self._bindings:
            graph = self._graph
            binding = self._bindings[row, count] = graph.session.io_binding()
            shape = [count, *self._shape[1:]]
            offset = row * int(np.prod(self._shape[1:])) * np.dtype(graph.dtype).itemsize
            for past, present, value in zip(graph.past, graph.present, self._buffers, strict=True):
                memory = (graph.device, 0, graph.dtype, shape, value.data_ptr() + offset)
                binding.bind_input(past, *memory)
                binding.bind_output(present, *memory)
        return self._bindings[row, count]


class StandardCache:
    """Keys and values that grow with every pass."""

    def __init__(self, graph: Graph, rows: int, capacity: int) -> None:
        self.capacity = capacity
        self._graph = graph
        artifact = graph.artifact
        empty = np.zeros((1, artifact.kv_heads, 0, artifact.head_size), graph.dtype)
        self._arrays: list[list[NDArray[Any]]] = [[empty] * len(graph.past) for _ in range(rows)]  # [1, H, S, D] each
        self._options = ort.RunOptions()

    def extend(self, row: int, tokens: Sequence[int], wanted: int) -> Iterator[Logits]:
        """Append tokens to one row; see `KVCache.extend`."""
        yield self._extend(row, tokens, wanted)

    def _extend(self, row: int, tokens: Sequence[int], wanted: int) -> Logits:
        past = self._arrays[row][0].shape[2]
        total, width = past + len(tokens), len(tokens)
        feed: dict[str, NDArray[Any]] = {
            "input_ids": np.array([tokens], dtype=np.int64),
            "positions": np.arange(width - wanted, width, dtype=np.int64)[None],
            "attention_mask": np.ones((1, total), dtype=np.int64),
            "position_ids": np.arange(past, total, dtype=np.int64)[None],
        }
        feed |= dict(zip(self._graph.past, self._arrays[row], strict=True))
        names = self._graph.inputs
        given = {name: value for name, value in feed.items() if name in names}
        wanted_names = ["logits", *self._graph.present]
        logits, *self._arrays[row] = self._graph.session.run(wanted_names, given, self._options)
        wanted_logits: Logits = logits[0].astype(np.float32, copy=False)
        return wanted_logits

    def step(self, tokens: Mapping[int, int]) -> Logits:
        """Append one token to each of several rows, one after the other."""
        return np.concatenate([self._extend(row, [token], 1) for row, token in tokens.items()])

    def begin(self, prompts: Mapping[int, Sequence[int]]) -> Logits:
        """Fill several rows, one after the other."""
        return np.concatenate([self._extend(row, tokens, 1) for row, tokens in prompts.items()])

    def trim(self, row: int, length: int) -> None:
        """Remove a row's latest tokens; see `KVCache.trim`."""
        self._arrays[row] = [array[:, :, :length] for array in self._arrays[row]]

    def stop(self) -> None:
        """End the current pass after its current operator; see `KVCache.stop`."""
        self._options.terminate = True


def _neighbours(prompts: Mapping[int, Sequence[int]]) -> list[list[int]]:
    """Group neighbouring rows whose prompts fit into one pass, without much padding."""
    groups: list[list[int]] = []
    for row, tokens in prompts.items():
        if groups and row == groups[-1][-1] + 1:
            lengths = [len(prompts[one]) for one in groups[-1]] + [len(tokens)]
            padded = max(lengths) * len(lengths)
            if max(lengths) <= _CHUNK and padded <= _SHARED_TOKENS and padded <= (1 + _FILLING) * sum(lengths):
                groups[-1].append(row)
                continue
        groups.append([row])
    return groups


def _zeros(shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    """Make an array that takes memory page by page, as it is written to; numpy's own take huge pages."""
    memory = mmap.mmap(-1, int(np.prod(shape)) * np.dtype(dtype).itemsize)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, dtype).reshape(shape)
