"""A question and an answer on their way through the engine."""

from __future__ import annotations

from dataclasses import dataclass

from aligner_middleware.engine import Generation
from aligner_middleware.strength import OnDoubt
from aligner_middleware.text.edits import count_sentences


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
    def released_sentences(self) -> int:
        """The number of sentences that begin in what has been shown."""
        return count_sentences(self.text, self.released)

    def for_verdict(self) -> Request:
        """Have its generation end with its verdict, and give the request itself."""
        if self.generation is not None:
            self.generation.verdict_only, self.generation.max_new_tokens = True, 1
        return self

    @property
    def decodes_final_text(self) -> bool:
        """Whether text may be shown as it is decoded, because no safeguard and no verdict can replace it later."""
        return self.on_doubt == "keep" and self.generation is not None and self.generation.rule is None
