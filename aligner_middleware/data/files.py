"""Files and folders that this package writes: whole or not at all, by one process at a time, and over nobody else's files.

Files of text and of JSON lines are read with the numbers of their lines.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from aligner_middleware.data.json_lines import open_bytes, reading
from aligner_middleware.errors import BuildError, DataError

logger = logging.getLogger(__name__)

_SCRATCH = ".aligner-new"  # ends the names of hidden folders in which others are made
_MADE, _REPLACED = "made", "replaced"  # what is in such a folder
_STALE = 24 * 3600  # seconds after which a temporary file belongs to no living process
_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)  # what only writing meets
# How torch and numpy say that a write was cut short; they do not say why.
_TORN = re.compile(r"unexpected pos \d+|iostream error|write\(\): fd \d+ failed|\d+ requested and \d+ written")
_held: set[Path] = set()  # by this process: where locks are the process's (NFS), it would get them a second time


def fingerprint(*texts: str) -> str:
    """Tell texts from others: a sha256, in hexadecimal. Lone surrogates count too."""
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest()


def is_file(path: Path) -> bool:
    """Whether there is a file; not if that cannot be known, as of a name that is too long."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def is_folder(path: Path) -> bool:
    """Whether there is a folder; not if that cannot be known, as of a name that is too long."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Keep other processes from working on the same file or folder meanwhile.

    Raises:
        DataError: If one does already, or if the lock, a hidden file beside `path`, cannot be written.
    """
    try:
        lock = _lock(path)
        lock.acquire(timeout=0)
    except Timeout:
        raise DataError(str(path), 1, "another process works on this job: wait for it, or end it") from None
    except OSError as exc:
        raise DataError(str(path), 1, f"cannot be written: {_reason(exc)}") from exc
    with _holding(lock, path):
        yield


@contextmanager
def _after_others(path: Path) -> Iterator[None]:
    """Do the same, but wait while another process works on it, and say so."""
    lock = _lock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.warning("another process is writing %s: waiting for it", path)
        lock.acquire()
    with _holding(lock, path):
        yield


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


@dataclass(frozen=True)
class FolderKind:
    """A kind of folder that this package writes, and so may replace.

    Attributes:
        what: What to call one.
        mark: The file that each of them holds; `None` where its place alone tells that it is ours.
        others: Patterns of everything else in it; those of folders end in `/`.
    """

    what: str
    mark: str | None
    others: tuple[str, ...]

    @property
    def cached(self) -> FolderKind:
        """The same in the cache, where all is built by us: a damaged one may have lost its mark."""
        return replace(self, mark=None, others=(*self.others, self.mark or ""))

    def covers(self, path: Path) -> bool:
        """Whether a file or folder is of those in such a folder: by its own name, or while it is being written."""
        if path.is_dir() and not path.is_symlink():
            return any(fnmatchcase(path.name + "/", one) for one in self.others if one.endswith("/"))
        patterns = [one for one in (self.mark or "", *self.others) if not one.endswith("/")]
        return any(fnmatchcase(path.name, one) or fnmatchcase(path.name, f".{one}.*.tmp") for one in patterns)


def check_ours(folder: Path, kind: FolderKind) -> None:
    """See that a folder holds nothing of a user's: it is missing or empty, or of this kind with nothing else in it.

    This alone decides what may be deleted, and in what folder a job may go on.

    Args:
        folder: The folder.
        kind: What is to be written there.

    Raises:
        BuildError: If it does; the message names what is in the way.
    """
    try:
        inside = sorted(folder.iterdir())
    except FileNotFoundError:
        return
    except NotADirectoryError:
        raise BuildError(f"{folder} is a file, expected a folder: name another one") from None
    except OSError as exc:
        raise BuildError(f"{folder} cannot be read: {_reason(exc)}: name another folder") from exc
    foreign = [path.name for path in inside if not kind.covers(path)]
    begun = [path.name for path in inside if path.name.endswith(".tmp")]  # by a process that was killed
    marked = kind.mark is None or any(path.name == kind.mark for path in inside)
    if not marked and (foreign or len(begun) < len(inside)):
        raise BuildError(
            f"{folder} is not empty, and not {kind.what} (it has no {kind.mark}): nothing was touched, name another folder"
        )
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise BuildError(
            f"{folder} holds {foreign[0]!r}{more}, which is no part of {kind.what}: nothing was touched, "
            "move that away or name another folder"
        )


def check_replaceable(folder: Path, kind: FolderKind) -> None:
    """See that a folder may be replaced, and can be.

    Raises:
        BuildError: As `check_ours` does; or if it is a mount point, or the current folder.
    """
    check_ours(folder, kind)
    with suppress(FileNotFoundError):  # of either
        current = folder.samefile(Path.cwd())
        if current or os.path.ismount(folder):
            what = "the current folder" if current else "a mount point"
            raise BuildError(f"{folder} is {what}, which cannot be replaced: name a folder inside it")


def write_folder(
    folder: Path,
    build: Callable[[Path], object],
    kind: FolderKind,
    *,
    unless: Callable[[Path], bool] | None = None,
    advice: str = "free some space, or name another folder",
) -> None:
    """Have `build` fill a temporary folder, and rename it to `folder` when it is whole.

    Of several processes one works at a time; the others wait. If `build` raises, nothing stays. What a killed one left
    beside `folder` is removed first, and a folder that it had just moved away comes back.

    Args:
        folder: The folder that shall be there afterwards. Beside it stays a hidden lock, an empty file.
        build: Fills the empty folder that it is given; it may put temporary files beside that one.
        kind: What it makes. Only a folder of this kind is replaced.
        unless: Whether the folder is as it shall be already: asked once no other process works on it any more.
        advice: What to do about a folder that cannot be written.

    Raises:
        BuildError: If the folder holds something else, or cannot be written.
    """
    folder = folder.resolve()  # a link stays, and what it names is replaced
    scratch = _scratch(folder)
    with disk_errors(folder, advice), _after_others(folder):
        sweep(folder.parent, folder)
        if unless is not None and unless(folder):
            return
        check_replaceable(folder, kind)
        try:
            made = scratch / _MADE
            made.mkdir(parents=True)
            build(made)
            for path in made.iterdir():  # safetensors lets nobody else read what it writes
                path.chmod(path.stat().st_mode | made.stat().st_mode & 0o666)
            check_replaceable(folder, kind)
            if folder.exists():
                folder.rename(scratch / _REPLACED)
            made.rename(folder)
        finally:
            _clear(scratch, folder)


def remove_folder(folder: Path, kind: FolderKind) -> None:
    """Delete a folder of ours; one that is deleted in part only is never seen.

    Raises:
        BuildError: If it holds something else: nothing is deleted then.
    """
    if not folder.exists():
        return
    check_ours(folder, kind)
    scratch = _scratch(folder)
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    folder.rename(scratch / _MADE)
    shutil.rmtree(scratch, ignore_errors=True)


def sweep(parent: Path, own: Path | None = None) -> None:
    """Remove temporary folders of processes that were killed, where that can be; those of living ones hold their lock.

    Args:
        parent: Where to look.
        own: A folder in it whose lock the caller holds.
    """
    for scratch in parent.resolve().glob(f".*{glob.escape(_SCRATCH)}"):
        folder = scratch.parent / scratch.name[1 : -len(_SCRATCH)]
        if own is not None and scratch == _scratch(own):
            _clear(scratch, own)
        elif not any(scratch == _scratch(held) for held in _held.copy()):
            with suppress(DataError, OSError), alone(folder):
                _clear(scratch, folder)


def _scratch(folder: Path) -> Path:
    return folder.with_name(f".{folder.name.removeprefix('.')}{_SCRATCH}")


def _clear(scratch: Path, folder: Path) -> None:
    """Remove a temporary folder, but not the only copy of what it was to replace."""
    if (scratch / _REPLACED).is_dir() and not folder.exists():
        (scratch / _REPLACED).rename(folder)
    shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def disk_errors(folder: Path, advice: str) -> Iterator[None]:
    """Turn errors of the file system within into one that names the folder, whatever library meets them.

    Raises:
        BuildError: Instead of them, with `advice` at its end.
    """
    try:
        yield
    except Exception as exc:
        reason = _disk_reason(exc)
        if reason is None:
            raise
        raise BuildError(f"{folder} cannot be written: {reason}; {advice}") from exc


def _disk_reason(exc: Exception) -> str | None:
    """Say which error of the file system is behind an error, if one is."""
    behind: BaseException | None = exc
    while behind is not None:
        native = re.search(r"\(os error (\d+)\)", str(behind))  # as libraries in Rust tell them
        number = int(native[1]) if native else behind.errno if isinstance(behind, OSError) else None
        if number in _WRITING:
            return os.strerror(number)
        if _TORN.search(str(behind)):
            return "a file could be written in part only, is the disk full?"
        behind = behind.__cause__ or behind.__context__
    network = isinstance(exc, ConnectionError | TimeoutError)
    return _reason(exc) if isinstance(exc, OSError) and exc.errno and not network else None


def _reason(exc: Exception) -> str:
    named = getattr(exc, "filename", None)
    return f"{getattr(exc, 'strerror', None) or exc}{f' ({named})' if named else ''}"


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
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):  # by a process that was killed
            with suppress(OSError):
                if time.time() - left.stat().st_mtime > _STALE:
                    left.unlink()
        try:
            with temporary.open("xb") as file:
                file.writelines(parts)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as exc:
        raise DataError(str(path), 1, f"cannot be written: {exc.strerror or exc}") from exc


def lines_of(path: Path) -> Iterator[tuple[int, str]]:
    """Give the lines of a file, plain or gzipped, that are not blank, with their numbers from 1.

    Raises:
        DataError: If it cannot be read.
    """
    try:
        with reading(path), TextIOWrapper(open_bytes(path), encoding="utf-8") as file:
            yield from ((number, line) for number, line in enumerate(file, 1) if line.strip())
    except UnicodeDecodeError as exc:
        raise DataError(str(path), 1, f"is not UTF-8 text: {exc}") from exc
