"""`llm | AlignerRunnable()`: corrects every answer that comes by, and passes all else of the message on.

The runnable interface only: `jobs.py` makes a job of each value, its answer and the question that belongs to it, and
corrects it; `streaming.py` does the same for chunks.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from langchain_core.callbacks import AsyncCallbackManagerForChainRun, CallbackManagerForChainRun
from langchain_core.messages import AIMessage
from langchain_core.runnables import RunnableConfig, RunnableSerializable
from pydantic import ValidationError

from aligner_middleware.closing import aclosing
from aligner_middleware.langchain import question_handler
from aligner_middleware.langchain.alignment import Alignment
from aligner_middleware.langchain.events import adispatch_event, dispatch_event
from aligner_middleware.langchain.jobs import Job, aalign_values, align_values, amake_job, early_question, make_job
from aligner_middleware.langchain.options import (
    LongAnswer,
    MissingQuestion,
    Mode,
    OnError,
    as_input_error,
    check_names,
    check_options,
    option_names,
)
from aligner_middleware.langchain.outcome import unwrap
from aligner_middleware.langchain.streaming import (
    ChunkBuffer,
    aaligned_chunks,
    aligned_chunks,
    stands_alone,
    untouched_end,
    whole_answer,
    without_end,
)
from aligner_middleware.langchain.wrap import WrapMethod

if TYPE_CHECKING:
    from aligner_middleware.aligner import Aligner
    from aligner_middleware.correction import Correction
    from aligner_middleware.read_ahead import ReadAhead
    from aligner_middleware.strength import OnDoubt, Strength

V = TypeVar("V", bound=str | AIMessage | Mapping[str, Any])  # the same kind of value comes out, its answer aligned


class AlignerRunnable(RunnableSerializable[Any, Any], Alignment):
    """Correct the answers of whatever stands to its left: `llm | AlignerRunnable()`.

    Takes and gives text; messages (an `AIMessage` keeps its id, tool calls, usage and other blocks; only its text is
    replaced, and `response_metadata["aligner"]` says what was done); `{"question": …, "answer": …}`; or a state whose
    `messages` end with an answer. Messages without text, such as bare tool calls, pass through untouched, and so do those
    that this aligner has aligned before.

    Args:
        aligner: An `Aligner`, or what `Aligner.load` takes: `default`, a hub id, a folder.
        question, dialogue, when, strength, by_sentence, on_doubt, instruction, mode, on_error, fallback, on_missing_question,
            timeout, max_answer_tokens, on_long_answer, keep_original, on_correction: See `AlignmentOptions`; all of them may
            be set per call by `configurable_fields`.
        name: Of its runs in traces.
        load_options: Passed to `Aligner.load`, such as `precision=`.

    Raises:
        TypeError: If there is no option of a name; the error has the nearest one.
        InputError: If a value is misspelt, with the nearest one that there is; out of range; or contradicts another.
        AlignerError: As `Aligner.load` does; later, on invoking, as `Aligner.correct` does.
        MissingQuestionError: On invoking, where the question is not known and `on_missing_question="raise"`.
    """

    wrap: ClassVar[WrapMethod] = WrapMethod()

    def __init__(
        self,
        aligner: Aligner | str = "default",
        *,
        question: str | Callable[[Any], str | None] | None = None,
        dialogue: bool = False,
        when: Callable[[str, str], bool] | None = None,
        strength: Strength = "medium",
        by_sentence: bool = False,
        on_doubt: OnDoubt = "passthrough",
        instruction: str | None = None,
        mode: Mode = "correct",
        on_error: OnError = "raise",
        fallback: str | None = None,
        on_missing_question: MissingQuestion = "raise",
        timeout: float | None = None,
        max_answer_tokens: int | None = None,
        on_long_answer: LongAnswer = "raise",
        keep_original: bool = False,
        on_correction: Callable[[Correction], None] | None = None,
        name: str | None = None,
        **load_options: Any,
    ) -> None:
        from aligner_middleware.aligner import Aligner  # late: it loads the engine

        check_names(type(self).__name__, load_options, option_names())
        if isinstance(aligner, Aligner) and load_options:
            raise TypeError(f"{sorted(load_options)} can be given with a model's name only, not with an Aligner")
        options = {
            "question": question,
            "dialogue": dialogue,
            "when": when,
            "strength": strength,
            "by_sentence": by_sentence,
            "on_doubt": on_doubt,
            "instruction": instruction,
            "mode": mode,
            "on_error": on_error,
            "fallback": fallback,
            "on_missing_question": on_missing_question,
            "timeout": timeout,
            "max_answer_tokens": max_answer_tokens,
            "on_long_answer": on_long_answer,
            "keep_original": keep_original,
            "on_correction": on_correction,
            "name": name,
        }
        check_options(options)  # before an aligner is loaded
        loaded = aligner if isinstance(aligner, Aligner) else Aligner.load(aligner, **load_options)
        try:
            super().__init__(aligner=loaded, **options)
        except ValidationError as exc:
            raise as_input_error(exc) from None
        self._listen()

    def __setstate__(self, state: dict[Any, Any]) -> None:
        super().__setstate__(state)
        self._listen()  # in the process that it was unpickled in

    def _listen(self) -> None:
        if self.question is None:
            question_handler.listen(dialogues=self.dialogue)

    @classmethod
    def is_lc_serializable(cls) -> bool:
        """It is not: an aligner holds a model, which is loaded again."""
        return False

    @property
    def InputType(self) -> Any:
        """What it takes: text, a message, or a dict."""
        return str | AIMessage | dict[str, Any]

    @property
    def OutputType(self) -> Any:
        """What it gives: text for text, a message for a message, a dict for a dict."""
        return self.InputType

    def __repr__(self) -> str:
        return f"AlignerRunnable({self.described()})"

    __str__ = __repr__

    # --- the runnable interface ---------------------------------------------------------------------

    def invoke(self, input: V, config: RunnableConfig | None = None, **kwargs: Any) -> V:
        """Correct one answer."""
        aligned: V = self._call_with_config(self._align_one, input, config, **kwargs)
        return aligned

    async def ainvoke(self, input: V, config: RunnableConfig | None = None, **kwargs: Any) -> V:
        """Correct one answer, off the event loop."""
        aligned: V = await self._acall_with_config(self._aalign_one, input, config, **kwargs)
        return aligned

    def batch(
        self,
        inputs: list[V],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[V]:
        """Correct several answers in one batch of the engine."""
        return self._batch_with_config(self._align, inputs, config, return_exceptions=return_exceptions, **kwargs)

    async def abatch(
        self,
        inputs: list[V],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[V]:
        """Correct several answers in one batch of the engine, off the event loop."""
        return await self._abatch_with_config(
            self._aalign, inputs, config, return_exceptions=return_exceptions, **kwargs
        )

    def stream(self, input: V, config: RunnableConfig | None = None, **kwargs: Any) -> Iterator[V]:
        """Correct one answer and give it in pieces as they are decided."""
        yield from self.transform(iter([input]), config, **kwargs)

    async def astream(self, input: V, config: RunnableConfig | None = None, **kwargs: Any) -> AsyncIterator[V]:
        """Correct one answer, off the event loop, and give it in pieces as they are decided."""

        async def inputs() -> AsyncIterator[V]:
            yield input

        async with aclosing(self.atransform(inputs(), config, **kwargs)) as pieces:
            async for piece in pieces:
                yield piece

    def transform(self, input: Iterator[V], config: RunnableConfig | None = None, **kwargs: Any) -> Iterator[V]:
        """Gather an answer's chunks, correct it, and give the correction in pieces."""
        yield from self._transform_stream_with_config(input, self._align_chunks, config, **kwargs)

    async def atransform(
        self, input: AsyncIterator[V], config: RunnableConfig | None = None, **kwargs: Any
    ) -> AsyncIterator[V]:
        """Gather an answer's chunks, correct it off the event loop, and give the correction in pieces."""
        aligned = self._atransform_stream_with_config(input, self._aalign_chunks, config, **kwargs)
        async with aclosing(input), aclosing(aligned) as pieces:
            async for piece in pieces:
                yield piece

    # --- values in, values out ------------------------------------------------------------------------

    def _align_one(self, value: Any, run_manager: CallbackManagerForChainRun) -> Any:
        return unwrap(self._align([value], [run_manager])[0])

    async def _aalign_one(self, value: Any, run_manager: AsyncCallbackManagerForChainRun) -> Any:
        return unwrap((await self._aalign([value], [run_manager]))[0])

    def _align(self, values: Sequence[Any], run_manager: Sequence[CallbackManagerForChainRun]) -> list[Any]:
        return align_values(self, values, run_manager)

    async def _aalign(self, values: Sequence[Any], run_manager: Sequence[AsyncCallbackManagerForChainRun]) -> list[Any]:
        return await aalign_values(self, values, run_manager)

    # --- chunks in, chunks out ------------------------------------------------------------------------

    def _align_chunks(self, chunks: Iterator[Any], run_manager: CallbackManagerForChainRun) -> Iterator[Any]:
        buffer = ChunkBuffer(self, lambda chunk: early_question(self, chunk, run_manager))
        try:
            for chunk in chunks:
                if stands_alone(chunk, shadow=self.mode == "shadow"):
                    yield self._align_one(chunk, run_manager)
                else:
                    buffer.add(chunk)
                    if self.mode == "shadow":
                        yield without_end(chunk)
                    yield from buffer.release()
            if (value := whole_answer(self, buffer)) is not None:
                yield from self._stream_one(value, buffer.ahead, run_manager)
        finally:
            buffer.close()

    def _stream_one(self, value: Any, ahead: ReadAhead | None, run: CallbackManagerForChainRun) -> Iterator[Any]:
        job = make_job(self, value, run)
        if isinstance(job, Job):
            yield from aligned_chunks(self, job.answer, job.question, ahead, partial(dispatch_event, run))
        else:
            yield from untouched_end(self, unwrap(job), ahead)

    async def _aalign_chunks(
        self, chunks: AsyncIterator[Any], run_manager: AsyncCallbackManagerForChainRun
    ) -> AsyncIterator[Any]:
        buffer = ChunkBuffer(self, lambda chunk: early_question(self, chunk, run_manager))
        try:
            async with aclosing(chunks) as given:
                async for chunk in given:
                    if stands_alone(chunk, shadow=self.mode == "shadow"):
                        yield await self._aalign_one(chunk, run_manager)
                    else:
                        buffer.add(chunk)
                        if self.mode == "shadow":
                            yield without_end(chunk)
                        for released in await buffer.arelease():
                            yield released
            if (value := whole_answer(self, buffer)) is not None:
                async with aclosing(self._astream_one(value, buffer.ahead, run_manager)) as pieces:
                    async for piece in pieces:
                        yield piece
        finally:
            buffer.close()

    async def _astream_one(
        self, value: Any, ahead: ReadAhead | None, run: AsyncCallbackManagerForChainRun
    ) -> AsyncIterator[Any]:
        job = await amake_job(self, value, run)
        if isinstance(job, Job):
            dispatch = partial(adispatch_event, run)
            async with aclosing(aaligned_chunks(self, job.answer, job.question, ahead, dispatch)) as chunks:
                async for chunk in chunks:
                    yield chunk
        else:
            for rest in untouched_end(self, unwrap(job), ahead):
                yield rest


AlignerRunnable.model_rebuild()  # else pydantic shows the base class's signature until the first is made
