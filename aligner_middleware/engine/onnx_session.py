"""Sessions of ONNX Runtime: options, execution providers, loading. It knows no KV cache and no token."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnxruntime as ort

from aligner_middleware.artifact import Artifact
from aligner_middleware.errors import ArtifactError, InputError, did_you_mean
from aligner_middleware.forks import Lock

logger = logging.getLogger("aligner_middleware")

_SPIN = 20  # microseconds that a thread spins for its next piece of work before it sleeps
_PLAIN_ATTENTION = "ORT_GQA_DISABLE_FLASH_ATTENTION"
_environment = Lock()


def session_options() -> Any:
    """Options of every session: few logs, little memory, and the same sums of integers on every x86 CPU."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    # Weights are allocated in exactly their size, not from an arena that grows in large steps.
    options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    # Without VNNI instructions, pairs of products are summed in 16 bits, which overflow. This selects the exact kernel there,
    # which is a fifth slower. CPUs with VNNI are exact anyway, and no slower (docs/engine.md).
    options.add_session_config_entry("session.x64quantprecision", "1")
    # By itself ONNX Runtime lets idle threads spin for long. Where cores are shared, those that wait then keep those that
    # work from running, and a correction takes half as long again or twice as long (benchmarks/spinning.py).
    options.add_session_config_entry("session.intra_op.spin_duration_us", str(_SPIN))
    return options


def load_session(path: Path, options: Any, providers: list[str]) -> Any:
    """Load a graph.

    GroupQueryAttention's tiled kernel for the CPU takes twice the time of its plain one at the lengths of answers
    (benchmarks/README.md), so it is turned off while the operators are made.
    """
    with _environment:
        before = os.environ.get(_PLAIN_ATTENTION)
        os.environ.setdefault(_PLAIN_ATTENTION, "1")
        ort.set_default_logger_severity(4)  # without CUDA's libraries a GPU build logs much, then takes the CPU
        try:
            return ort.InferenceSession(path, options, providers=providers, enable_fallback=False)
        except Exception as exc:  # ONNX Runtime raises its own classes, without a common base
            raise ArtifactError(f"ONNX Runtime cannot load {path}: {exc}") from exc
        finally:
            ort.set_default_logger_severity(2)
            if before is None:
                del os.environ[_PLAIN_ATTENTION]


def choose_providers(wanted: Sequence[str] | None, artifact: Artifact) -> list[str]:
    """Choose execution providers. CUDA has no operator for products of integers: such a graph runs on the CPU."""
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


def check_in_use(wanted: Sequence[str] | None, used: Sequence[str]) -> None:
    """Warn if a requested provider is not used: ONNX Runtime falls back to the CPU without a message.

    Raises:
        ArtifactError: If none of them is used.
    """
    missing = [name for name in wanted or () if name not in used]
    if missing and len(missing) == len(wanted or ()):
        raise ArtifactError(
            f"{missing[0]} could not be started here (is there such a device, and its libraries?), only {used[0]}: leave "
            "providers out to use the devices that are there"
        )
    if missing:
        logger.warning("%s is not used here: this aligner runs on %s", ", ".join(missing), used[0])


def give_memory_back() -> None:
    """Have glibc return freed memory to the system: a third of the process's, after loading. Does nothing elsewhere."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
