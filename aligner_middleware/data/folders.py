"""Folders that this package writes: whole or not at all, by one process at a time, and never over a user's files."""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from aligner_middleware.data.disk import disk_errors, reason_of
from aligner_middleware.data.locks import exclusive_lock, held_paths, waiting_lock
from aligner_middleware.errors import BuildError, JobError

_SCRATCH = ".aligner-new"  # ends the names of hidden folders in which others are built
_BUILT, _REPLACED = "made", "replaced"  # names in such a folder


@dataclass(frozen=True)
class FolderKind:
    """A kind of folder that this package writes, and so may replace.

    Attributes:
        name: What messages call one.
        marker: The file that each of them holds; `None` where the path alone shows that the package wrote it.
        patterns: Names of all other files in it; patterns of folders end in `/`.
    """

    name: str
    marker: str | None
    patterns: tuple[str, ...]

    @property
    def cached(self) -> FolderKind:
        """The same kind in the cache, which holds only built folders: a damaged one may have lost its marker."""
        return replace(self, marker=None, patterns=(*self.patterns, self.marker or ""))

    def includes(self, path: Path) -> bool:
        """Whether a file or folder belongs into such a folder: under its own name, or while it is being written."""
        if path.is_dir() and not path.is_symlink():
            return any(fnmatchcase(path.name + "/", pattern) for pattern in self.patterns if pattern.endswith("/"))
        files = [pattern for pattern in (self.marker or "", *self.patterns) if not pattern.endswith("/")]
        return any(fnmatchcase(path.name, name) or fnmatchcase(path.name, f".{name}.*.tmp") for name in files)


def check_owned(folder: Path, kind: FolderKind) -> None:
    """Check that a folder holds no user's files: it is missing, empty, or of this kind with nothing else in it.

    This check alone decides which folders may be deleted, and in which one a job may resume.

    Args:
        folder: The folder.
        kind: What is to be written there.

    Raises:
        BuildError: If it holds other files, the message names one; if it is a file, or cannot be read.
    """
    try:
        inside = sorted(folder.iterdir())
    except FileNotFoundError:
        return
    except NotADirectoryError:
        raise BuildError(f"{folder} is a file, expected a folder: name another one") from None
    except OSError as exc:
        raise BuildError(f"{folder} cannot be read: {reason_of(exc)}: name another folder") from exc
    foreign = [path.name for path in inside if not kind.includes(path)]
    unfinished = [path.name for path in inside if path.name.endswith(".tmp")]  # of a process that was killed
    marked = kind.marker is None or any(path.name == kind.marker for path in inside)
    if not marked and (foreign or len(unfinished) < len(inside)):
        raise BuildError(
            f"{folder} is not empty, and not {kind.name} (it has no {kind.marker}): nothing was touched, "
            "name another folder"
        )
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise BuildError(
            f"{folder} holds {foreign[0]!r}{more}, which is no part of {kind.name}: nothing was touched, "
            "move that away or name another folder"
        )


def check_replaceable(folder: Path, kind: FolderKind) -> None:
    """Check that a folder may be replaced, and can be.

    Raises:
        BuildError: As `check_owned` does; or if it is a mount point, or the current folder.
    """
    check_owned(folder, kind)
    with suppress(FileNotFoundError):  # of the folder or the current one
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

    Of several processes one works at a time; the others wait. If `build` raises, nothing stays. Temporary files that a
    killed process left beside `folder` are removed first, and a folder that it had just moved away comes back.

    Args:
        folder: The folder to write. A hidden lock, an empty file, stays beside it.
        build: Fills the empty folder that it is given; it may put temporary files beside that one.
        kind: What `build` makes. Only a folder of this kind is replaced.
        unless: Whether the folder needs no work; called when no other process works on it any more.
        advice: What to do about a folder that cannot be written.

    Raises:
        BuildError: If the folder holds something else, or cannot be written.
    """
    folder = folder.resolve()  # a link stays, and its target is replaced
    scratch = _scratch(folder)
    with disk_errors(folder, advice), waiting_lock(folder):
        sweep(folder.parent, folder)
        if unless is not None and unless(folder):
            return
        check_replaceable(folder, kind)
        try:
            built = scratch / _BUILT
            built.mkdir(parents=True)
            build(built)
            for path in built.iterdir():  # safetensors makes files that nobody else can read
                path.chmod(path.stat().st_mode | built.stat().st_mode & 0o666)
            check_replaceable(folder, kind)
            if folder.exists():
                folder.rename(scratch / _REPLACED)
            built.rename(folder)
        finally:
            _clear(scratch, folder)


def remove_folder(folder: Path, kind: FolderKind) -> None:
    """Delete a folder of a kind; no process ever sees it deleted in part.

    Raises:
        BuildError: If it holds other files: nothing is deleted then.
    """
    if not folder.exists():
        return
    check_owned(folder, kind)
    scratch = _scratch(folder)
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    folder.rename(scratch / _BUILT)
    shutil.rmtree(scratch, ignore_errors=True)


def sweep(parent: Path, own: Path | None = None) -> None:
    """Remove temporary folders of killed processes, where possible; a living process holds the lock of its own.

    Args:
        parent: Where to look.
        own: A folder in it whose lock the caller holds.
    """
    for scratch in parent.resolve().glob(f".*{glob.escape(_SCRATCH)}"):
        folder = scratch.parent / scratch.name[1 : -len(_SCRATCH)]
        if own is not None and scratch == _scratch(own):
            _clear(scratch, own)
        elif not any(scratch == _scratch(held) for held in held_paths()):
            with suppress(JobError, OSError), exclusive_lock(folder):
                _clear(scratch, folder)


def _scratch(folder: Path) -> Path:
    return folder.with_name(f".{folder.name.removeprefix('.')}{_SCRATCH}")


def _clear(scratch: Path, folder: Path) -> None:
    """Remove a temporary folder, but not the only copy of the folder that it was to replace."""
    if (scratch / _REPLACED).is_dir() and not folder.exists():
        (scratch / _REPLACED).rename(folder)
    shutil.rmtree(scratch, ignore_errors=True)
