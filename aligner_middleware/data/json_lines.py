"""JSON lines: from a line to a text of a row, and from numbers to what JSON has for them."""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

from aligner_middleware.errors import DataError


def parse_json(text: str | bytes) -> Any:
    """Read a JSON text.

    Raises:
        ValueError: If it is none, or is nested more deeply than Python can read.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def text_at(row: Mapping[str, Any], key: str) -> str:
    """Give the text that a row of a JSON file has under a key.

    Raises:
        ValueError: If it has none, naming the key and what is there instead.
    """
    if key not in row:
        raise ValueError(f"{key} is missing")
    value = row[key]
    if not isinstance(value, str):
        found = "a list" if isinstance(value, list) else "an object" if isinstance(value, dict) else json.dumps(value)
        raise ValueError(f"{key} is {found}, expected a text")
    return value


def finite(value: Any) -> Any:
    """Write what is no finite number as null, which is what JSON has for it."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def open_bytes(path: Path) -> gzip.GzipFile | BufferedReader:
    """Open a file, plain or gzipped."""
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


@contextmanager
def reading(path: Path | str) -> Iterator[None]:
    """Raise a `DataError` that names a file where it cannot be read or unpacked."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as exc:
        raise DataError(str(path), 1, f"cannot be read: {getattr(exc, 'strerror', None) or exc}") from exc
