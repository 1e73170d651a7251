"""From question-answer-correction triples to an aligner, and from its corrections to a policy; needs the `[train]` extra."""

from aligner_middleware.training.aligner import Recipe, train
from aligner_middleware.training.config import PolicyConfig, Stage, TrainConfig
from aligner_middleware.training.trainer import Progress

__all__ = ["PolicyConfig", "Progress", "Recipe", "Stage", "TrainConfig", "train"]
