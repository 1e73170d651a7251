"""Stores trained weights as a compact difference to the base, in a few bits a weight.

Each matrix differs by `codes * scale`, with codes -n, …, -1, 1, …, n in groups of 128 that share a scale: the codes are
stored as bit planes, 8 weights a byte. Small parts (norms, single rows of the embeddings) are stored in float16.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from aligner_middleware.data.checked import check_version
from aligner_middleware.errors import ArtifactError, BuildError

if TYPE_CHECKING:
    import torch

DIFFERENCE_FILE = "difference.safetensors"

_FORMAT, _VERSION = "aligner difference", 1
TRAIN_AGAIN = "train the aligner again"
_GROUP = 128  # weights that share a scale
_SMALL = 2**16  # weights; below that, fewer bits than float16 save next to nothing
_SEARCH = (
    0.15,
    0.2,
    0.25,
    0.3,
    0.4,
    0.5,
    0.6,
    0.7,
    0.8,
    0.9,
    1.0,
)  # scales tried, as shares of the group's largest weight

Floats = NDArray[np.float32]


def save_difference(
    trained: Mapping[str, torch.Tensor], base: Mapping[str, torch.Tensor], bits: int, path: Path
) -> float:
    """Write the difference of trained weights to their base.

    Args:
        trained: Weights after training, by name.
        base: Weights before it, by the same names.
        bits: Bits of a weight of large matrices, 1 to 8.
        path: The safetensors file.

    Returns:
        Share of the difference's squared norm that the file holds, 0 to 1.
    """
    from safetensors.numpy import save_file

    stored: dict[str, NDArray[Any]] = {}
    whole = lost = 0.0
    for name, weight in trained.items():
        difference: Floats = (weight.detach().float() - base[name].detach().float()).cpu().numpy()
        if not difference.any():
            continue
        stored[f"{name}:shape"] = np.array(difference.shape, dtype=np.int64)
        rows = np.flatnonzero(difference.reshape(len(difference), -1).any(axis=1))
        if len(rows) * difference[0].size <= _SMALL:
            stored[f"{name}:rows"] = rows.astype(np.int32)
            stored[f"{name}:values"] = difference[rows].astype(np.float16)
            continue
        groups = _grouped(difference)
        scales, codes = _quantise(groups, bits)
        stored[f"{name}:scales"] = scales.astype(np.float16)
        stored[f"{name}:planes"] = np.stack([np.packbits((codes >> bit) & 1) for bit in range(bits)])
        whole += float((groups**2).sum())
        lost += float(((_values(codes, bits) * scales.astype(np.float16).astype(np.float32) - groups) ** 2).sum())
    save_file(stored, path, metadata={"format": f"{_FORMAT} {_VERSION}"})
    return 1 - lost / whole if whole else 1.0


def add_difference(model: Any, path: Path) -> None:
    """Add a stored difference to the base model in place.

    Raises:
        ArtifactError: If the file is damaged, or was written by a newer version.
        BuildError: If it belongs to another base: a weight is missing, or has another shape.
    """
    import torch

    parts = _read(path)
    weights = dict(model.named_parameters())
    for name, stored in parts.items():
        if name not in weights:
            raise BuildError(f"{path} does not fit its base model, which has no weights {name[:100]!r}")
        shape = tuple(weights[name].shape)
        found = stored["shape"].tolist() if "shape" in stored else None
        if found != list(shape):
            raise BuildError(
                f"{path} does not fit its base model at {name!r}, of shape {list(shape)}: it is for {str(found)[:100]}"
            )
        _check(stored, shape, f"{path} cannot be used ({name}", f": {TRAIN_AGAIN}")
    for name, stored in parts.items():
        with torch.no_grad():
            weights[name] += torch.from_numpy(_restored(stored, weights[name].shape)).to(weights[name].dtype)


def _read(path: Path) -> dict[str, dict[str, NDArray[Any]]]:
    """Read the parts of each weight's difference, by its name and theirs."""
    from safetensors import safe_open

    parts: dict[str, dict[str, NDArray[Any]]] = {}
    try:
        with safe_open(path, "numpy") as file:
            kind, _, version = (file.metadata() or {}).get("format", "").rpartition(" ")
            if kind == _FORMAT and version.isdecimal():
                check_version({"format_version": int(version[:9])}, _VERSION, path, TRAIN_AGAIN)
            if (kind, version) != (_FORMAT, str(_VERSION)):
                raise ArtifactError(f"{path} cannot be used (format: it is not a difference): {TRAIN_AGAIN}")
            for key in file.keys():  # noqa: SIM118  # it is no mapping
                name, _, part = key.rpartition(":")
                parts.setdefault(name, {})[part] = file.get_tensor(key)
    except ArtifactError:
        raise
    except Exception as exc:  # safetensors raises its own class, without a common base, and numpy for unknown types
        raise ArtifactError(f"{path} cannot be used ({str(exc)[:300]}): {TRAIN_AGAIN}") from exc
    return parts


def _check(parts: Mapping[str, NDArray[Any]], shape: tuple[int, ...], before: str, after: str) -> None:
    """Check that the parts of a difference have the sizes that its shape requires.

    Raises:
        ArtifactError: If they are not; the message stands between `before` and `after`.
    """
    groups = -(-math.prod(shape) // _GROUP)
    rows = parts["rows"].size if "rows" in parts else 0
    planes = parts["planes"].shape[:1] if "planes" in parts else ()
    forms = {
        "rows": ("iu", (rows,)),
        "values": ("f", (rows, *shape[1:])),
        "scales": ("f", (groups, 1)),
        "planes": ("u", (*planes, groups * _GROUP // 8)),
    }
    names = parts.keys() - {"shape"}
    if names not in ({"rows", "values"}, {"scales", "planes"}):
        raise ArtifactError(f"{before}: it has the parts {str(sorted(names))[:100]}){after}")
    for name in sorted(names):
        kinds, expected = forms[name]
        part = parts[name]
        if part.dtype.kind not in kinds or part.shape != expected:
            raise ArtifactError(f"{before}:{name}: {part.dtype} of shape {part.shape}, expected {expected}){after}")
        if part.dtype.kind == "f" and not np.isfinite(part).all():
            raise ArtifactError(f"{before}:{name}: a number is not finite){after}")
    if rows and not 0 <= parts["rows"].min() <= parts["rows"].max() < shape[0]:
        raise ArtifactError(
            f"{before}:rows: from {parts['rows'].min()} to {parts['rows'].max()}, of {shape[0]}){after}"
        )
    if planes and not 1 <= planes[0] <= 8:
        raise ArtifactError(f"{before}:planes: {planes[0]} bits, expected 1 to 8){after}")


def _restored(parts: Mapping[str, NDArray[Any]], shape: tuple[int, ...]) -> Floats:
    difference = np.zeros(shape, dtype=np.float32)
    if "rows" in parts:
        difference[parts["rows"]] = parts["values"]
        return difference
    planes = parts["planes"]
    count = len(parts["scales"]) * _GROUP
    bits = [np.unpackbits(plane)[:count].astype(np.int16) << bit for bit, plane in enumerate(planes)]
    codes = np.sum(bits, axis=0).reshape(-1, _GROUP)
    values = _values(codes, len(planes)) * parts["scales"].astype(np.float32)
    return values.reshape(-1)[: difference.size].reshape(shape)


def _grouped(difference: Floats) -> Floats:
    flat = difference.reshape(-1)
    return np.pad(flat, (0, -len(flat) % _GROUP)).reshape(-1, _GROUP)


def _values(codes: NDArray[Any], bits: int) -> Floats:
    """Map codes 0, …, 2^bits - 1 to equidistant values from -1 to 1; for 1 bit, -1 and 1."""
    values: Floats = (2 * codes.astype(np.float32) / (2**bits - 1)) - 1
    return values


def _quantise(groups: Floats, bits: int) -> tuple[Floats, NDArray[np.uint8]]:
    """Find for each group the scale of least squared error, `[G, 1]`, and its codes, `[G, 128]`."""
    largest = np.maximum(np.abs(groups).max(axis=1, keepdims=True), 1e-8)
    best = np.full((len(groups), 1), np.inf, dtype=np.float32)
    scales = largest.copy()
    for share in _SEARCH:
        scale = largest * share
        error = ((_values(_codes(groups, scale, bits), bits) * scale - groups) ** 2).sum(axis=1, keepdims=True)
        scales = np.where(error < best, scale, scales)
        best = np.minimum(error, best)
    return scales, _codes(groups, scales, bits)


def _codes(groups: Floats, scales: Floats, bits: int) -> NDArray[np.uint8]:
    highest = 2**bits - 1
    codes: NDArray[np.uint8] = np.clip(np.rint((groups / scales + 1) * highest / 2), 0, highest).astype(np.uint8)
    return codes
