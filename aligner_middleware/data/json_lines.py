"""JSON lines: parse a line, take a text out of its row, open a file; write numbers that JSON has no form for as null."""

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

from aligner_middleware.errors import JobError


def parse_json(text: str | bytes) -> Any:
    """Read a JSON text.

    Raises:
        ValueError: If it is not JSON, or is nested more deeply than Python can read.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def text_at(row: Mapping[str, Any], key: str) -> str:
    """Give the text that a row of a JSON file has under a key.

    Raises:
        ValueError: If the key is missing or its value is no text; the message names the key and the value.
    """
    if key not in row:
        raise ValueError(f"{key} is missing")
    value = row[key]
    if not isinstance(value, str):
        given = "a list" if isinstance(value, list) else "an object" if isinstance(value, dict) else json.dumps(value)
        raise ValueError(f"{key} is {given}, expected a text")
    return value


def finite(value: Any) -> Any:
    """Replace infinities and NaN by null: JSON has no form for them."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_json(value: Any, encoding: str = "utf-8") -> str:
    """Write a value as one line of JSON that an encoding has all characters for; what is no finite number as null."""
    text = json.dumps(finite(value), ensure_ascii=False)
    try:
        text.encode(encoding)
    except UnicodeEncodeError:  # a lone surrogate, or an encoding that lacks a character
        return json.dumps(finite(value))
    return text


def open_bytes(path: Path) -> gzip.GzipFile | BufferedReader:
    """Open a file, plain or gzipped."""
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


@contextmanager
def reading(path: Path | str) -> Iterator[None]:
    """Turn errors of reading or unpacking a file into a `JobError` that names it."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as exc:
        raise JobError(path, f"cannot be read: {getattr(exc, 'strerror', None) or exc}") from exc
