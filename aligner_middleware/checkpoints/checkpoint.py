"""A checkpoint in PyTorch: base weights with an adapter or a difference merged in, a tokenizer and a prompt template."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from aligner_middleware.artifact import (
    ARTIFACT_FILE,
    CALIBRATION_FILE,
    CONFIG_FILE,
    TOKENIZER_FILE,
    BaseWeights,
    CheckpointArtifact,
)
from aligner_middleware.calibration import Calibration
from aligner_middleware.checkpoints.base import base_folder
from aligner_middleware.checkpoints.difference import DIFFERENCE_FILE, TRAIN_AGAIN, add_difference
from aligner_middleware.data.checked import check_version, read_json, sha256, validated
from aligner_middleware.data.files import is_file
from aligner_middleware.data.folders import FolderKind
from aligner_middleware.errors import AlignerError, ArtifactError, BuildError
from aligner_middleware.locations import folder_of, merged_folder
from aligner_middleware.text.published import resolve_template
from aligner_middleware.text.template import PromptTemplate, special_token_id
from aligner_middleware.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG_FILE = "adapter_config.json"
RECIPE_FILE = "training.json"
RECIPE_VERSION = 1
# The files of a full checkpoint beside its weights: those that transformers reads of a decoder and its tokenizer.
CHECKPOINT_FILES = (
    CONFIG_FILE,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "chat_template.json",
    "chat_template.jinja",
)
_WHOLE = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json", *CHECKPOINT_FILES)
TRAINED = FolderKind(
    "a trained aligner",
    RECIPE_FILE,
    (ADAPTER_FILE, ADAPTER_CONFIG_FILE, DIFFERENCE_FILE, CALIBRATION_FILE, *_WHOLE),
)
MERGED = FolderKind("an aligner's checkpoint", ARTIFACT_FILE, _WHOLE)

Count = Annotated[int, Field(ge=1, le=2**16)]
Label = Annotated[str, Field(min_length=1, max_length=1000)]


class _RecordedConfig(BaseModel):
    base: Label


class RecordedTraining(BaseModel):
    """The part of `training.json` that is read back; `training/aligner.py` writes it."""

    config: _RecordedConfig
    template: PromptTemplate
    base: BaseWeights


class _AdapterConfig(BaseModel):
    """The fields of peft's `adapter_config.json` that bound an adapter's size and names."""

    model_config = ConfigDict(extra="ignore")

    peft_type: Literal["LORA"]
    base_model_name_or_path: Label
    r: Count
    lora_alpha: float = Field(gt=0, le=2**20)
    lora_dropout: float = Field(default=0.0, ge=0, le=1)
    target_modules: Annotated[list[Label], Field(max_length=10_000)] | Label | None = None
    rank_pattern: dict[Label, Count] = Field(default={}, max_length=10_000)
    alpha_pattern: dict[Label, Annotated[float, Field(gt=0, le=2**20)]] = Field(default={}, max_length=10_000)


@dataclass(frozen=True)
class Checkpoint:
    """The sources of an aligner.

    Attributes:
        name: The name that the user gave.
        folder: The base model's folder, with `config.json`, weights and `tokenizer.json`.
        adapter: The folder of an adapter or a difference to the base, if there is one.
        template: The prompt template that it was trained with.
        weights: The record of its origin.
        merged: The `aligner.json` of a checkpoint that was exported by this package.
    """

    name: str
    folder: Path
    adapter: Path | None
    template: PromptTemplate
    weights: BaseWeights
    merged: CheckpointArtifact | None = None

    def tokenizer(self) -> Tokenizer:
        """Read the tokenizer."""
        return Tokenizer.from_file(self.folder / TOKENIZER_FILE)

    def calibration(self) -> Calibration | None:
        """Read the calibration beside its weights, if there is one.

        Raises:
            ArtifactError: If it cannot be used.
        """
        if self.merged is not None:
            return self.merged.calibration
        path = (self.adapter or self.folder) / CALIBRATION_FILE
        if not is_file(path):
            return None
        advice = "calibrate the aligner again, or delete it"
        return validated(Calibration, read_json(path, advice), path, advice)

    def load(self, dtype: str = "float32") -> PreTrainedModel:
        """Load the PyTorch model, the adapter or difference merged in float32 and then cast to `dtype`.

        Raises:
            ArtifactError: If the adapter or difference cannot be used.
            BuildError: If the model cannot be loaded, or they do not fit it.
        """
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        try:
            capped = getattr(AutoConfig.from_pretrained(self.folder), "attn_logit_softcapping", None)
            kernel = {"attn_implementation": "eager"} if capped else {}  # the other kernels ignore Gemma 2's cap
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32, **kernel)
        except Exception as exc:  # whatever a damaged config or weights lead transformers into
            raise BuildError(f"transformers cannot load {self.folder}: {_first_line(exc)}") from exc
        if self.adapter is not None and (self.adapter / DIFFERENCE_FILE).is_file():
            add_difference(model, self.adapter / DIFFERENCE_FILE)
        elif self.adapter is not None:
            model = _merge(model, self.adapter)
        return model.to(getattr(torch, dtype)).eval()  # type: ignore[no-any-return]


def open_checkpoint(model: str, template: str | PromptTemplate | None = None) -> Checkpoint:
    """Find the checkpoint of a name.

    Args:
        model: `default`, an adapter folder made by `aligner train`, a folder with a checkpoint (one that
            `aligner export --form checkpoint` wrote, too), or a hub id.
        template: The prompt template; `None` for the one recorded beside the adapter or known for the model.

    Raises:
        ArtifactError: If a file of it cannot be used.
        BuildError: If it is none of these.
    """
    if (whole := merged_folder(model)) is not None:
        merged = CheckpointArtifact.load(whole)
        chosen = merged.template if template is None else resolve_template(template, model)
        return Checkpoint(model, whole, None, chosen, merged.base, merged)
    folder = folder_of(model)
    if folder is None or not (is_file(folder / ADAPTER_CONFIG_FILE) or is_file(folder / DIFFERENCE_FILE)):
        found, weights = base_folder(model)
        recorded = template is None and is_file(found / RECIPE_FILE)  # all weights were trained by this package
        chosen = read_recipe(found).template if recorded else resolve_template(template, model)
        return Checkpoint(model, found, None, chosen, weights)
    base, weights = base_folder(base_of(folder))
    weights = weights.model_copy(update={"adapter_sha256": sha256(adapter_file(folder))})
    chosen = resolve_template(template, model) if template is not None else recorded_template(folder)
    return Checkpoint(model, base, folder, chosen, weights)


def adapter_file(folder: Path) -> Path:
    """Find the weights in the folder of an adapter or a difference.

    Raises:
        BuildError: If there are none.
    """
    for name in (DIFFERENCE_FILE, ADAPTER_FILE):
        if is_file(folder / name):
            return folder / name
    raise BuildError(f"{folder} has {ADAPTER_CONFIG_FILE} but no {ADAPTER_FILE}: train the adapter again")


def end_token_ids(folder: Path, tokenizer: Tokenizer, template: PromptTemplate) -> list[int]:
    """Find the tokens that end a correction: the template's own first, then those that the model's settings name."""
    ids = [special_token_id(tokenizer, template, template.end_token)] if template.end_token else []
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        value = read_json(path, "get the model again").get("eos_token_id") if is_file(path) else None
        ids += [id for id in (value if isinstance(value, list) else [value]) if isinstance(id, int)]
    if not ids:
        raise BuildError(f"{folder} names no eos_token_id in config.json: no correction would ever end")
    return list(dict.fromkeys(ids))


def read_recipe(folder: Path) -> RecordedTraining:
    """Read `training.json`, the record of a training.

    Raises:
        ArtifactError: If it cannot be used, or was written by a newer version.
    """
    path = folder / RECIPE_FILE
    content = read_json(path, TRAIN_AGAIN)
    check_version(content, RECIPE_VERSION, path, TRAIN_AGAIN)
    return validated(RecordedTraining, content, path, TRAIN_AGAIN)


def base_of(adapter: Path) -> str:
    """Give the name of the base model of an adapter or a difference.

    Raises:
        ArtifactError: If its record cannot be used.
        BuildError: If it does not name one.
    """
    if is_file(adapter / DIFFERENCE_FILE):
        return read_recipe(adapter).config.base
    return _adapter_config(adapter).base_model_name_or_path


def _adapter_config(adapter: Path) -> _AdapterConfig:
    path = adapter / ADAPTER_CONFIG_FILE
    content = read_json(path, TRAIN_AGAIN)
    if content.get("base_model_name_or_path") is None:
        raise BuildError(f"{path} does not name its base model (base_model_name_or_path)")
    return validated(_AdapterConfig, content, path, TRAIN_AGAIN)


def recorded_template(adapter: Path) -> PromptTemplate:
    """Give the template that an adapter or a difference was trained with."""
    return read_recipe(adapter).template if is_file(adapter / RECIPE_FILE) else resolve_template(None)


def _merge(model: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
    from safetensors.torch import load_file

    _adapter_config(adapter)
    path = adapter_file(adapter)
    try:
        weights = {name: value.float() for name, value in load_file(path).items()}
    except Exception as exc:  # safetensors raises its own class, without a common base
        raise ArtifactError(f"{path} cannot be used ({_first_line(exc)}): {TRAIN_AGAIN}") from exc
    try:
        settings = LoraConfig.from_pretrained(str(adapter))
        settings.base_model_name_or_path = None  # a name, where the weights come from a folder: peft would warn
        wrapped = get_peft_model(model, settings)
        outcome: Any = set_peft_model_state_dict(wrapped, weights)
        if outcome.unexpected_keys:
            raise BuildError(f"{adapter} does not fit its base model: it has weights for {outcome.unexpected_keys[:3]}")
        return wrapped.merge_and_unload()  # type: ignore[no-any-return]
    except AlignerError:
        raise
    except Exception as exc:  # of other shapes, or with settings that peft cannot use
        raise BuildError(f"{adapter} does not fit its base model: {_first_line(exc)}") from exc


def _first_line(exc: Exception) -> str:
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
    return " ".join([type(exc).__name__ + ":", *lines[:2]])[:300]
