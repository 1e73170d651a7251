"""Measures what an aligner does to answers; needs the `[build]` extra, for its sentence encoder."""

from aligner_middleware.evaluation.comparison import Compared, Comparison, Tally, compare
from aligner_middleware.evaluation.encoder import SentenceEncoder
from aligner_middleware.evaluation.judge import Judge, Judgement
from aligner_middleware.evaluation.report import write_report
from aligner_middleware.evaluation.scores import Evaluation, Scored, Scores, evaluate
from aligner_middleware.evaluation.verdicts import ChatJudge, OfflineJudge, Pair

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
