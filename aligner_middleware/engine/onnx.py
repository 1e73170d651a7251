"""A decoder in ONNX Runtime: a graph that `export/` made, checked and loaded. Its KV caches are in `onnx_cache.py`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from aligner_middleware.artifact import Artifact, Probe
from aligner_middleware.engine.model import KVCache
from aligner_middleware.engine.onnx_cache import FusedCache, Graph, StandardCache
from aligner_middleware.engine.onnx_session import (
    check_in_use,
    choose_providers,
    give_memory_back,
    load_session,
    session_options,
)
from aligner_middleware.errors import ArtifactError

# Mean difference of a logit: other CPUs round differently by less; CPUs that compute the graph wrongly differ by more.
_PROBE_TOLERANCE = 1.0


class OnnxModel:
    """A decoder-only network in an ONNX Runtime session. Safe to share between threads; its rows are not.

    Args:
        path: The `model.onnx`.
        artifact: The content of the `aligner.json` beside it.
        providers: Execution providers in order of preference; `None` for CUDA where there is one and it can run the graph,
            and the CPU.
        threads: Threads of one pass; `None` for all cores.

    Attributes:
        device: The first execution provider in use.

    Raises:
        InputError: If `providers` is not a list of names.
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
        options = session_options()
        if threads is not None:
            options.intra_op_num_threads = threads
        self._session = load_session(path, options, choose_providers(providers, artifact))
        self.device = self.providers[0]
        check_in_use(providers, self.providers)
        artifact.check_graph(path, {value.name: value.shape for value in self._session.get_inputs()})
        self._graph = Graph.of(self._session, artifact, "cuda" if self.device == "CUDAExecutionProvider" else "cpu")
        self._check(path, artifact.probe)
        give_memory_back()

    def _check(self, path: Path, probe: Probe | None) -> None:
        """Refuse a graph that computes other logits here than where it was built. This is also the slow first pass."""
        if probe is None:
            return
        (*_, logits) = self.new_cache(1, len(probe.tokens)).extend(0, probe.tokens, 1)
        difference = float(np.abs(logits[0, list(probe.top)] - probe.logits).mean())
        if not difference <= _PROBE_TOLERANCE:
            raise ArtifactError(
                f"{path} gives other results here than where it was exported (logits differ by {difference:.1f}): this "
                f"machine lacks instructions that the graph needs, export the aligner again on it"
            )

    @property
    def providers(self) -> list[str]:
        """Execution providers in use."""
        return list(self._session.get_providers())

    @property
    def bytes_per_token(self) -> int:
        """Memory that a token's keys and values take."""
        graph = self._graph
        values = len(graph.past) * graph.artifact.kv_heads * graph.artifact.head_size
        return values * int(np.dtype(graph.dtype).itemsize)

    def new_cache(self, rows: int, capacity: int) -> KVCache:
        """Make empty rows of `capacity` tokens each. On the CPU, they take memory as they fill."""
        kind = FusedCache if self._graph.artifact.graph == "fused" else StandardCache
        return kind(self._graph, rows, capacity)
