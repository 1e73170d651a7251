"""A question and an answer on their way through the engine."""

from __future__ import annotations

from dataclasses import dataclass

from aligner_middleware.engine import Generation
from aligner_middleware.strength import OnDoubt


@dataclass(frozen=True)
class Request:
    """A question and an answer, encoded.

    Attributes:
        question, answer: As given.
        instruction: How to correct it, if that was said.
        reasoning: A block of reasoning at the answer's beginning, which stays as it is.
        text: The rest, which is corrected.
        generation: Its sequence; `None` for a blank text, which is not corrected.
        on_doubt: What to do with a doubtful correction.
        released: Characters at the text's beginning that stay, because they have been shown.
    """

    question: str
    answer: str
    instruction: str | None
    reasoning: str
    text: str
    generation: Generation | None
    on_doubt: OnDoubt
    released: int = 0

    @property
    def decodes_final_text(self) -> bool:
        """Whether text may be shown as it is decoded, because no safeguard and no verdict can replace it later."""
        return self.on_doubt == "keep" and self.generation is not None and self.generation.rule is None
