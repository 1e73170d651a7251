"""All of an aligner but its weights: how it is asked, and how what it writes is read. For one that a server runs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, get_args

from pydantic import BaseModel, Field

from aligner_middleware.artifact import (
    ARTIFACT_FILE,
    CALIBRATION_FILE,
    FORMAT_VERSION,
    TOKENIZER_FILE,
    Name,
    Precision,
    TokenId,
)
from aligner_middleware.calibration import Calibration
from aligner_middleware.checkpoints.base import text_folder
from aligner_middleware.checkpoints.checkpoint import (
    ADAPTER_CONFIG_FILE,
    RECIPE_FILE,
    base_of,
    end_token_ids,
    read_recipe,
    recorded_template,
)
from aligner_middleware.checkpoints.difference import DIFFERENCE_FILE
from aligner_middleware.data.checked import check_version, read_json, sha256, validated
from aligner_middleware.data.files import is_file
from aligner_middleware.errors import ArtifactError
from aligner_middleware.locations import cached_folder, folder_of
from aligner_middleware.text.published import resolve_template
from aligner_middleware.text.template import PromptTemplate
from aligner_middleware.text.tokenizer import Tokenizer

_AGAIN = "export the aligner again"
_Positions = Annotated[int, Field(ge=2, le=2**24)]


@dataclass(frozen=True)
class AlignerText:
    """How an aligner is asked, and how what it writes is read.

    Attributes:
        name: What it is called in reports.
        tokenizer: Its tokenizer.
        template: The prompt that it was trained with.
        eos_token_ids: Tokens that end a correction.
        max_positions: Its context, in tokens.
        calibration: Its levels of strength; `None` where nobody has calibrated.
        revision: Changes with tokenizer and calibration.
    """

    name: str
    tokenizer: Tokenizer
    template: PromptTemplate
    eos_token_ids: Sequence[int]
    max_positions: int
    calibration: Calibration | None
    revision: str


class _Described(BaseModel):
    """The fields of `aligner.json` that matter without the weights; both forms of export have them."""

    name: Name
    template: PromptTemplate
    eos_token_ids: tuple[TokenId, ...] = Field(min_length=1, max_length=100)
    max_positions: _Positions
    tiktoken: bool = False
    files: dict[str, str] = Field(max_length=1000)
    calibration: Calibration | None = None


class _Config(BaseModel):
    max_position_embeddings: _Positions


def text_of(model: str, template: str | PromptTemplate | None = None) -> AlignerText:
    """Read all of an aligner but its weights, which need not be here.

    Args:
        model: `default`; a folder that `aligner export` or `aligner train` made, or with a checkpoint; or a hub id, of
            which only the small files are downloaded.
        template: A template, the name or the text of one; `None` for that of the aligner.

    Raises:
        ArtifactError: If a file cannot be used.
        BuildError: If there is no such aligner, or its tokenizer lacks a special token of the template.
    """
    folder = folder_of(model)
    places = [folder] if folder else []
    places += [cached_folder(model, precision, template) for precision in reversed(get_args(Precision))]
    for place in places:
        if is_file(place / ARTIFACT_FILE):
            return _described(place, model, template)
    return _of_checkpoint(folder, model, template)


def _described(folder: Path, model: str, template: str | PromptTemplate | None) -> AlignerText:
    path = folder / ARTIFACT_FILE
    content = read_json(path, _AGAIN)
    check_version(content, FORMAT_VERSION, path, _AGAIN)
    about = validated(_Described, content, path, _AGAIN)
    source = folder / TOKENIZER_FILE
    if not is_file(source) or sha256(source) != about.files.get(TOKENIZER_FILE):
        raise ArtifactError(f"{source} is missing, or was altered after its export (sha256 differs): {_AGAIN}")
    return AlignerText(
        about.name,
        Tokenizer.from_file(source, tiktoken=about.tiktoken),
        about.template if template is None else resolve_template(template, model),
        about.eos_token_ids,
        about.max_positions,
        about.calibration,
        _revision(source, about.calibration),
    )


def _of_checkpoint(folder: Path | None, model: str, template: str | PromptTemplate | None) -> AlignerText:
    if folder and (is_file(folder / ADAPTER_CONFIG_FILE) or is_file(folder / DIFFERENCE_FILE)):
        own, home = folder, text_folder(base_of(folder))
        recorded = recorded_template(folder)
    else:
        own = home = text_folder(model)
        recorded = read_recipe(home).template if is_file(home / RECIPE_FILE) else resolve_template(None, model)
    chosen = recorded if template is None else resolve_template(template, model)
    tokenizer = Tokenizer.from_file(home / TOKENIZER_FILE)
    config, found = home / "config.json", own / CALIBRATION_FILE
    advice = "get the model again"
    calibration = None
    if is_file(found):
        calibration = validated(Calibration, read_json(found, "calibrate the aligner again"), found, _AGAIN)
    return AlignerText(
        model if folder is None or model == "default" else folder.resolve().name,
        tokenizer,
        chosen,
        end_token_ids(home, tokenizer, chosen),
        validated(_Config, read_json(config, advice), config, advice).max_position_embeddings,
        calibration,
        _revision(home / TOKENIZER_FILE, calibration),
    )


def _revision(tokenizer: Path, calibration: Calibration | None) -> str:
    return hashlib.sha256(f"{sha256(tokenizer)} {calibration!r}".encode()).hexdigest()[:12]
