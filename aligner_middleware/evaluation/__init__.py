"""Measures what an aligner does to answers; needs the `[build]` extra, for its sentence encoder."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aligner_middleware.evaluation.comparison import Compared, Comparison, Tally, compare
    from aligner_middleware.evaluation.held_out import Evaluation, Scored, Scores, evaluate
    from aligner_middleware.evaluation.pairwise import ChatJudge, OfflineJudge, Pair
    from aligner_middleware.evaluation.reference_judge import Judge, Judgement
    from aligner_middleware.evaluation.report import write_report
    from aligner_middleware.evaluation.sentence_encoder import SentenceEncoder

# The module of each public name, imported on first use: stop rules are read without onnx.
_MODULES = {
    "ChatJudge": "pairwise",
    "Compared": "comparison",
    "Comparison": "comparison",
    "Evaluation": "held_out",
    "Judge": "reference_judge",
    "Judgement": "reference_judge",
    "OfflineJudge": "pairwise",
    "Pair": "pairwise",
    "Scored": "held_out",
    "Scores": "held_out",
    "SentenceEncoder": "sentence_encoder",
    "Tally": "comparison",
    "compare": "comparison",
    "evaluate": "held_out",
    "write_report": "report",
}

__all__ = [
    "ChatJudge",
    "Compared",
    "Comparison",
    "Evaluation",
    "Judge",
    "Judgement",
    "OfflineJudge",
    "Pair",
    "Scored",
    "Scores",
    "SentenceEncoder",
    "Tally",
    "compare",
    "evaluate",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
