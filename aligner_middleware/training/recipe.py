"""The record of a training run: what `training.json` holds beside the weights, so that the run can be repeated."""

from __future__ import annotations

from importlib.metadata import version

from pydantic import BaseModel

from aligner_middleware.artifact import BaseWeights
from aligner_middleware.checkpoints.checkpoint import RECIPE_VERSION
from aligner_middleware.text.template import PromptTemplate
from aligner_middleware.training.config import TrainConfig


class Recipe(BaseModel):
    """Settings, inputs and results of a training run.

    Attributes:
        config: The run's settings.
        template: The prompt that it was trained with, to be used in inference too.
        base: The base model's weights.
        start: The weights of the aligner that training started from; `None` where it started from the base model.
        rows, rows_left_out: Rows trained on, and rows that were longer than `max_length`, or that have no correction
            where there are no verdicts.
        verdicts: Rows that teach each verdict.
        instructions: Rows given with each instruction, the hundred most frequent ones.
        losses: Mean loss of the last steps of each stage, and on the held-out rows after it, in nats a token.
        devices: Processes that took part; a step has `batch_size * accumulation * devices` rows.
        versions: Of the tools.
        format_version: Of this file.
    """

    format_version: int = RECIPE_VERSION
    config: TrainConfig
    template: PromptTemplate
    base: BaseWeights
    start: BaseWeights | None = None
    rows: int
    rows_left_out: int
    verdicts: dict[str, int] = {}
    instructions: dict[str, int] = {}
    losses: dict[str, float]
    devices: int
    versions: dict[str, str]


def tool_versions() -> dict[str, str]:
    """Give the versions of the libraries that train."""
    return {package: version(package) for package in ("torch", "transformers", "peft", "accelerate")}
