"""A decoder in ONNX Runtime, over the graphs that `build/` makes.

Both kinds of graph take `input_ids` `[B, T]` and `positions` `[B, P]` (columns of `input_ids` whose prediction is wanted)
and give `logits` `[B, P, V]`.

- `fused`: attention is one GroupQueryAttention operator a layer. It writes keys and values into buffers `[rows, H, S, D]`
  that are allocated once, and bound as input and output both, so no pass copies the past. A row is bound by its address.
- `standard`: as optimum exports it. Every pass takes the past and gives it back longer; each row goes through by itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import mmap
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from aligner_middleware.artifact import Artifact, Probe
from aligner_middleware.engine.model import IntArray, Logits, Rows
from aligner_middleware.errors import ArtifactError, InputError, did_you_mean

logger = logging.getLogger("aligner_middleware")

_CHUNK = 192  # tokens of a sequence that go through at once: attention compares each with all before the chunk's end
_SHARED_TOKENS, _FILLING = 768, 0.25  # of a pass over several prompts: tokens at most, and share of them that only fill
_PROBE_TOLERANCE = (
    1.0  # of a logit, on average: other CPUs round differently, those that cannot do the graph's work differ by more
)
_PLAIN_ATTENTION = "ORT_GQA_DISABLE_FLASH_ATTENTION"
_environment = threading.Lock()


class OnnxModel:
    """A decoder-only network in an ONNX Runtime session. Safe to share between threads; its rows are not.

    Args:
        path: The `model.onnx`.
        artifact: What stands in `aligner.json` beside it.
        providers: Execution providers in order of preference; `None` for CUDA where there is one and it can run the graph,
            and the CPU.
        threads: Threads of one pass; `None` for all cores.

    Attributes:
        device: The first execution provider in use.

    Raises:
        InputError: If `providers` is no list of names.
        ArtifactError: If ONNX Runtime cannot load the graph, lacks a provider asked for, or can start none of them.
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
        options = session_options()
        if threads is not None:
            options.intra_op_num_threads = threads
        self._session = _session(path, options, _providers(providers, artifact))
        self.device = self.providers[0]
        _check_in_use(providers, self.providers)
        artifact.check_graph(path, {value.name: value.shape for value in self._session.get_inputs()})
        inputs = {value.name: value.type for value in self._session.get_inputs()}
        self._inputs = frozenset(inputs)
        self._dtype = np.float16 if inputs["past_key_values.0.key"] == "tensor(float16)" else np.float32
        self._device = "cuda" if self.device == "CUDAExecutionProvider" else "cpu"
        sides = [(layer, side) for layer in range(artifact.layers) for side in ("key", "value")]
        self._past = [f"past_key_values.{layer}.{side}" for layer, side in sides]
        self._present = [f"present.{layer}.{side}" for layer, side in sides]
        self._check(path, artifact.probe)
        _give_memory_back()

    def _check(self, path: Path, probe: Probe | None) -> None:
        """Say so if this machine computes something else than the one that built the graph; the first pass is over then."""
        if probe is None:
            return
        (*_, logits) = self.new_rows(1, len(probe.tokens)).extend(0, probe.tokens, 1)
        difference = float(np.abs(logits[0, list(probe.top)] - probe.logits).mean())
        if not difference <= _PROBE_TOLERANCE:
            raise ArtifactError(
                f"{path} gives other results here than where it was exported (logits differ by {difference:.1f}): this "
                f"machine has not the instructions for it, export the aligner again on this one"
            )

    @property
    def providers(self) -> list[str]:
        """Execution providers in use."""
        return list(self._session.get_providers())

    @property
    def bytes_per_token(self) -> int:
        """Memory that a token's keys and values take."""
        return len(self._past) * self._artifact.kv_heads * self._artifact.head_size * np.dtype(self._dtype).itemsize

    def new_rows(self, rows: int, capacity: int) -> Rows:
        """Make empty rows of `capacity` tokens each. On the CPU, memory is taken as they fill."""
        kind = _FusedRows if self._artifact.graph == "fused" else _StandardRows
        return kind(self, rows, capacity)


class _FusedRows:
    """Keys and values in buffers that all passes share.

    Attention of a single token adds in another order than that of several. Where activations are integers, that can tip
    one of them over, and then more. So a token that goes through alone takes a second one along, which is forgotten: what
    is decoded is then, bit for bit, what is verified. It costs a tenth to a fifth of the pass.
    """

    def __init__(self, model: OnnxModel, rows: int, capacity: int) -> None:
        self.capacity = capacity
        self._model = model
        self._lengths: IntArray = np.zeros(rows, dtype=np.int64)
        artifact = model._artifact
        self._shape = (rows, artifact.kv_heads, capacity, artifact.head_size)
        self._buffers = [
            ort.OrtValue.ortvalue_from_numpy(_zeros(self._shape, model._dtype), model._device, 0) for _ in model._past
        ]
        self._logits = np.empty((max(_CHUNK, rows), artifact.vocab_size), dtype=np.float32)
        self._bindings: dict[tuple[int, int], Any] = {}
        self._exact = artifact.weights == "products"
        self._options = ort.RunOptions()

    def extend(self, row: int, tokens: Sequence[int], wanted: int) -> Iterator[Logits]:
        """Append tokens to one row; see `Rows.extend`."""
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
        """Append one token to each of several rows; see `Rows.step`."""
        width = max(tokens) + 1  # rows between them go along: what is written to them is written over later
        given = np.array([[tokens.get(row, 0)] for row in range(width)], dtype=np.int64)
        counts = np.array([row in tokens for row in range(width)], dtype=np.int64)
        logits = self._run(0, width, given, np.zeros((width, 1), dtype=np.int64), counts)
        return logits[list(tokens), 0]

    def begin(self, prompts: Mapping[int, Sequence[int]]) -> Logits:
        """Fill several empty rows; see `Rows.begin`. Neighbouring rows of like length share a pass."""
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
        """Forget a row's latest tokens."""
        self._lengths[row] = length

    def stop(self) -> None:
        """End the pass that is under way after its present operator; see `Rows.stop`."""
        self._options.terminate = True

    def _run(self, row: int, count: int, tokens: IntArray, positions: IntArray, advance: IntArray) -> Logits:
        """Run `count` rows from `row` on, `[count, T]`, and give logits at `positions`, `[count, P, V]`."""
        binding = self._binding(row, count)
        lengths = self._lengths[row : row + count] + tokens.shape[1]
        lengths = np.minimum(lengths, self.capacity)  # of rows that only go along
        binding.bind_cpu_input("input_ids", tokens)
        binding.bind_cpu_input("positions", positions)
        binding.bind_cpu_input("seqlens_k", (lengths - 1).astype(np.int32))
        binding.bind_cpu_input("total_sequence_length", np.array(lengths.max(), dtype=np.int32))
        shape = [*positions.shape, self._logits.shape[1]]
        binding.bind_output("logits", "cpu", 0, np.float32, shape, self._logits.ctypes.data)
        self._model._session.run_with_iobinding(binding, self._options)
        self._lengths[row : row + count] += advance
        return self._logits[: positions.size].reshape(shape)

    def _binding(self, row: int, count: int) -> Any:
        if (row, count) not in self._bindings:
            model = self._model
            binding = self._bindings[row, count] = model._session.io_binding()
            shape = [count, *self._shape[1:]]
            offset = row * int(np.prod(self._shape[1:])) * np.dtype(model._dtype).itemsize
            for past, present, value in zip(model._past, model._present, self._buffers, strict=True):
                memory = (model._device, 0, model._dtype, shape, value.data_ptr() + offset)
                binding.bind_input(past, *memory)
                binding.bind_output(present, *memory)
        return self._bindings[row, count]


class _StandardRows:
    """Keys and values that grow with every pass."""

    def __init__(self, model: OnnxModel, rows: int, capacity: int) -> None:
        self.capacity = capacity
        self._model = model
        artifact = model._artifact
        empty = np.zeros((1, artifact.kv_heads, 0, artifact.head_size), model._dtype)
        self._arrays: list[list[NDArray[Any]]] = [[empty] * len(model._past) for _ in range(rows)]  # [1, H, S, D] each
        self._options = ort.RunOptions()

    def extend(self, row: int, tokens: Sequence[int], wanted: int) -> Iterator[Logits]:
        """Append tokens to one row; see `Rows.extend`."""
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
        feed |= dict(zip(self._model._past, self._arrays[row], strict=True))
        names = self._model._inputs
        given = {name: value for name, value in feed.items() if name in names}
        wanted_names = ["logits", *self._model._present]
        logits, *self._arrays[row] = self._model._session.run(wanted_names, given, self._options)
        wanted_logits: Logits = logits[0].astype(np.float32, copy=False)
        return wanted_logits

    def step(self, tokens: Mapping[int, int]) -> Logits:
        """Append one token to each of several rows, one after the other."""
        return np.concatenate([self._extend(row, [token], 1) for row, token in tokens.items()])

    def begin(self, prompts: Mapping[int, Sequence[int]]) -> Logits:
        """Fill several rows, one after the other."""
        return np.concatenate([self._extend(row, tokens, 1) for row, tokens in prompts.items()])

    def trim(self, row: int, length: int) -> None:
        """Forget a row's latest tokens."""
        self._arrays[row] = [array[:, :, :length] for array in self._arrays[row]]

    def stop(self) -> None:
        """End the pass that is under way after its present operator; see `Rows.stop`."""
        self._options.terminate = True


def session_options() -> Any:
    """Options of every session: quiet, frugal, and with the same sums of integers on every x86 CPU."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    # Weights take no more memory than they do themselves.
    options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    # Without VNNI instructions, pairs of products are summed in 16 bits, which overflow. This takes the exact kernel there,
    # which costs a fifth of the speed; CPUs with VNNI are exact, and as fast as before (docs/engine.md).
    options.add_session_config_entry("session.x64quantprecision", "1")
    return options


def _neighbours(prompts: Mapping[int, Sequence[int]]) -> list[list[int]]:
    """Group neighbouring rows whose prompts fit into one pass, without much filling."""
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


def _give_memory_back() -> None:
    """Have glibc return what loading needed and freed, a third of what is held then; elsewhere nothing is done."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _zeros(shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    """Make an array whose memory comes page by page, as it is written to. numpy's own comes in huge pages."""
    memory = mmap.mmap(-1, int(np.prod(shape)) * np.dtype(dtype).itemsize)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, dtype).reshape(shape)


def _session(path: Path, options: Any, providers: list[str]) -> Any:
    """Load a graph.

    GroupQueryAttention's tiled kernel for the CPU takes twice the time of its plain one at the lengths of answers
    (benchmarks/README.md), so it is turned off while the operators are made.
    """
    with _environment:
        before = os.environ.get(_PLAIN_ATTENTION)
        os.environ.setdefault(_PLAIN_ATTENTION, "1")
        ort.set_default_logger_severity(4)  # a GPU build without CUDA's libraries falls back to the CPU, at length
        try:
            return ort.InferenceSession(path, options, providers=providers, enable_fallback=False)
        except Exception as exc:  # ONNX Runtime raises its own classes, without a common base
            raise ArtifactError(f"ONNX Runtime cannot load {path}: {exc}") from exc
        finally:
            ort.set_default_logger_severity(2)
            if before is None:
                del os.environ[_PLAIN_ATTENTION]


def _providers(wanted: Sequence[str] | None, artifact: Artifact) -> list[str]:
    """Choose execution providers. CUDA has no operator for products of integers: that graph is for the CPU."""
    available = ort.get_available_providers()
    if wanted is None and artifact.weights == "products":
        return ["CPUExecutionProvider"]
    if wanted is None:
        return [name for name in ("CUDAExecutionProvider", "CPUExecutionProvider") if name in available]
    if isinstance(wanted, str) or not wanted or not all(isinstance(name, str) for name in wanted):
        raise InputError(f"providers is {wanted!r}, expected a list of names such as {available}, or None")
    for name in wanted:
        if name not in available:
            hint = did_you_mean(name, available)
            raise ArtifactError(f"this ONNX Runtime has no {name!r}: it offers {available}{hint}")
    if artifact.weights != "products":
        return list(wanted)
    if "CPUExecutionProvider" not in wanted:
        raise ArtifactError(
            f"this aligner's weights are integers for the CPU, which cannot run on {wanted[0]}: leave providers out, or take "
            "precision='float16' for a GPU"
        )
    return ["CPUExecutionProvider"]


def _check_in_use(wanted: Sequence[str] | None, used: Sequence[str]) -> None:
    """Say so where a provider that was asked for is not used: ONNX Runtime goes on with the CPU, and says nothing.

    Raises:
        ArtifactError: If none did.
    """
    missing = [name for name in wanted or () if name not in used]
    if missing and len(missing) == len(wanted or ()):
        raise ArtifactError(
            f"{missing[0]} could not be started here (is there such a device, and its libraries?), only {used[0]}: leave "
            "providers out for what there is"
        )
    if missing:
        logger.warning("%s is not used here: this aligner runs on %s", ", ".join(missing), used[0])
