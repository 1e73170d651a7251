"""Locks between processes: one process at a time works on a file or a folder. A lock is a hidden file beside it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from aligner_middleware.data.disk import reason_of
from aligner_middleware.errors import JobError

logger = logging.getLogger(__name__)

_held: set[Path] = set()  # by this process: on NFS locks belong to processes, which would get one a second time


@contextmanager
def exclusive_lock(path: Path) -> Iterator[None]:
    """Hold the lock of a file or a folder.

    Raises:
        JobError: If another process holds it, or if its file cannot be written.
    """
    try:
        lock = _lock(path)
        lock.acquire(timeout=0)
    except Timeout:
        raise JobError(path, "another process works on this job: wait for it, or end it") from None
    except OSError as exc:
        raise JobError(path, f"cannot be written: {reason_of(exc)}") from exc
    with _holding(lock, path):
        yield


@contextmanager
def waiting_lock(path: Path) -> Iterator[None]:
    """Hold the lock of a file or a folder; wait, with a warning, while another process holds it."""
    lock = _lock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.warning("another process is writing %s: waiting for it", path)
        lock.acquire()
    with _holding(lock, path):
        yield


def held_paths() -> frozenset[Path]:
    """Give the absolute paths whose locks this process holds."""
    return frozenset(_held)


def _lock(path: Path) -> FileLock:
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path.with_name(f".{path.name.removeprefix('.')}.lock"))


@contextmanager
def _holding(lock: FileLock, path: Path) -> Iterator[None]:
    place = path.absolute()
    _held.add(place)
    try:
        yield
    finally:
        _held.discard(place)
        lock.release()
