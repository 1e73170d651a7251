"""Files that someone else may have written: their JSON is bounded and validated before it is used, and they have digests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from aligner_middleware.errors import ArtifactError

Model = TypeVar("Model", bound=BaseModel)

_LARGEST_JSON = 2**24  # bytes


def read_json(path: Path, advice: str) -> dict[str, Any]:
    """Read a JSON object of a few MB at most.

    Args:
        path: The file.
        advice: What to do if it is damaged; it ends the message.

    Raises:
        ArtifactError: If it cannot be read, is larger, or is no JSON object.
    """
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise ArtifactError(f"{path} has over {_LARGEST_JSON >> 20} MB, it is not what its name says: {advice}")
        content = json.loads(path.read_bytes())
    except OSError as exc:
        raise ArtifactError(f"{path} cannot be read ({exc.strerror or exc}): {advice}") from exc
    except (ValueError, RecursionError) as exc:
        raise ArtifactError(f"{path} cannot be used (it is not JSON: {exc}): {advice}") from exc
    if not isinstance(content, dict):
        raise ArtifactError(f"{path} cannot be used (it is not a JSON object): {advice}")
    return content


def check_version(content: Mapping[str, Any], newest: int, path: Path, advice: str) -> int:
    """Give the format version of what a file holds, 1 where it tells none.

    Raises:
        ArtifactError: If it is newer than `newest`, or no number.
    """
    version = content.get("format_version", 1)
    if not isinstance(version, int) or isinstance(version, bool):
        raise ArtifactError(f"{path} cannot be used (format_version: it is not a whole number): {advice}")
    if version > newest:
        raise ArtifactError(
            f"{path} was written by a newer version of aligner-middleware (its format is {min(version, 10**9)}, this one "
            f"reads up to {newest}): pip install --upgrade aligner-middleware"
        )
    return version


def validated(model: type[Model], content: Mapping[str, Any], path: Path, advice: str) -> Model:
    """Make a model of what a file holds.

    Raises:
        ArtifactError: If it is not as the model wants it; the message names the file and the field.
    """
    try:
        return model.model_validate(content)
    except ValidationError as exc:
        error = exc.errors()[0]
        where = ".".join(str(part)[:40] for part in error["loc"]).encode("unicode_escape").decode()
        what = error["msg"].removeprefix("Value error, ")[:300]
        if error["type"] == "extra_forbidden":
            what = "this version does not know it; was it written by a newer one?"
        raise ArtifactError(f"{path} cannot be used ({where + ': ' if where else ''}{what}): {advice}") from exc


def sha256(path: Path) -> str:
    """Hash a file, in hexadecimal.

    Raises:
        ArtifactError: If it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as exc:
        raise ArtifactError(f"{path} cannot be read: {exc.strerror or exc}") from exc
