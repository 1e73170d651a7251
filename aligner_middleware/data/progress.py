"""How far a job is: one form for every job, which the command line shows as a bar or as lines of a log."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """How far a job is.

    Attributes:
        stage: The part of the job that is under way, such as `correction` or `quantising`.
        done: How much of the stage is done: rows, prompts, steps.
        total: How much there is to do in it; `None` where that is not known.
        detail: What else there is to say, such as `loss 0.312, 377 tokens/s`.
    """

    stage: str
    done: int
    total: int | None
    detail: str = ""


Report = Callable[[Progress], None]


def ignore(progress: Progress) -> None:
    """Report to nobody."""
