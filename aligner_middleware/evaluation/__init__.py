"""Measures what an aligner does to answers; needs the `[build]` extra, for its sentence encoder."""

from aligner_middleware.evaluation.encoder import SentenceEncoder
from aligner_middleware.evaluation.judge import Judge, Judgement
from aligner_middleware.evaluation.scores import Evaluation, Scored, Scores, evaluate

__all__ = ["Evaluation", "Judge", "Judgement", "Scored", "Scores", "SentenceEncoder", "evaluate"]
