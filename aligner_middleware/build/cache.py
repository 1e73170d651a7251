"""The cache of built folders: each is built once, by one process, and appears whole or not at all."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock


def build_once(folder: Path, build: Callable[[Path], object]) -> None:
    """Make sure that a folder is there, calling `build` if it is not.

    Two processes that ask at once do the work once: the other waits. `build` writes into a temporary folder beside the
    final one, which is renamed when it returns; if it raises, nothing stays.

    Args:
        folder: The folder that shall be there afterwards.
        build: Fills the empty folder that it is given.
    """
    if folder.is_dir():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(folder.name + ".lock")):
        if not folder.is_dir():
            write_folder(folder, build)


def write_folder(folder: Path, build: Callable[[Path], object]) -> None:
    """Have `build` fill a temporary folder and rename it to `folder`, replacing what stood there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        made = Path(scratch) / "made"
        made.mkdir()
        build(made)
        if folder.exists():
            folder.rename(Path(scratch) / "replaced")
        made.rename(folder)
