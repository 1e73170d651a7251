"""The model that a training run starts from: base weights or an aligner made of them, its tokenizer and its prompt."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from aligner_middleware.artifact import TOKENIZER_FILE, BaseWeights
from aligner_middleware.checkpoints.base import base_folder
from aligner_middleware.checkpoints.checkpoint import (
    RECIPE_FILE,
    Checkpoint,
    end_token_ids,
    open_checkpoint,
    read_recipe,
)
from aligner_middleware.errors import BuildError, ConfigError
from aligner_middleware.text.published import TEMPLATES, resolve_template
from aligner_middleware.text.template import (
    PromptTemplate,
    special_token_id,
    with_instruction,
    with_verdicts,
)
from aligner_middleware.text.tokenizer import Tokenizer
from aligner_middleware.training.config import TrainConfig
from aligner_middleware.training.network import freeze_other_embeddings, load_network, lora_config, use_bfloat16
from aligner_middleware.training.packing import use_packing

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Origin:
    """The model that a run starts from.

    Attributes:
        folder: The base model's folder.
        weights: The base model's weights, for the record.
        start: The aligner to start from; `None` for the base model itself.
        tokenizer: The base model's.
        template: The prompt to train with.
    """

    folder: Path
    weights: BaseWeights
    start: Checkpoint | None
    tokenizer: Tokenizer
    template: PromptTemplate

    @classmethod
    def open(cls, config: TrainConfig, *, instructions: Sequence[bool] = ()) -> Origin:
        """Find the base model and the aligner that a configuration names, and choose the prompt.

        Args:
            config: Settings of the run.
            instructions: Of each row whether it has an instruction. Where any has one, so has the prompt.

        Raises:
            BuildError: If the base model or the aligner is missing, or lacks a special token of the template.
            ConfigError: If the aligner does not fit the base model or the method; or if every prompt of the template holds an
                instruction, and a row has none.
        """
        folder, weights = base_folder(config.base)
        start = _open_start(config, weights)
        tokenizer = Tokenizer.from_file(folder / TOKENIZER_FILE)
        template = start.template if start else _choose_template(config, tokenizer)
        template = with_instruction(template) if any(instructions) else template
        if template.needs_instruction and not all(instructions):
            raise ConfigError(
                f"every prompt of the template {template.name!r} holds an instruction, and {instructions.count(False)} of "
                "the rows have none: give each an instruction, or choose another template"
            )
        return cls(folder, weights, start, tokenizer, template)

    @property
    def end_token_id(self) -> int:
        """The token that ends a correction."""
        return end_token_ids(self.folder, self.tokenizer, self.template)[0]

    def network(self, config: TrainConfig, trained: Path | None) -> torch.nn.Module:
        """Load the network for a stage.

        Args:
            config: Settings of the run.
            trained: Weights of the stage before; `None` for the first stage.
        """
        added = _added_tokens(self.tokenizer, self.template)
        shape = (config.lora_rank, config.lora_alpha, config.lora_dropout)
        adapter = lora_config(*shape, added) if config.method == "lora" else None
        network: torch.nn.Module
        if self.start and not trained:
            network = self.start.load()
        else:
            network = load_network(self.folder, adapter, trained, use_bfloat16(config.bfloat16))
        use_packing(network)
        if config.method == "difference":
            freeze_other_embeddings(network, added)
        return network


def _open_start(config: TrainConfig, base: BaseWeights) -> Checkpoint | None:
    """Open the aligner that a run starts from, and check that it was made of the base model."""
    if config.start is None:
        return None
    if config.method == "lora":
        raise ConfigError("start= needs method 'full' or 'difference': an adapter is trained on its base model")
    checkpoint = open_checkpoint(config.start, config.template)
    made_of = checkpoint.weights.sha256
    if checkpoint.adapter is None and (checkpoint.folder / RECIPE_FILE).is_file():  # trained by this package, in full
        made_of = read_recipe(checkpoint.folder).base.sha256
    if made_of != base.sha256:
        raise ConfigError(f"{config.start} was not made of {config.base}: name its base model as base=")
    return checkpoint


def _choose_template(config: TrainConfig, tokenizer: Tokenizer) -> PromptTemplate:
    """Find the prompt, with verdicts where the configuration asks for them or they are the default."""
    template = resolve_template(config.template, config.base)
    wanted = config.verdict if config.verdict is not None else template == TEMPLATES["default"]
    if not wanted or template.verdicts:
        return template
    try:
        return with_verdicts(template, tokenizer, marks=config.edits == "operations")
    except BuildError as exc:
        if config.verdict:
            raise
        logger.warning("this aligner is trained to copy, without verdicts: %s", exc)
        return template


def _added_tokens(tokenizer: Tokenizer, template: PromptTemplate) -> Sequence[int]:
    """Give the ids of verdicts and mark: the base model has never used these tokens."""
    names = [*(template.verdicts or ()), *([template.mark] if template.mark else [])]
    return [special_token_id(tokenizer, template, name) for name in names]
