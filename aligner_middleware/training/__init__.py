"""From question-answer-correction triples to an aligner, and from its corrections to a policy; needs the `[train]` extra."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aligner_middleware.lazy import on_first_use

if TYPE_CHECKING:
    from aligner_middleware.training.aligner import train
    from aligner_middleware.training.config import PolicyConfig, Stage, TrainConfig
    from aligner_middleware.training.recipe import Recipe

# Where each name is defined; it is imported on first use, so that settings are read without loading torch.
_MODULES = {
    "PolicyConfig": "config",
    "Recipe": "recipe",
    "Stage": "config",
    "TrainConfig": "config",
    "train": "aligner",
}

__all__ = ["PolicyConfig", "Recipe", "Stage", "TrainConfig", "train"]


__getattr__ = on_first_use(__name__, _MODULES)


def __dir__() -> list[str]:
    return __all__
