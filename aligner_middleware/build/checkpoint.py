"""A checkpoint in PyTorch: base weights with an adapter merged into them, its tokenizer and its prompt."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aligner_middleware.artifact import (
    CALIBRATION_FILE,
    DEFAULT_FOLDER,
    TOKENIZER_FILE,
    BaseWeights,
    Calibration,
    sha256,
)
from aligner_middleware.build.base import base_folder
from aligner_middleware.build.difference import DIFFERENCE_FILE, add_difference
from aligner_middleware.errors import BuildError
from aligner_middleware.prompt import PromptTemplate, resolve_template, special_token_id
from aligner_middleware.tokenizer import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG_FILE = "adapter_config.json"
RECIPE_FILE = "training.json"


@dataclass(frozen=True)
class Checkpoint:
    """What an aligner is made from.

    Attributes:
        name: As the user named it.
        folder: The base model's folder, with `config.json`, weights and `tokenizer.json`.
        adapter: The folder of an adapter or a difference to the base, if there is one.
        template: The prompt it was trained with.
        weights: What it was made from, for the record.
    """

    name: str
    folder: Path
    adapter: Path | None
    template: PromptTemplate
    weights: BaseWeights

    def tokenizer(self) -> Tokenizer:
        """Read the tokenizer."""
        return Tokenizer.from_file(self.folder / TOKENIZER_FILE)

    def calibration(self) -> Calibration | None:
        """Read the levels of strength that lie beside its weights, if there are any."""
        path = (self.adapter or self.folder) / CALIBRATION_FILE
        return Calibration.model_validate(_read_json(path)) if path.is_file() else None

    def load(self, dtype: str = "float32") -> PreTrainedModel:
        """Load the PyTorch model, the adapter or difference merged in float32 and then cast to `dtype`."""
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        capped = getattr(AutoConfig.from_pretrained(self.folder), "attn_logit_softcapping", None)
        kernel = {"attn_implementation": "eager"} if capped else {}  # the others leave Gemma 2's cap out
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32, **kernel)
        if self.adapter is not None and (self.adapter / DIFFERENCE_FILE).is_file():
            add_difference(model, self.adapter / DIFFERENCE_FILE)
        elif self.adapter is not None:
            model = _merge(model, self.adapter)
        return model.to(getattr(torch, dtype)).eval()  # type: ignore[no-any-return]


def open_checkpoint(model: str, template: str | PromptTemplate | None = None) -> Checkpoint:
    """Find what a name stands for.

    Args:
        model: `default`, an adapter folder made by `aligner train`, a folder with a checkpoint, or a hub id.
        template: The prompt; `None` for the one recorded beside the adapter or known for the model.

    Raises:
        BuildError: If it is none of these.
    """
    folder = DEFAULT_FOLDER if model == "default" else Path(model).expanduser()
    if not (folder / ADAPTER_CONFIG_FILE).is_file() and not (folder / DIFFERENCE_FILE).is_file():
        found, weights = base_folder(model)
        recorded = template is None and (found / RECIPE_FILE).is_file()  # trained by us in full
        chosen = _recorded_template(found) if recorded else resolve_template(template, model)
        return Checkpoint(model, found, None, chosen, weights)
    base, weights = base_folder(_base_of(folder))
    weights = weights.model_copy(update={"adapter_sha256": sha256(adapter_file(folder))})
    chosen = resolve_template(template, model) if template is not None else _recorded_template(folder)
    return Checkpoint(model, base, folder, chosen, weights)


def adapter_file(folder: Path) -> Path:
    """Find the weights in the folder of an adapter or a difference.

    Raises:
        BuildError: If there are none.
    """
    for name in (DIFFERENCE_FILE, ADAPTER_FILE):
        if (folder / name).is_file():
            return folder / name
    raise BuildError(f"{folder} has {ADAPTER_CONFIG_FILE} but no {ADAPTER_FILE}: train the adapter again")


def end_token_ids(folder: Path, tokenizer: Tokenizer, template: PromptTemplate) -> list[int]:
    """Find the tokens that end a correction: the template's own first, then those that the model's settings name."""
    ids = [special_token_id(tokenizer, template, template.end_token)] if template.end_token else []
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        value = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
        ids += value if isinstance(value, list) else [value] if isinstance(value, int) else []
    if not ids:
        raise BuildError(f"{folder} names no eos_token_id in config.json: no correction would ever end")
    return list(dict.fromkeys(ids))


def _base_of(adapter: Path) -> str:
    if (adapter / DIFFERENCE_FILE).is_file():
        return str(_read_json(adapter / RECIPE_FILE)["config"]["base"])
    settings = _read_json(adapter / ADAPTER_CONFIG_FILE)
    base = settings.get("base_model_name_or_path")
    if not isinstance(base, str):
        raise BuildError(f"{adapter / ADAPTER_CONFIG_FILE} does not name its base model (base_model_name_or_path)")
    return base


def _recorded_template(adapter: Path) -> PromptTemplate:
    path = adapter / RECIPE_FILE
    return PromptTemplate(**_read_json(path)["template"]) if path.is_file() else resolve_template(None)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise BuildError(f"{path} cannot be read: {exc}") from exc
    if not isinstance(content, dict):
        raise BuildError(f"{path} is not a JSON object")
    return content


def _merge(model: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
    from safetensors.torch import load_file

    settings = LoraConfig.from_pretrained(str(adapter))
    settings.base_model_name_or_path = None  # a name, where the weights come from a folder: peft would warn
    wrapped = get_peft_model(model, settings)
    weights = {name: value.float() for name, value in load_file(adapter_file(adapter)).items()}
    outcome: Any = set_peft_model_state_dict(wrapped, weights)
    if outcome.unexpected_keys:
        raise BuildError(f"{adapter} does not fit its base model: it has weights for {outcome.unexpected_keys[:3]}")
    return wrapped.merge_and_unload()  # type: ignore[no-any-return]
