"""Files of text and of JSON lines: read with the numbers of their lines, written whole or not at all."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from filelock import FileLock, Timeout

from aligner_middleware.errors import DataError


def fingerprint(*texts: str) -> str:
    """Tell texts from others: a sha256, in hexadecimal. Lone surrogates count too."""
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest()


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Keep other processes from working on the same file or folder meanwhile.

    Raises:
        DataError: If one does already, or if the lock, a hidden file beside `path`, cannot be written.
    """
    lock = FileLock(path.with_name(f".{path.name.removeprefix('.')}.lock"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise DataError(str(path), 1, "another process works on this job: wait for it, or end it") from None
    except OSError as exc:
        raise DataError(str(path), 1, f"cannot be written: {exc.strerror or exc}") from exc
    try:
        yield
    finally:
        lock.release()


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as JSON lines; the file appears when it is whole.

    Raises:
        DataError: If it cannot be written.
    """
    _write(path, ((json.dumps(row, ensure_ascii=False) + "\n").encode() for row in rows))


def write_text(path: Path, text: str) -> None:
    """Write a text; the file appears when it is whole.

    Raises:
        DataError: If it cannot be written.
    """
    _write(path, [text.encode()])


def write_bytes(path: Path, data: bytes) -> None:
    """Write bytes; the file appears when it is whole.

    Raises:
        DataError: If it cannot be written.
    """
    _write(path, [data])


def _write(path: Path, parts: Iterable[bytes]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.writelines(parts)
        temporary.replace(path)
    except OSError as exc:
        raise DataError(str(path), 1, f"cannot be written: {exc.strerror or exc}") from exc


def lines_of(path: Path) -> Iterator[tuple[int, str]]:
    """Give the lines of a file, plain or gzipped, that are not blank, with their numbers from 1.

    Raises:
        DataError: If it cannot be read.
    """
    try:
        with _open(path) as file:
            yield from ((number, line) for number, line in enumerate(file, 1) if line.strip())
    except (OSError, EOFError) as exc:
        raise DataError(str(path), 1, f"cannot be read: {getattr(exc, 'strerror', None) or exc}") from exc
    except UnicodeDecodeError as exc:
        raise DataError(str(path), 1, f"is not UTF-8 text: {exc}") from exc


def _open(path: Path) -> TextIO:
    return gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")
