"""`llm | AlignerRunnable()`: corrects every answer that comes by, and passes all else of the message on.

A value's way: what came in becomes a `_Job` (its question, its answer, and how to put a correction back), jobs are
corrected together, and each correction goes back into the value that it came from.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from operator import add
from typing import Any, Literal
from uuid import UUID

from langchain_core.callbacks import AsyncCallbackManagerForChainRun, CallbackManagerForChainRun
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.runnables import AddableDict, RunnableConfig, RunnableSerializable
from langchain_core.runnables.config import run_in_executor
from pydantic import ConfigDict

from aligner_middleware import question as questions
from aligner_middleware.aligner import Aligner, Correction, ReadAhead
from aligner_middleware.errors import AlignerError, InputError, MissingQuestionError
from aligner_middleware.messages import text_of, with_metadata, with_text

logger = logging.getLogger(__name__)

_HOW_TO_GIVE_IT = (
    "cannot tell which question this answer belongs to: it does not come from a model run of this chain, or from one of "
    "several. Give it as AlignerRunnable(question='…'), as a callable question=lambda answer: …, or pass "
    "{'question': …, 'answer': …}; on_missing_question='passthrough' lets such answers through uncorrected"
)


@dataclass(frozen=True)
class _Job:
    """One answer to correct: `value` came in, `question` and `answer` are in it, `rebuild` puts a text back."""

    value: Any
    question: str
    answer: str


class AlignerRunnable(RunnableSerializable[Any, Any]):
    """Correct the answers of whatever stands to its left: `llm | AlignerRunnable()`.

    Takes and gives text, messages (an `AIMessage` keeps its id, tool calls, usage and other blocks; only its text is
    replaced, and `response_metadata["aligner"]` says what was done), or `{"question": …, "answer": …}`.
    Messages without text, such as bare tool calls, pass through untouched.

    Args:
        aligner: An `Aligner`, or what `Aligner.load` takes: `default`, a hub id, a folder.
        question: The question, or a function from the value that comes in to its question. Without it the question is
            the one that the very model run was asked which wrote this answer (see `question.py`).
        when: Whether to correct at all, from question and answer.
        on_error: What a failed correction becomes: `raise`, `passthrough` (the original answer, marked as not aligned),
            or any other text, which then replaces the answer.
        on_missing_question: `raise`, or `passthrough`.
        keep_original: Whether `response_metadata["aligner"]` holds the original text.
        load_options: Passed to `Aligner.load`, such as `precision=`.

    Raises:
        AlignerError: As `Aligner.load` does; later, on invoking, as `Aligner.correct` does.
        MissingQuestionError: On invoking, where the question is not known and `on_missing_question="raise"`.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    aligner: Aligner
    question: str | Callable[[Any], str] | None = None
    when: Callable[[str, str], bool] | None = None
    on_error: str = "raise"
    on_missing_question: Literal["raise", "passthrough"] = "raise"
    keep_original: bool = False

    def __init__(
        self,
        aligner: Aligner | str = "default",
        *,
        question: str | Callable[[Any], str] | None = None,
        when: Callable[[str, str], bool] | None = None,
        on_error: str = "raise",
        on_missing_question: Literal["raise", "passthrough"] = "raise",
        keep_original: bool = False,
        **load_options: Any,
    ) -> None:
        if isinstance(aligner, Aligner) and load_options:
            raise TypeError(f"{sorted(load_options)} can be given with a model's name only, not with an Aligner")
        super().__init__(
            aligner=aligner if isinstance(aligner, Aligner) else Aligner.load(aligner, **load_options),
            question=question,
            when=when,
            on_error=on_error,
            on_missing_question=on_missing_question,
            keep_original=keep_original,
        )
        if question is None:
            questions.listen()

    @classmethod
    def is_lc_serializable(cls) -> bool:
        """An aligner holds a model: it is made again, not serialized."""
        return False

    # --- the runnable interface ---------------------------------------------------------------------

    def invoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """Correct one answer."""
        return self._call_with_config(self._align_one, input, config, **kwargs)

    async def ainvoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """Correct one answer, off the event loop."""
        return await self._acall_with_config(self._aalign_one, input, config, **kwargs)

    def batch(
        self,
        inputs: list[Any],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[Any]:
        """Correct several answers in one batch of the engine."""
        return self._batch_with_config(self._align, inputs, config, return_exceptions=return_exceptions, **kwargs)

    async def abatch(
        self,
        inputs: list[Any],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[Any]:
        """Correct several answers in one batch of the engine, off the event loop."""
        return await self._abatch_with_config(
            self._aalign, inputs, config, return_exceptions=return_exceptions, **kwargs
        )

    def stream(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Iterator[Any]:
        """Correct one answer and give it in pieces as they are decided."""
        yield from self.transform(iter([input]), config, **kwargs)

    async def astream(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> AsyncIterator[Any]:
        """Correct one answer, off the event loop, and give it in pieces as they are decided."""

        async def inputs() -> AsyncIterator[Any]:
            yield input

        async for piece in self.atransform(inputs(), config, **kwargs):
            yield piece

    def transform(self, input: Iterator[Any], config: RunnableConfig | None = None, **kwargs: Any) -> Iterator[Any]:
        """Gather an answer's chunks, correct it, and give the correction in pieces."""
        yield from self._transform_stream_with_config(input, self._align_chunks, config, **kwargs)

    async def atransform(
        self, input: AsyncIterator[Any], config: RunnableConfig | None = None, **kwargs: Any
    ) -> AsyncIterator[Any]:
        """Gather an answer's chunks, correct it off the event loop, and give the correction in pieces."""
        async for piece in self._atransform_stream_with_config(input, self._aalign_chunks, config, **kwargs):
            yield piece

    # --- values in, values out ------------------------------------------------------------------------

    def _align_one(self, value: Any, run_manager: CallbackManagerForChainRun) -> Any:
        return _or_raise(self._align_all([value], [run_manager.parent_run_id])[0])

    async def _aalign_one(self, value: Any, run_manager: AsyncCallbackManagerForChainRun) -> Any:
        return _or_raise((await self._aalign_all([value], [run_manager.parent_run_id]))[0])

    def _align(self, values: list[Any], run_manager: list[CallbackManagerForChainRun]) -> list[Any]:
        return self._align_all(values, [run.parent_run_id for run in run_manager])

    async def _aalign(self, values: list[Any], run_manager: list[AsyncCallbackManagerForChainRun]) -> list[Any]:
        return await self._aalign_all(values, [run.parent_run_id for run in run_manager])

    def _align_all(self, values: Sequence[Any], parent_run_ids: Sequence[UUID | None]) -> list[Any]:
        """Correct values together. A value whose correction fails becomes its exception; the others are not held up."""
        jobs = [self._job_or_result(value, parent) for value, parent in zip(values, parent_run_ids, strict=True)]
        pairs = [(job.question, job.answer) for job in jobs if isinstance(job, _Job)]
        corrections = iter(self.aligner.correct_batch(pairs, return_exceptions=True))
        return [self._finish(job, next(corrections)) if isinstance(job, _Job) else job for job in jobs]

    async def _aalign_all(self, values: Sequence[Any], parent_run_ids: Sequence[UUID | None]) -> list[Any]:
        """Do the same, and leave the event loop free. What a user's function decides is asked in a thread."""
        jobs = [
            await run_in_executor(None, self._job_or_result, value, parent)
            for value, parent in zip(values, parent_run_ids, strict=True)
        ]
        return list(
            await asyncio.gather(*(self._afinish(job) if isinstance(job, _Job) else _itself(job) for job in jobs))
        )

    async def _afinish(self, job: _Job) -> Any:
        try:
            correction = await self.aligner.acorrect(job.question, job.answer)
        except Exception as exc:  # `on_error` says what becomes of it
            return self._finish(job, exc)
        return self._finish(job, correction)

    def _align_chunks(self, chunks: Iterator[Any], run_manager: CallbackManagerForChainRun) -> Iterator[Any]:
        ahead = _Gathering(self, run_manager.parent_run_id)
        try:
            for chunk in chunks:
                ahead.add(chunk)
            yield from self._stream_one(ahead)
        finally:
            ahead.close()

    async def _aalign_chunks(
        self, chunks: AsyncIterator[Any], run_manager: AsyncCallbackManagerForChainRun
    ) -> AsyncIterator[Any]:
        ahead = _Gathering(self, run_manager.parent_run_id)
        try:
            async for chunk in chunks:
                ahead.add(chunk)
            pieces = self._stream_one(ahead)
            end = object()
            while (piece := await run_in_executor(None, next, pieces, end)) is not end:
                yield piece
        finally:
            ahead.close()

    def _stream_one(self, gathered: _Gathering) -> Iterator[Any]:
        value, parent_run_id = gathered.value, gathered.parent_run_id
        streams = isinstance(value, str) or (isinstance(value, AIMessageChunk) and isinstance(value.content, str))
        job = self._job_or_result(value, parent_run_id) if streams else None
        if not isinstance(job, _Job) or self.on_error != "raise":  # a policy may replace the text: decide it whole
            yield _or_raise(self._align_all([value], [parent_run_id])[0])
            return
        pieces = self.aligner.stream(job.question, job.answer, ahead=gathered.ahead)
        while True:
            try:
                piece = next(pieces)
            except StopIteration as end:
                correction: Correction = end.value
                break
            yield piece if isinstance(value, str) else AIMessageChunk(content=piece, id=value.id)
        if not isinstance(value, str):  # the last chunk carries all that is not text
            yield with_metadata(with_text(value, ""), aligner=self._report(correction))

    def _question_early(self, chunk: Any, parent_run_id: UUID | None) -> str | None:
        """Find the question before the answer is whole; it only decides what is read ahead."""
        if isinstance(self.question, str):
            return self.question
        if self.question is not None:
            return None
        message_id = chunk.id if isinstance(chunk, BaseMessage) else None
        return questions.RECORD.ask_early(message_id, parent_run_id)

    # --- one value --------------------------------------------------------------------------------------

    def _job_or_result(self, value: Any, parent_run_id: UUID | None) -> Any:
        """Make the job of a value, or decide at once: the value itself where there is nothing to do, or an exception."""
        try:
            answer = _answer_of(value)
            if not answer.strip():
                return value
            question = self._question(value, answer, parent_run_id)
            if question is None:
                if self.on_missing_question == "raise":
                    raise MissingQuestionError(_HOW_TO_GIVE_IT)
                return _marked(value, {"aligned": False, "reason": "question not known"})
            if self.when is not None and not self.when(question, answer):
                return _marked(value, {"aligned": False, "reason": "when"})
        except AlignerError as exc:
            return exc
        return _Job(value, question, answer)

    def _question(self, value: Any, answer: str, parent_run_id: UUID | None) -> str | None:
        if isinstance(value, dict):
            return str(value["question"])
        if isinstance(self.question, str):
            return self.question
        if self.question is not None:
            return self.question(value)
        message_id = value.id if isinstance(value, BaseMessage) else None
        return questions.RECORD.find(answer, message_id, parent_run_id)

    def _finish(self, job: _Job, outcome: Correction | Exception) -> Any:
        if isinstance(outcome, Correction):
            return _marked(_replaced(job.value, outcome.corrected), self._report(outcome))
        if self.on_error == "raise":
            return outcome
        logger.warning("an answer was not aligned: %s", outcome)
        value = job.value if self.on_error == "passthrough" else _replaced(job.value, self.on_error)
        return _marked(value, {"aligned": False, "reason": str(outcome)})

    def _report(self, correction: Correction) -> dict[str, Any]:
        report = {"aligned": True, "changed": correction.changed, "model": self.aligner.name}
        report |= {"finish_reason": correction.finish_reason, "usage": asdict(correction.usage)}
        return report | ({"original": correction.original} if self.keep_original else {})


class _Gathering:
    """The chunks of an answer, which the aligner reads while they arrive."""

    def __init__(self, runnable: AlignerRunnable, parent_run_id: UUID | None) -> None:
        self.parent_run_id = parent_run_id
        self.ahead: ReadAhead | None = None
        self._runnable = runnable
        self._chunks: list[Any] = []

    def add(self, chunk: Any) -> None:
        self._chunks.append(chunk)
        text = chunk if isinstance(chunk, str) else chunk.content if isinstance(chunk, AIMessageChunk) else None
        if not isinstance(text, str) or not text:
            return
        if self.ahead is None:
            question = self._runnable._question_early(chunk, self.parent_run_id)
            self.ahead = self._runnable.aligner.read_ahead(question or "")
        self.ahead.feed(text)

    @property
    def value(self) -> Any:
        """All of it as one value."""
        return _gather(self._chunks)

    def close(self) -> None:
        if self.ahead is not None:
            self.ahead.close()


async def _itself(value: Any) -> Any:
    return value


def _answer_of(value: Any) -> str:
    """Find the answer's text in a value.

    Raises:
        InputError: If it is nothing that holds an answer.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, AIMessage):
        return text_of(value)
    if isinstance(value, dict) and "question" in value and "answer" in value:
        return _answer_of(value["answer"])
    raise InputError(
        f"AlignerRunnable takes an answer: text, an AIMessage, or a dict with 'question' and 'answer', not "
        f"{type(value).__name__}; it stands to the right of the model, as in llm | AlignerRunnable()"
    )


def _replaced(value: Any, text: str) -> Any:
    if isinstance(value, dict):
        return {**value, "answer": _replaced(value["answer"], text)}
    return with_text(value, text) if isinstance(value, AIMessage) else text


def _marked(value: Any, report: dict[str, Any]) -> Any:
    if isinstance(value, dict):
        return {**value, "answer": _marked(value["answer"], report)}
    return with_metadata(value, aligner=report) if isinstance(value, AIMessage) else value


def _gather(chunks: list[Any]) -> Any:
    if not chunks:
        return ""
    return reduce(add, [AddableDict(chunk) if isinstance(chunk, dict) else chunk for chunk in chunks])


def _or_raise(result: Any) -> Any:
    if isinstance(result, Exception):
        raise result
    return result
