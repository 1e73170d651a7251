"""From question-answer-correction triples to an adapter; needs the `[train]` extra."""

from aligner_middleware.training.config import Stage, TrainConfig
from aligner_middleware.training.train import Progress, Recipe, train

__all__ = ["Progress", "Recipe", "Stage", "TrainConfig", "train"]
