"""From an aligner's name to its folder: one of the user's, the default's, or the one in the cache."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import platformdirs

from aligner_middleware.artifact import ARTIFACT_FILE, CONFIG_FILE, FORMAT_VERSION, MODEL_FILE, Precision
from aligner_middleware.data.checked import sha256
from aligner_middleware.data.files import is_file, is_folder
from aligner_middleware.errors import ArtifactError, BuildError
from aligner_middleware.text.published import resolve_template
from aligner_middleware.text.template import PromptTemplate

_SAMPLED = 2**26  # bytes; of a larger file the key of a cached folder holds a part
_BLOCKS, _BLOCK = 256, 4096  # so many blocks of so many bytes

PROMPTED = "prompted"
"""The aligner that is only a prompt for a chat model, and so has no folder; see `checkpoints/prompted.py`."""

HOME_ADVICE = "set ALIGNER_HOME to a folder that can be written, on a disk with room"
"""What to do about a file below `cache_dir()` that cannot be written."""


def cache_dir() -> Path:
    """Where built aligners are kept: `ALIGNER_HOME`, or else the user's cache folder.

    Raises:
        BuildError: If the user has no such folder.
    """
    override = os.environ.get("ALIGNER_HOME")
    try:
        return Path(override or platformdirs.user_cache_dir("aligner-middleware")).expanduser().absolute()
    except (RuntimeError, OSError) as exc:
        raise BuildError(f"the user's cache folder is not known ({exc}): set ALIGNER_HOME to a folder") from exc


DEFAULT_FOLDER = Path(__file__).parent / "assets" / "default"


def folder_of(model: str) -> Path | None:
    """Find the folder that a name stands for; `None` for a hub id."""
    return DEFAULT_FOLDER if model == "default" else _folder(model)


def exported_folder(model: str) -> Path | None:
    """Give the folder with an exported graph that a name is of; `None` if it is of something else."""
    folder = _folder(model)
    described = folder is not None and is_file(folder / ARTIFACT_FILE)
    return folder if described and merged_folder(model) is None else None


def merged_folder(model: str) -> Path | None:
    """Give the folder that a name is of, where it is a checkpoint that `aligner export --form checkpoint` wrote."""
    folder = _folder(model)
    if folder is None or not (is_file(folder / ARTIFACT_FILE) and is_file(folder / CONFIG_FILE)):
        return None
    return None if is_file(folder / MODEL_FILE) else folder


def _folder(path: str) -> Path | None:
    try:
        folder = Path(path).expanduser()
    except RuntimeError:  # "~name" of nobody
        return None
    return folder if is_folder(folder) else None


def cached_folder(model: str, precision: Precision, template: str | PromptTemplate | None = None) -> Path:
    """Where the built form of a model is kept, whether it is there yet or not.

    The name changes with whatever would change the result: the adapter or checkpoint files, the prompt, the precision and
    the format; not with the place where these files lie, so that one cache serves several environments.
    """
    folder = folder_of(model)
    name = model if folder is None else folder.resolve().name
    parts = [name, str(FORMAT_VERSION), precision, resolve_template(template, model).model_dump_json()]
    if folder is not None:
        for path in sorted(folder.glob("*.json")):
            parts += [path.name, sha256(path)]
        for path in sorted(folder.glob("*.safetensors")):
            parts += [path.name, _identity(path)]
    key = hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:12]
    label = "".join(char if char.isalnum() else "-" for char in name)[:80]
    return cache_dir() / f"{label}-{precision}-{key}"


def _identity(path: Path) -> str:
    """A file's hash while it is small (an adapter); when it is not (a checkpoint), that of a part, its size and its time.

    The part is spread over the file, which tells checkpoints apart whose times were set to the same by an archive.
    """
    try:
        status = path.stat()
        if status.st_size < _SAMPLED:
            return sha256(path)
        digest = hashlib.sha256()
        with path.open("rb") as file:
            for block in range(_BLOCKS):
                file.seek(block * (status.st_size - _BLOCK) // (_BLOCKS - 1))
                digest.update(file.read(_BLOCK))
    except OSError as exc:
        raise ArtifactError(f"{path} cannot be read: {exc.strerror or exc}") from exc
    return f"{status.st_size} {status.st_mtime_ns} {digest.hexdigest()}"
