"""The outcome of a correction and its cost."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any

from aligner_middleware.diff import Diff

if TYPE_CHECKING:
    from aligner_middleware.engine.generation import FinishReason
    from aligner_middleware.text.template import Verdict


@dataclass(frozen=True)
class Usage:
    """The cost of a correction.

    Attributes:
        prompt_tokens: Length of the prompt, which holds question and answer; of all prompts, where smaller edits or the rest
            of an answer had their own.
        draft_tokens: Length of the answer where it was given to the model as a draft of its output.
        accepted_tokens: Draft tokens that the model accepted.
        decoded_tokens: Tokens decoded one by one.
        passes: Forward passes; 1 where nothing was corrected.
        seconds: Time in the engine.
    """

    prompt_tokens: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    decoded_tokens: int = 0
    passes: int = 0
    seconds: float = 0.0

    def __add__(self, other: Usage) -> Usage:
        """Add the costs of two corrections."""
        return Usage(*(one + two for one, two in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class Correction:
    """The outcome of a correction.

    Attributes:
        question, original: The input.
        corrected: What the aligner makes of it: `original` itself, character by character, where it changes nothing or a
            safeguard objects.
        finish_reason: `stop`; `length` where `max_new_tokens` cut the correction off; `loop` where it repeated itself.
        usage: Its cost.
        verdict: `keep`, `edit` or `rewrite`; `None` for an aligner without verdicts, and for a blank answer.
        score: P(not keep), 0 to 1, where there is a verdict.
        doubts: Names of the safeguards that object to the correction (`safeguards.py`); empty for most.
        proposed: The aligner's text where a doubt leaves `corrected` equal to the original; `None` otherwise.
        instruction: The instruction that it was made by, if there was one.
        released: How many characters of `original` had been shown before the answer was whole, and so stay.
        late: How many of the sentences in them the aligner would change now.
    """

    question: str
    original: str
    corrected: str
    finish_reason: FinishReason
    usage: Usage
    verdict: Verdict | None = None
    score: float | None = None
    doubts: tuple[str, ...] = ()
    proposed: str | None = None
    instruction: str | None = None
    released: int = 0
    late: int = 0

    @property
    def changed(self) -> bool:
        """Whether anything was corrected."""
        return self.corrected != self.original

    def diff(self) -> Diff:
        """Compare the corrected answer with the original, word by word."""
        return Diff.between(self.original, self.corrected)

    def __rich__(self) -> Any:
        """Show the answer in a terminal, with the words marked that went and that came."""
        return self.diff().__rich__()

    def _repr_html_(self) -> str:
        """Show it in a notebook."""
        return self.diff().html()
