"""Measures what an aligner does to answers; the judges' sentence encoder needs the `[build]` extra."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aligner_middleware.lazy import on_first_use

if TYPE_CHECKING:
    from aligner_middleware.evaluation.comparison import Comparison, ComparisonRow, Tally, compare
    from aligner_middleware.evaluation.held_out import Evaluation, ScoredRow, Scores, evaluate
    from aligner_middleware.evaluation.pairwise import ChatJudge, OfflineJudge, Pair, PairwiseJudge
    from aligner_middleware.evaluation.reference_judge import Judgement, ReferenceJudge
    from aligner_middleware.evaluation.report import write_report
    from aligner_middleware.evaluation.sentence_encoder import SentenceEncoder

# The module of each public name. It is imported on first use, so that one module does not load all the others.
_MODULES = {
    "ChatJudge": "pairwise",
    "Comparison": "comparison",
    "ComparisonRow": "comparison",
    "Evaluation": "held_out",
    "Judgement": "reference_judge",
    "OfflineJudge": "pairwise",
    "Pair": "pairwise",
    "PairwiseJudge": "pairwise",
    "ReferenceJudge": "reference_judge",
    "ScoredRow": "held_out",
    "Scores": "held_out",
    "SentenceEncoder": "sentence_encoder",
    "Tally": "comparison",
    "compare": "comparison",
    "evaluate": "held_out",
    "write_report": "report",
}

__all__ = [
    "ChatJudge",
    "Comparison",
    "ComparisonRow",
    "Evaluation",
    "Judgement",
    "OfflineJudge",
    "Pair",
    "PairwiseJudge",
    "ReferenceJudge",
    "ScoredRow",
    "Scores",
    "SentenceEncoder",
    "Tally",
    "compare",
    "evaluate",
    "write_report",
]


__getattr__ = on_first_use(__name__, _MODULES)


def __dir__() -> list[str]:
    return __all__
