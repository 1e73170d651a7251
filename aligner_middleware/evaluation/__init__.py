"""Measures what an aligner does to answers; needs the `[build]` extra, for its sentence encoder."""

from aligner_middleware.evaluation.comparison import Compared, Comparison, Tally, compare
from aligner_middleware.evaluation.held_out import Evaluation, Scored, Scores, evaluate
from aligner_middleware.evaluation.pairwise import ChatJudge, OfflineJudge, Pair
from aligner_middleware.evaluation.reference_judge import Judge, Judgement
from aligner_middleware.evaluation.report import write_report
from aligner_middleware.evaluation.sentence_encoder import SentenceEncoder

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
