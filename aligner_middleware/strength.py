"""How willingly an aligner corrects, and what it does with a doubtful correction: the options of every call.

It imports nothing heavy: whoever only names these options loads no engine.
"""

from __future__ import annotations

from typing import Literal

Level = Literal["low", "medium", "high"]
LEVELS: tuple[Level, ...] = ("low", "medium", "high")

Strength = Level | float
"""A level; or the score above which an answer is corrected, 0 to 1; without verdicts a tolerance, in nats."""

OnDoubt = Literal["passthrough", "raise", "keep"]
"""The treatment of a correction that a safeguard objects to: the original answer, an error, or the correction."""
