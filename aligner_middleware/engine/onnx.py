"""A decoder in ONNX Runtime, over the graphs that `build/` makes.

Both kinds of graph take `input_ids` `[B, T]` and `positions` `[B, P]` (columns of `input_ids` whose prediction is wanted)
and give `logits` `[B, P, V]`.

- `fused`: attention is one GroupQueryAttention operator a layer. It writes keys and values into buffers that are
  allocated once for a batch and bound once, as input and output both, so no pass copies the past.
- `standard`: as optimum exports it. Every pass takes the past and gives it back longer.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from aligner_middleware.artifact import Artifact
from aligner_middleware.engine.model import IntArray, KVCache, Slots, last_positions
from aligner_middleware.errors import ArtifactError

_CHUNK = 1024  # tokens of a single sequence that go through at once: attention scores take heads x T x S floats


class OnnxModel:
    """A decoder-only network in an ONNX Runtime session. Safe to share between threads: a cache is not.

    Args:
        path: The `model.onnx`.
        artifact: What stands in `aligner.json` beside it.
        providers: Execution providers in order of preference; `None` for CUDA where there is one, and the CPU.
        threads: Threads of one pass; `None` for all cores.

    Raises:
        ArtifactError: If ONNX Runtime cannot load the graph, or lacks a provider asked for.
    """

    def __init__(
        self,
        path: Path,
        artifact: Artifact,
        *,
        providers: Sequence[str] | None = None,
        threads: int | None = None,
    ) -> None:
        self.max_positions = artifact.max_positions
        self._artifact = artifact
        options = ort.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        ort.set_default_logger_severity(
            4
        )  # a GPU build without CUDA's libraries falls back to the CPU, and says so at length
        try:
            self._session = ort.InferenceSession(path, options, providers=_providers(providers))
        except Exception as exc:  # ONNX Runtime raises its own classes, without a common base
            raise ArtifactError(f"ONNX Runtime cannot load {path}: {exc}") from exc
        finally:
            ort.set_default_logger_severity(2)
        inputs = {value.name: value.type for value in self._session.get_inputs()}
        self._mask_inputs = inputs.keys() & {"attention_mask", "position_ids"}
        self._dtype = np.float16 if inputs["past_key_values.0.key"] == "tensor(float16)" else np.float32
        self._device = "cuda" if self._session.get_providers()[0] == "CUDAExecutionProvider" else "cpu"
        sides = [(layer, side) for layer in range(artifact.layers) for side in ("key", "value")]
        self._past = [f"past_key_values.{layer}.{side}" for layer, side in sides]
        self._present = [f"present.{layer}.{side}" for layer, side in sides]

    @property
    def providers(self) -> list[str]:
        """Execution providers in use."""
        return list(self._session.get_providers())

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """Make an empty cache for `batch` sequences of at most `capacity` tokens."""
        shape = (batch, self._artifact.kv_heads, capacity, self._artifact.head_size)
        if self._artifact.graph == "fused":
            return _SharedBuffers(self, shape)
        return _Concatenated(batch, [np.zeros((*shape[:2], 0, shape[3]), self._dtype) for _ in self._past])

    def forward(self, tokens: IntArray, counts: IntArray, cache: KVCache, last: int) -> IntArray:
        """Run one pass; see `Model.forward`. A long single sequence goes through in several."""
        if len(tokens) == 1 and tokens.shape[1] > _CHUNK:
            return self._forward_in_chunks(tokens, cache, last)
        return self._predict(tokens, counts, cache, last_positions(counts, last))

    def _forward_in_chunks(self, tokens: IntArray, cache: KVCache, last: int) -> IntArray:
        found = []
        for start in range(0, tokens.shape[1], _CHUNK):
            chunk = tokens[:, start : start + _CHUNK]
            width = chunk.shape[1]
            wanted = max(1, min(width, start + width - (tokens.shape[1] - last)))
            counts = np.array([width], dtype=np.int64)
            found.append(self._predict(chunk, counts, cache, last_positions(counts, wanted)))
        return np.concatenate(found, axis=1)[:, -last:]

    def _predict(self, tokens: IntArray, counts: IntArray, cache: KVCache, positions: IntArray) -> IntArray:
        if isinstance(cache, _SharedBuffers):
            return self._predict_fused(tokens, counts, cache, positions)
        assert isinstance(cache, _Concatenated)
        return self._predict_standard(tokens, counts, cache, positions)

    def _predict_fused(
        self, tokens: IntArray, counts: IntArray, cache: _SharedBuffers | _OneRow, positions: IntArray
    ) -> IntArray:
        # The operator takes rows of different length, with padding after them, where nothing is cached, and one token of
        # each row on top of a past; several tokens on top of a past for one sequence only.
        if len(tokens) > 1 and tokens.shape[1] > 1 and cache.lengths.any():
            assert isinstance(cache, _SharedBuffers)
            return self._predict_row_by_row(tokens, counts, cache, positions)
        lengths = cache.lengths + counts
        binding = cache.binding
        binding.bind_cpu_input("input_ids", tokens)
        binding.bind_cpu_input("positions", positions)
        binding.bind_cpu_input("seqlens_k", (lengths - 1).astype(np.int32))
        binding.bind_cpu_input("total_sequence_length", np.array(lengths.max(), dtype=np.int32))
        binding.bind_output("logits", "cpu")
        self._session.run_with_iobinding(binding)
        cache.lengths = lengths
        predicted: IntArray = binding.get_outputs()[0].numpy().argmax(axis=-1)
        return predicted

    def _predict_row_by_row(
        self, tokens: IntArray, counts: IntArray, cache: _SharedBuffers, positions: IntArray
    ) -> IntArray:
        predicted = np.zeros_like(positions)
        for row, count in enumerate(counts):
            part = slice(row, row + 1)
            predicted[part] = self._predict_fused(tokens[part, :count], counts[part], cache.row(row), positions[part])
        cache.lengths = cache.lengths + counts
        return predicted

    def _predict_standard(
        self, tokens: IntArray, counts: IntArray, cache: _Concatenated, positions: IntArray
    ) -> IntArray:
        places = cache.slots.append(counts, tokens.shape[1])
        masks = {"attention_mask": cache.slots.mask, "position_ids": places}
        feed: dict[str, NDArray[Any]] = {"input_ids": tokens, "positions": positions}
        feed |= {name: masks[name] for name in self._mask_inputs}
        feed |= dict(zip(self._past, cache.arrays, strict=True))
        logits, *cache.arrays = self._session.run(["logits", *self._present], feed)
        predicted: IntArray = logits.argmax(axis=-1)
        return predicted


class _SharedBuffers:
    """Keys and values of `B` sequences in buffers of fixed length, each bound as past and as present."""

    def __init__(self, model: OnnxModel, shape: tuple[int, int, int, int]) -> None:
        self.lengths: IntArray = np.zeros(shape[0], dtype=np.int64)
        self._model = model
        self._bind([self._allocate(shape) for _ in model._past])

    def trim(self, lengths: IntArray) -> None:
        self.lengths = lengths.copy()

    def select(self, rows: list[int]) -> None:
        self.lengths = self.lengths[rows]
        device = self._model._device
        self._bind([ort.OrtValue.ortvalue_from_numpy(value.numpy()[rows], device, 0) for value in self._values])

    def row(self, row: int) -> _OneRow:
        """Give one sequence as a batch of its own, in the same memory."""
        return _OneRow(self._model, self._values, row, self.lengths[row : row + 1])

    def _allocate(self, shape: tuple[int, int, int, int]) -> Any:
        return ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, self._model._dtype), self._model._device, 0)

    def _bind(self, values: list[Any]) -> None:
        self._values = values
        self.binding = self._model._session.io_binding()
        self.binding.bind_output("logits", "cpu")  # first, so that it is the first of the outputs
        for past, present, value in zip(self._model._past, self._model._present, values, strict=True):
            self.binding.bind_ortvalue_input(past, value)
            self.binding.bind_ortvalue_output(present, value)


class _OneRow:
    """A sequence of `_SharedBuffers` by itself: nothing is copied, it is bound by its address."""

    def __init__(self, model: OnnxModel, values: Sequence[Any], row: int, lengths: IntArray) -> None:
        self.lengths = lengths
        self.binding = model._session.io_binding()
        self.binding.bind_output("logits", "cpu")
        shape = [1, *values[0].shape()[1:]]
        offset = row * int(np.prod(shape)) * np.dtype(model._dtype).itemsize
        for past, present, value in zip(model._past, model._present, values, strict=True):
            memory = (model._device, 0, model._dtype, shape, value.data_ptr() + offset)
            self.binding.bind_input(past, *memory)
            self.binding.bind_output(present, *memory)


class _Concatenated:
    """Keys and values that grow with every pass, and a mask that says which places count."""

    def __init__(self, batch: int, arrays: list[NDArray[Any]]) -> None:
        self.slots = Slots(batch)
        self.arrays = arrays  # each [B, H, S, D]

    @property
    def lengths(self) -> IntArray:
        return self.slots.lengths

    def trim(self, lengths: IntArray) -> None:
        width = self.slots.trim(lengths)
        self.arrays = [array[:, :, :width] for array in self.arrays]

    def select(self, rows: list[int]) -> None:
        self.slots.mask = self.slots.mask[rows]
        self.arrays = [array[rows] for array in self.arrays]


def _providers(wanted: Sequence[str] | None) -> list[str]:
    available = ort.get_available_providers()
    if wanted is None:
        return [name for name in ("CUDAExecutionProvider", "CPUExecutionProvider") if name in available]
    missing = [name for name in wanted if name not in available]
    if missing:
        raise ArtifactError(f"this ONNX Runtime has no {missing[0]!r}: it offers {available}")
    return list(wanted)
