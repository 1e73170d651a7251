"""From question-answer-correction triples to an adapter; needs the `[train]` extra."""

from aligner_middleware.training.config import Stage, TrainConfig
from aligner_middleware.training.train import Progress, Recipe, train
from aligner_middleware.training.triples import LeftOut, Rows, Triple, read_rows

__all__ = ["LeftOut", "Progress", "Recipe", "Rows", "Stage", "TrainConfig", "Triple", "read_rows", "train"]
