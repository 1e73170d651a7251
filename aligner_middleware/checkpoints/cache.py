"""The cache of built folders: each is built once, by one process, appears whole, and is built anew if damaged."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from aligner_middleware.artifact import HOME_ADVICE
from aligner_middleware.data.files import is_folder
from aligner_middleware.data.folders import FolderKind, sweep, write_folder
from aligner_middleware.errors import ArtifactError

logger = logging.getLogger(__name__)

_ANYTHING = FolderKind("a built folder", None, ("*", "*/"))


def build_once(
    folder: Path,
    build: Callable[[Path], object],
    kind: FolderKind = _ANYTHING,
    check: Callable[[Path], object] = lambda folder: None,
) -> None:
    """Make sure that a whole folder is there, calling `build` if it is not.

    Processes that ask at once do the work once: the others wait.

    Args:
        folder: The folder that shall be there afterwards, in the cache.
        build: Fills the empty folder that it is given.
        kind: What it makes.
        check: Raises `ArtifactError` for a folder that is damaged; such a one is built anew.

    Raises:
        ArtifactError: If what was built is damaged.
        BuildError: If it cannot be written; the message names it and `ALIGNER_HOME`.
    """

    def whole(folder: Path, level: int = logging.DEBUG) -> bool:
        if is_folder(folder):
            try:
                check(folder)
            except ArtifactError as exc:
                logger.log(level, "%s; building it anew", exc)
            else:
                return True
        return False

    if whole(folder, logging.WARNING):
        sweep(folder.parent)  # a process may have been killed just after it had made the folder
    else:
        write_folder(folder, build, kind.cached, unless=whole, advice=HOME_ADVICE)
        check(folder)
