"""Files that this package writes, whole or not at all, and reads by lines: texts, bytes, JSON lines."""

from __future__ import annotations

import glob
import hashlib
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from aligner_middleware.data.json_lines import open_bytes, reading, to_json
from aligner_middleware.errors import DataError, JobError

_STALE = 24 * 3600  # seconds after which a temporary file belongs to no living process


def fingerprint(*texts: str) -> str:
    """Hash texts: a sha256, in hexadecimal. Lone surrogates count too."""
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest()


def is_file(path: Path) -> bool:
    """Whether a path is a file; false where it cannot be checked, as for a name that is too long."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def is_folder(path: Path) -> bool:
    """Whether a path is a folder; false where it cannot be checked, as for a name that is too long."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as JSON lines; the file appears when it is whole.

    Raises:
        JobError: If it cannot be written.
    """
    _write(path, ((to_json(row) + "\n").encode() for row in rows))


def write_text(path: Path, text: str) -> None:
    """Write a text; the file appears when it is whole.

    Raises:
        JobError: If it cannot be written.
    """
    _write(path, [text.encode()])


def write_bytes(path: Path, data: bytes) -> None:
    """Write bytes; the file appears when it is whole.

    Raises:
        JobError: If it cannot be written.
    """
    _write(path, [data])


def _write(path: Path, parts: Iterable[bytes]) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):  # by a process that was killed
            with suppress(OSError):
                if time.time() - leftover.stat().st_mtime > _STALE:
                    leftover.unlink()
        try:
            with temporary.open("xb") as file:
                file.writelines(parts)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as exc:
        raise JobError(path, f"cannot be written: {exc.strerror or exc}") from exc


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Give the lines of a file, plain or gzipped, that are not blank, with their numbers from 1.

    Raises:
        JobError: If it cannot be read.
        DataError: If a line is not UTF-8 text.
    """
    with reading(path), TextIOWrapper(open_bytes(path), encoding="utf-8", errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            _check_utf8(path, number, line)
            if line.strip():
                yield number, line


def _check_utf8(path: Path, number: int, line: str) -> None:
    """Find bytes that are not UTF-8: they were read as lone surrogates, which valid UTF-8 never gives."""
    try:
        line.encode()
    except UnicodeEncodeError as exc:
        byte = ord(line[exc.start]) & 0xFF
        raise DataError(str(path), number, f"is not UTF-8 text: it holds the byte 0x{byte:02x}") from exc
