"""Aligns pairs of question and answer: together, one by one, or as a stream.

`Alignment` is what the runnable and the chat model are made of. Pairs of texts go in; outcomes come out. It knows nothing
of messages.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

from langchain_core.runnables.config import run_in_executor

from aligner_middleware.errors import MissingQuestionError
from aligner_middleware.langchain.metadata import is_about
from aligner_middleware.langchain.options import AlignmentOptions, call_options, limits_length, raises
from aligner_middleware.langchain.outcome import Outcome, corrected, failed
from aligner_middleware.langchain.piecewise import Piece, Plan, QuestionOrError, plan_answer
from aligner_middleware.text.structure import breaks_json

if TYPE_CHECKING:
    from aligner_middleware.correction import Correction
    from aligner_middleware.read_ahead import ReadAhead
    from aligner_middleware.streaming import CorrectionStream

Pair = tuple[QuestionOrError, str]  # question and answer

T = TypeVar("T")


class Alignment(AlignmentOptions):
    """An aligner and its options, applied to pairs of question and answer."""

    @property
    def told(self) -> str | None:
        """The instruction that answers are corrected by: its own, or else the aligner's; `None` for none."""
        given = self.aligner.identity.get("instruction") if self.instruction is None else self.instruction
        return (given or "").strip() or None

    def align_pairs(self, pairs: Sequence[Pair]) -> list[Outcome]:
        """Align answers together. One that fails becomes its exception, by `on_error`; the others are not held up."""
        return _correct(self, [plan_answer(self, question, answer) for question, answer in pairs])

    async def aalign_pair(self, question: QuestionOrError, answer: str) -> Outcome:
        """Align one answer, and leave the event loop free."""
        return await _acorrect(self, await _aplan_answer(self, question, answer))

    def read_ahead(self, question: QuestionOrError | None) -> ReadAhead:
        """Get ready to read an answer while it arrives, and to decide on its sentences by `by_sentence`.

        Args:
            question: The question; nothing is read where it is not known.
        """
        known = question if isinstance(question, str) else ""
        return self.aligner.read_ahead(
            known,
            by_sentence=self.by_sentence,
            timeout=self.timeout,
            strength=self.strength,
            instruction=self.instruction,
        )

    def stream_pair(self, question: QuestionOrError, answer: str, ahead: ReadAhead | None = None) -> AlignedStream:
        """Align one answer, and give the text as soon as nothing can take it back.

        Args:
            question: The question, or why it is not known.
            answer: The whole answer.
            ahead: What has read the answer while it arrived. Text that it has released stays, and is not given again.
        """
        return AlignedStream(self, question, answer, ahead)

    def has_aligned(self, answer: str, metadata: dict[str, Any]) -> bool:
        """Say, from its metadata, whether this aligner has aligned an answer so before, and nobody has changed it since."""
        ours = bool(metadata.get("aligned")) and metadata.get("model") == self.aligner.name
        return ours and metadata.get("instruction") == self.told and is_about(metadata, answer)

    def ask(self, find: Callable[[Any], str | None], value: Any) -> QuestionOrError:
        """Call a user's function for the question. An error, or that it returns none, is given for the options."""
        try:
            question = find(value)
        except Exception as exc:
            return exc
        return MissingQuestionError("the function question= returned None") if question is None else question

    async def aquestion(self, find: Callable[..., T], *args: Any) -> T:
        """Call a function that finds the question, in a thread where it calls a user's function."""
        return await run_in_executor(None, find, *args) if callable(self.question) else find(*args)


class AlignedStream:
    """An aligned answer in pieces of text. Iterate it once, with `for` or `async for`; then read `outcome`.

    With a `fallback`, `on_error="passthrough"`, for an answer in pieces, for JSON and in shadow mode there are no pieces: the
    text of the outcome is all there is. Nothing is raised while it is iterated; an error is the outcome.
    """

    def __init__(
        self, options: AlignmentOptions, question: QuestionOrError, answer: str, ahead: ReadAhead | None
    ) -> None:
        self._options = options
        self._pair = question, answer
        self._ahead = ahead
        self._released = ahead.released if ahead is not None else ""
        self._outcome: Outcome | None = None
        self._pieces: Generator[str, None, None] | None = None
        self._apieces: AsyncGenerator[str, None] | None = None

    @property
    def outcome(self) -> Outcome:
        """The outcome; its text is the whole text, also that of the pieces.

        Raises:
            RuntimeError: If the stream was not iterated to its end.
        """
        if self._outcome is None:
            raise RuntimeError("iterate the stream to its end, then read its outcome")
        return self._outcome

    def __iter__(self) -> Generator[str, None, None]:
        self._pieces = self._decided()
        return self._pieces

    def __aiter__(self) -> AsyncGenerator[str, None]:
        self._apieces = self._adecided()
        return self._apieces

    def close(self) -> None:
        """Give up the correction, where it is not finished."""
        if self._pieces is not None:
            self._pieces.close()

    async def aclose(self) -> None:
        """Give up the correction, where it is not finished."""
        if self._apieces is not None:
            await self._apieces.aclose()

    def _decided(self) -> Generator[str, None, None]:
        plan = plan_answer(self._options, *self._pair, self._released)
        if not _is_one_piece(plan):
            (self._outcome,) = _correct(self._options, [plan])
            return
        with self._corrected(plan) as (before, stream, shows):
            if before:
                yield before
            for text in stream:
                if shows:
                    yield text

    async def _adecided(self) -> AsyncGenerator[str, None]:
        plan = await _aplan_answer(self._options, *self._pair, self._released)
        if not _is_one_piece(plan):
            self._outcome = await _acorrect(self._options, plan)
            return
        with self._corrected(plan) as (before, stream, shows):
            if before:
                yield before
            async for text in stream:
                if shows:
                    yield text

    @contextmanager
    def _corrected(self, plan: Plan) -> Iterator[tuple[str, CorrectionStream, bool]]:
        """Correct the only piece of an answer. The outcome is made after the last text, or of an error.

        Gives what stands before it and is to be shown, the stream to be iterated to its end, and whether its text is shown.
        """
        options, (piece,) = self._options, plan.pieces
        shows = _shows_pieces(options, piece)
        before = piece.reasoning + piece.before
        arguments = {"ahead": self._ahead, "released": self._released[len(before) :], **call_options(options)}
        try:
            with closing(options.aligner.stream(piece.question, piece.text, **arguments)) as stream:
                yield before[len(self._released) :] if shows else "", stream, shows
                self._outcome = _conclude(options, plan, [stream.correction])
        except Exception as exc:
            self._outcome = failed(options, plan.answer, exc)


def _is_one_piece(plan: Plan | Outcome) -> TypeGuard[Plan]:
    """Say whether an answer is corrected as one piece, which can be streamed."""
    return isinstance(plan, Plan) and len(plan.pieces) == 1


def _shows_pieces(options: AlignmentOptions, piece: Piece) -> bool:
    """Say whether text may be shown before it is known that nothing fails. JSON may not: it must not become anything else."""
    return raises(options) and not breaks_json(piece.text, "")


async def _aplan_answer(
    options: AlignmentOptions, question: QuestionOrError, answer: str, released: str = ""
) -> Plan | Outcome:
    """Plan in a thread where that may take long: a user's function, or counting the tokens of a long answer."""
    if options.when is None and not limits_length(options):
        return plan_answer(options, question, answer, released)
    return await run_in_executor(None, plan_answer, options, question, answer, released)


def _correct(options: AlignmentOptions, plans: Sequence[Plan | Outcome]) -> list[Outcome]:
    """Correct what is planned, all of it together."""
    pairs = [(piece.question, piece.text) for plan in plans if isinstance(plan, Plan) for piece in plan.pieces]
    arguments = {"return_exceptions": True, **call_options(options)}
    try:
        results = iter(options.aligner.correct_batch(pairs, **arguments) if pairs else ())
    except Exception as exc:  # of all of them, such as a closed aligner
        return [failed(options, plan.answer, exc) if isinstance(plan, Plan) else plan for plan in plans]
    return [
        _conclude(options, plan, [next(results) for _ in plan.pieces]) if isinstance(plan, Plan) else plan
        for plan in plans
    ]


async def _acorrect(options: AlignmentOptions, plan: Plan | Outcome) -> Outcome:
    if not isinstance(plan, Plan):
        return plan
    try:
        pairs = [(piece.question, piece.text) for piece in plan.pieces]
        return _conclude(options, plan, await options.aligner.acorrect_batch(pairs, **call_options(options)))
    except Exception as exc:
        return failed(options, plan.answer, exc)


def _conclude(options: AlignmentOptions, plan: Plan, results: Sequence[Correction | Exception]) -> Outcome:
    """Make the outcome of an answer from the results of its pieces; one that failed fails the answer."""
    corrections = []
    for result in results:
        if isinstance(result, Exception):
            return failed(options, plan.answer, result)
        corrections.append(result)
    return corrected(options, plan.answer, plan.join(corrections))
