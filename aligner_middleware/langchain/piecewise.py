"""Plans how an answer goes through the aligner: without its reasoning, whole or in pieces; and joins the corrections.

Texts in, texts out; it knows nothing of messages, and corrects nothing itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aligner_middleware.correction import Correction, Usage
from aligner_middleware.errors import InputError, MissingQuestionError, PromptTooLongError
from aligner_middleware.langchain.options import AlignmentOptions, limits_length
from aligner_middleware.langchain.outcome import Outcome, failed, unaligned, without_question
from aligner_middleware.text.reasoning import apart
from aligner_middleware.text.split import CONTEXT, continuation, split
from aligner_middleware.text.structure import breaks_json

if TYPE_CHECKING:
    from aligner_middleware.text.template import Verdict

QuestionOrError = str | Exception
"""A question, or what went wrong in finding it, to which the options apply."""


@dataclass(frozen=True)
class Piece:
    """One question and text for the aligner, and what stands around the text in the answer.

    Attributes:
        question, text: The pair to correct.
        reasoning: Reasoning before the text, which stays as it is.
        before, after: White space around the text, which the aligner does not see.
    """

    question: str
    text: str
    reasoning: str = ""
    before: str = ""
    after: str = ""


@dataclass(frozen=True)
class Plan:
    """An answer in pieces.

    Attributes:
        question, answer: The pair as it came.
        pieces: What the aligner corrects, in order; none for an answer that is nothing but reasoning.
        rest: Reasoning after the last piece.
        released: The beginning of the answer that has been shown, and stays.
    """

    question: str
    answer: str
    pieces: list[Piece]
    rest: str
    released: str = ""

    @classmethod
    def of(
        cls, question: str, answer: str, parts: Sequence[tuple[str, str]], released: str = "", *, cut: bool = False
    ) -> Plan:
        """Make a piece of each text; a later one is asked with the question and the end of what stands before it.

        Args:
            question: The question.
            answer: The answer.
            parts: The answer, as pairs of reasoning and the text after it.
            released: What has been shown of it, and stays. The only piece of an answer may begin with it; before several
                pieces it stands as reasoning does.
            cut: Whether these are parts of a long answer, after what was released.
        """
        several = cut or sum(bool(text.strip()) for _, text in parts) > 1
        if several and not cut:
            parts = _after(parts, released)
        texts, reasoning = [], ""
        for kept, text in parts:
            reasoning += kept
            if text.strip():
                texts.append((reasoning, text))
                reasoning = ""
            else:
                reasoning += text
        if len(texts) == 1 and not (several and released):
            ((kept, text),) = texts
            return cls(question, answer, [Piece(question, text, kept)], reasoning, released)
        return cls(question, answer, _with_context(question, texts, released), reasoning, released)

    def join(self, corrections: Sequence[Correction]) -> Correction:
        """Join the corrections of the pieces. A text that several pieces became, such as a refusal, stands once.

        The whole is kept where every piece is; else several are an edit. Its score is the highest of theirs. What was JSON
        stays JSON: a correction that is not is in doubt, and the answer stays.
        """
        repeated = _repeated(corrections)
        texts = [None if again else piece.corrected for piece, again in zip(corrections, repeated, strict=True)]
        written = [None if again else _written(piece) for piece, again in zip(corrections, repeated, strict=True)]
        text, proposed = self._filled(texts), self._filled(written)
        doubts = tuple(dict.fromkeys(name for piece in corrections for name in piece.doubts))
        original = self._filled([piece.text for piece in self.pieces], reasoning=False)
        if breaks_json(original, self._filled(texts, reasoning=False)):
            text, doubts = self.answer, doubts if "structure" in doubts else (*doubts, "structure")
        return Correction(
            self.question,
            self.answer,
            text,
            next((piece.finish_reason for piece in corrections if piece.finish_reason != "stop"), "stop"),
            sum((piece.usage for piece in corrections), Usage()),
            verdict=_joint_verdict([piece.verdict for piece in corrections if piece.verdict]),
            score=max((piece.score for piece in corrections if piece.score is not None), default=None),
            doubts=doubts,
            proposed=proposed if proposed != text else None,
            instruction=corrections[0].instruction if corrections else None,
            released=len(self.released),
            late=sum(piece.late for piece in corrections),
        )

    def _filled(self, texts: Sequence[str | None], *, reasoning: bool = True) -> str:
        """Put texts in the places of the pieces, and leave out those that are `None`; without the reasoning, if wanted."""
        filled = "".join(
            (piece.reasoning if reasoning else "") + ("" if text is None else piece.before + text + piece.after)
            for piece, text in zip(self.pieces, texts, strict=True)
        )
        return filled + (self.rest if reasoning else "")


def plan_answer(
    options: AlignmentOptions, question: QuestionOrError, answer: str, released: str = ""
) -> Plan | Outcome:
    """Plan how an answer is corrected, apart from its beginning that was released; or decide at once, where it is not."""
    if isinstance(question, MissingQuestionError):
        return without_question(options, answer, question)
    if isinstance(question, Exception):
        return failed(options, answer, question)
    try:
        if options.when is not None and not options.when(question, answer):
            return unaligned(options, answer, "when")
        parts = apart(answer)
        if limits_length(options):
            return _plan_by_length(options, question, answer, parts, released)
        return Plan.of(question, answer, parts, released)
    except Exception as exc:
        return failed(options, answer, exc)


def _plan_by_length(
    options: AlignmentOptions, question: str, answer: str, parts: list[tuple[str, str]], released: str
) -> Plan | Outcome:
    aligner = options.aligner
    try:
        limit = aligner.longest_answer(question, options.instruction)
    except PromptTooLongError as exc:  # no option for answers can shorten the question
        if options.on_long_answer != "passthrough":
            raise
        return unaligned(options, answer, str(exc))
    if options.max_answer_tokens is not None:
        limit = min(limit, options.max_answer_tokens)
    tokens = sum(aligner.count_tokens(text, at_most=limit) for _, text in parts)
    if tokens <= limit:
        return Plan.of(question, answer, parts, released)
    if options.on_long_answer == "passthrough":
        return unaligned(options, answer, f"{tokens} tokens are more than {limit}")
    if options.on_long_answer == "raise":
        raise InputError(
            f"the answer is {tokens} tokens long, and max_answer_tokens allows {limit}: raise it, or choose "
            "on_long_answer='passthrough' or 'piecewise'"
        )
    room = min(limit, aligner.longest_answer(continuation(question, "…" * CONTEXT), options.instruction))
    cut = [
        (reasoning if index == 0 else "", text)
        for reasoning, whole in _after(parts, released)
        for index, text in enumerate(split(whole, room, aligner.count_tokens) or [""])
    ]
    return Plan.of(question, answer, cut, released, cut=True)


def _after(parts: Sequence[tuple[str, str]], released: str) -> list[tuple[str, str]]:
    """Put what was released with the reasoning before the first text: it stays, too."""
    (reasoning, text), *others = parts
    shown = max(0, len(released) - len(reasoning))
    return [(reasoning + text[:shown], text[shown:]), *others]


def _with_context(question: str, texts: Iterable[tuple[str, str]], before: str) -> list[Piece]:
    """Make pieces of pairs of reasoning and text, each asked with the end of the text before it."""
    pieces = []
    for reasoning, text in texts:
        asked = continuation(question, before) if before else question
        start, end = len(text) - len(text.lstrip()), len(text.rstrip())
        pieces.append(Piece(asked, text[start:end], reasoning, text[:start], text[end:]))
        before += text
    return pieces


def _repeated(corrections: Iterable[Correction]) -> list[bool]:
    """Say of each correction whether it changed its piece into a text that stands before it already."""
    seen: set[str] = set()
    repeated = []
    for correction in corrections:
        repeated.append(correction.changed and correction.corrected in seen)
        seen.add(correction.corrected)
    return repeated


def _joint_verdict(verdicts: Sequence[Verdict]) -> Verdict | None:
    if len(verdicts) <= 1:
        return verdicts[0] if verdicts else None
    return "keep" if set(verdicts) == {"keep"} else "edit"


def _written(correction: Correction) -> str:
    """Give the aligner's text, also where a safeguard objects to it."""
    return correction.corrected if correction.proposed is None else correction.proposed
