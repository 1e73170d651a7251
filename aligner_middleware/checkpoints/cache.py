"""The cache of built folders: one process builds each of them, once; it appears when complete, and is rebuilt if damaged."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from aligner_middleware.data.files import is_folder
from aligner_middleware.data.folders import FolderKind, sweep, write_folder
from aligner_middleware.errors import ArtifactError
from aligner_middleware.locations import HOME_ADVICE

logger = logging.getLogger(__name__)

_ANYTHING = FolderKind("a built folder", None, ("*", "*/"))


def build_once(
    folder: Path,
    build: Callable[[Path], object],
    kind: FolderKind = _ANYTHING,
    check: Callable[[Path], object] = lambda folder: None,
) -> None:
    """Make sure that a complete folder is there; `build` is called if it is not.

    Of several processes one builds it; the others wait.

    Args:
        folder: The folder, in the cache.
        build: Fills the empty folder that it is given.
        kind: The kind of folder that it makes.
        check: Raises `ArtifactError` for a damaged folder, which is built anew.

    Raises:
        ArtifactError: If the built folder is damaged.
        BuildError: If it cannot be written; the message names it and `ALIGNER_HOME`.
    """

    def intact(folder: Path, level: int = logging.DEBUG) -> bool:
        if is_folder(folder):
            try:
                check(folder)
            except ArtifactError as exc:
                logger.log(level, "%s; building it anew", exc)
            else:
                return True
        return False

    if intact(folder, logging.WARNING):
        sweep(folder.parent)  # a process may have been killed just after it had made the folder
    else:
        write_folder(folder, build, kind.cached, unless=intact, advice=HOME_ADVICE)
        check(folder)
