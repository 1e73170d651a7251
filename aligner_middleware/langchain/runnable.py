"""`llm | AlignerRunnable()`: corrects every answer that comes by, and passes all else of the message on.

A value's way: `values.py` finds the answer in what came in, `question.py` finds its question, the two are a `_Job`; jobs
are corrected together (`alignment.py`), and what became of each answer goes back into the value that it came from.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Protocol, TypeVar, overload

from langchain_core.callbacks import AsyncCallbackManagerForChainRun, CallbackManagerForChainRun
from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.runnables import Runnable, RunnableConfig, RunnableSerializable
from pydantic import ValidationError

from aligner_middleware.aligner import Aligner, OnDoubt, ReadAhead, Strength
from aligner_middleware.correction import Correction
from aligner_middleware.langchain import question_record as questions
from aligner_middleware.langchain.alignment import (
    Aligned,
    Alignment,
    Asked,
    LongAnswer,
    MissingQuestion,
    Mode,
    OnError,
    as_input_error,
    atell,
    check_names,
    check_options,
    logger,
    or_raise,
    tell,
)
from aligner_middleware.langchain.answers import Answer, is_update, locate
from aligner_middleware.langchain.chat_model import AlignedChatModel, wrapped
from aligner_middleware.langchain.streaming import (
    Gathering,
    aaligned_chunks,
    aligned_chunks,
    closing,
    is_whole,
    passing,
)

V = TypeVar("V", bound=str | AIMessage | Mapping[str, Any])  # what is given is what was taken, its answer aligned
ChainRun = CallbackManagerForChainRun | AsyncCallbackManagerForChainRun


@dataclass(frozen=True)
class _Job:
    """One answer to correct, and the question that it answers."""

    answer: Answer
    question: Asked


class _Wrapping(Protocol):
    """A chat model gives a chat model; one with arguments bound, retries or fallbacks, the same around one."""

    @overload
    def __call__(self, llm: BaseChatModel, aligner: Aligner | str = ..., **options: Any) -> AlignedChatModel: ...

    @overload
    def __call__(
        self, llm: Runnable[LanguageModelInput, AIMessage], aligner: Aligner | str = ..., **options: Any
    ) -> Runnable[LanguageModelInput, AIMessage]: ...


class _Wrap:
    """`AlignerRunnable.wrap(llm)`, and `AlignerRunnable(…).wrap(llm)` with what that one was given."""

    def __get__(self, runnable: AlignerRunnable | None, cls: type[AlignerRunnable]) -> _Wrapping:
        def wrap(llm: Any, aligner: Aligner | str = "default", **options: Any) -> Any:
            """Put an aligner into a chat model: every answer that it gives is corrected.

            Args:
                llm: A chat model; or one with arguments bound, retries, fallbacks or configurable fields, each of whose
                    models is wrapped.
                aligner: As `AlignerRunnable` takes it.
                **options: As `AlignerRunnable` takes them.

            Returns:
                An `AlignedChatModel`, wherever a `BaseChatModel` is required; for a bound model the same around one.

            Raises:
                TypeError: If it is no chat model; or if options are given to the `wrap` of an instance, which has its own.
            """
            if runnable is None:
                return wrapped(llm, cls(aligner, **options))
            if aligner != "default" or options:
                raise TypeError(
                    "this AlignerRunnable has its aligner and options already: give them to AlignerRunnable(…)"
                )
            return wrapped(llm, runnable)

        return wrap


class AlignerRunnable(RunnableSerializable[Any, Any], Alignment):
    """Correct the answers of whatever stands to its left: `llm | AlignerRunnable()`.

    Takes and gives text; messages (an `AIMessage` keeps its id, tool calls, usage and other blocks; only its text is
    replaced, and `response_metadata["aligner"]` says what was done); `{"question": …, "answer": …}`; or a state whose
    `messages` end with an answer. Messages without text, such as bare tool calls, pass through untouched, and so do those
    that this aligner has aligned before.

    Args:
        aligner: An `Aligner`, or what `Aligner.load` takes: `default`, a hub id, a folder.
        question, dialogue, when, strength, on_doubt, mode, on_error, fallback, on_missing_question, timeout,
            max_answer_tokens, on_long_answer, keep_original, on_correction: See `Alignment`; all of them may be set per
            call by `configurable_fields`.
        name: Of its runs in traces.
        load_options: Passed to `Aligner.load`, such as `precision=`.

    Raises:
        TypeError: If there is no option of a name; the error has the nearest one.
        InputError: If a value is misspelt, with the nearest one that there is; out of range; or contradicts another.
        AlignerError: As `Aligner.load` does; later, on invoking, as `Aligner.correct` does.
        MissingQuestionError: On invoking, where the question is not known and `on_missing_question="raise"`.
    """

    wrap: ClassVar[_Wrap] = _Wrap()

    def __init__(
        self,
        aligner: Aligner | str = "default",
        *,
        question: str | Callable[[Any], str | None] | None = None,
        dialogue: bool = False,
        when: Callable[[str, str], bool] | None = None,
        strength: Strength = "medium",
        on_doubt: OnDoubt = "passthrough",
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
        check_names(type(self).__name__, load_options, OPTIONS)
        if isinstance(aligner, Aligner) and load_options:
            raise TypeError(f"{sorted(load_options)} can be given with a model's name only, not with an Aligner")
        options = {
            "question": question,
            "dialogue": dialogue,
            "when": when,
            "strength": strength,
            "on_doubt": on_doubt,
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
            questions.listen(dialogues=self.dialogue)

    @classmethod
    def is_lc_serializable(cls) -> bool:
        """An aligner holds a model: it is made again, not serialized."""
        return False

    @property
    def InputType(self) -> Any:
        """What it takes; it gives the same, see there."""
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

        async for piece in self.atransform(inputs(), config, **kwargs):
            yield piece

    def transform(self, input: Iterator[V], config: RunnableConfig | None = None, **kwargs: Any) -> Iterator[V]:
        """Gather an answer's chunks, correct it, and give the correction in pieces."""
        yield from self._transform_stream_with_config(input, self._align_chunks, config, **kwargs)

    async def atransform(
        self, input: AsyncIterator[V], config: RunnableConfig | None = None, **kwargs: Any
    ) -> AsyncIterator[V]:
        """Gather an answer's chunks, correct it off the event loop, and give the correction in pieces."""
        async for piece in self._atransform_stream_with_config(input, self._aalign_chunks, config, **kwargs):
            yield piece

    # --- values in, values out ------------------------------------------------------------------------

    def _align_one(self, value: Any, run_manager: CallbackManagerForChainRun) -> Any:
        return or_raise(self._align([value], [run_manager])[0])

    async def _aalign_one(self, value: Any, run_manager: AsyncCallbackManagerForChainRun) -> Any:
        return or_raise((await self._aalign([value], [run_manager]))[0])

    def _align(self, values: Sequence[Any], run_manager: Sequence[CallbackManagerForChainRun]) -> list[Any]:
        """Correct values together. A value whose correction fails becomes its exception; the others are not held up."""
        jobs = [self._job(value, run) for value, run in zip(values, run_manager, strict=True)]
        outcomes = iter(self.align_pairs([(job.question, job.answer.text) for job in jobs if isinstance(job, _Job)]))
        results = []
        for job, run in zip(jobs, run_manager, strict=True):
            outcome = next(outcomes) if isinstance(job, _Job) else job
            if isinstance(job, _Job) and isinstance(outcome, Aligned):
                tell(run, outcome)
                outcome = job.answer.put(outcome)
            results.append(outcome)
        return results

    async def _aalign(self, values: Sequence[Any], run_manager: Sequence[AsyncCallbackManagerForChainRun]) -> list[Any]:
        calls = (self._aalign_value(value, run) for value, run in zip(values, run_manager, strict=True))
        return list(await asyncio.gather(*calls))

    async def _aalign_value(self, value: Any, run: AsyncCallbackManagerForChainRun) -> Any:
        job = await self.aquestion(self._job, value, run)
        if not isinstance(job, _Job):
            return job
        outcome = await self.aalign_pair(job.question, job.answer.text)
        if not isinstance(outcome, Aligned):
            return outcome
        await atell(run, outcome)
        return job.answer.put(outcome)

    def _align_chunks(self, chunks: Iterator[Any], run_manager: CallbackManagerForChainRun) -> Iterator[Any]:
        gathering = Gathering(self.aligner, lambda chunk: self._question_early(chunk, run_manager))
        try:
            for chunk in chunks:
                if self._is_whole(chunk):
                    yield self._align_one(chunk, run_manager)
                else:
                    gathering.add(chunk)
                    if self.mode == "shadow":
                        yield passing(chunk)
            if (value := self._gathered(gathering)) is not None:
                yield from self._stream_one(value, gathering.ahead, run_manager)
        finally:
            gathering.close()

    def _stream_one(self, value: Any, ahead: ReadAhead | None, run: CallbackManagerForChainRun) -> Iterator[Any]:
        job = self._job(value, run)
        if not isinstance(job, _Job):
            yield from [or_raise(job)] if self.mode == "correct" else closing(value)
            return
        yield from aligned_chunks(self, job.answer, job.question, ahead, partial(tell, run))

    async def _aalign_chunks(
        self, chunks: AsyncIterator[Any], run_manager: AsyncCallbackManagerForChainRun
    ) -> AsyncIterator[Any]:
        gathering = Gathering(self.aligner, lambda chunk: self._question_early(chunk, run_manager))
        try:
            async for chunk in chunks:
                if self._is_whole(chunk):
                    yield await self._aalign_one(chunk, run_manager)
                else:
                    gathering.add(chunk)
                    if self.mode == "shadow":
                        yield passing(chunk)
            if (value := self._gathered(gathering)) is not None:
                async for piece in self._astream_one(value, gathering.ahead, run_manager):
                    yield piece
        finally:
            gathering.close()

    async def _astream_one(
        self, value: Any, ahead: ReadAhead | None, run: AsyncCallbackManagerForChainRun
    ) -> AsyncIterator[Any]:
        job = await self.aquestion(self._job, value, run)
        if not isinstance(job, _Job):
            for rest in [or_raise(job)] if self.mode == "correct" else closing(value):
                yield rest
            return
        tell = partial(atell, run)
        async for chunk in aaligned_chunks(self, job.answer, job.question, ahead, tell):
            yield chunk

    def _is_whole(self, chunk: Any) -> bool:
        """Say whether a stream's value is aligned by itself: an agent's update, and in shadow mode all that is whole."""
        return is_update(chunk) or (self.mode == "shadow" and is_whole(chunk))

    def _gathered(self, gathering: Gathering) -> Any:
        try:
            return gathering.value
        except Exception as exc:  # what cannot be added up is no answer
            if self.mode == "correct":
                raise
            logger.warning("an answer was not aligned: %s", exc)
            return None

    # --- one value --------------------------------------------------------------------------------------

    def _job(self, value: Any, run: ChainRun) -> Any:
        """Make the job of a value, or decide at once: the value itself where there is nothing to do, or an exception."""
        try:
            answer = locate(value, dialogue=self.dialogue, update="langgraph_node" in run.metadata)
            if not answer.text.strip() or self.has_aligned(answer.text, answer.report):
                return answer.value
            message_id = answer.message.id if answer.message else None
            if questions.RECORD.gave_structure(answer.text, message_id, run.parent_run_id):
                return answer.value
            question = self._question(value, answer, run)
        except Exception as exc:
            if self.mode == "correct":
                return exc
            logger.warning("an answer was not aligned: %s", exc)
            return value
        return _Job(answer, question)

    def _question(self, value: Any, answer: Answer, run: ChainRun) -> Asked:
        if isinstance(answer.question, str):
            return answer.question
        if isinstance(self.question, str):
            return self.question
        if self.question is not None:
            return self.ask(self.question, value)
        message_id = answer.message.id if answer.message else None
        found = questions.RECORD.find(answer.text, message_id, run.parent_run_id, dialogue=self.dialogue)
        return found if isinstance(found, str) else answer.question or found

    def _question_early(self, chunk: Any, run: ChainRun) -> str | None:
        """Find the question before the answer is whole; it only decides what is read ahead."""
        if isinstance(self.question, str):
            return self.question
        if self.question is not None:
            return None
        message_id = chunk.id if isinstance(chunk, BaseMessage) else None
        return questions.RECORD.ask_early(message_id, run.parent_run_id, dialogue=self.dialogue)


# What `AlignerRunnable`, `wrap` and the middleware take by name, the options of `Aligner.load` among it.
OPTIONS = frozenset(
    name
    for function in (AlignerRunnable.__init__, Aligner.load)
    for name, parameter in inspect.signature(function).parameters.items()
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY
)
