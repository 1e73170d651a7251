"""An answer that arrives in chunks: read ahead while it arrives, and given in chunks again as it is decided.

Between LangChain's chunks (text, `AIMessageChunk`, parts of a dict) and the texts of an `AlignedStream`.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import aclosing, closing, suppress
from functools import reduce
from operator import add
from typing import TYPE_CHECKING, Any

from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.runnables import AddableDict

from aligner_middleware.langchain.alignment import Alignment
from aligner_middleware.langchain.answers import Answer, is_update
from aligner_middleware.langchain.messages import text_of, with_metadata, with_text
from aligner_middleware.langchain.metadata import KEY, aligner_metadata
from aligner_middleware.langchain.outcome import Aligned, unwrap
from aligner_middleware.langchain.piecewise import QuestionOrError
from aligner_middleware.steps import arun, run

if TYPE_CHECKING:
    from aligner_middleware.read_ahead import ReadAhead

logger = logging.getLogger("aligner_middleware")


class ChunkBuffer:
    """The chunks of an answer, which the aligner reads while they arrive.

    Args:
        alignment: The aligner that reads them, and its options.
        ask: Gives the question, as far as it can be known from the first chunk.

    Attributes:
        ahead: What has read them, if there was any text.
    """

    def __init__(self, alignment: Alignment, ask: Callable[[Any], QuestionOrError | None]) -> None:
        self.ahead: ReadAhead | None = None
        self._alignment = alignment
        self._ask = ask
        self._chunks: list[Any] = []

    def add(self, chunk: Any) -> None:
        """Add a chunk: text, a message chunk, or a part of a dict."""
        self._chunks.append(chunk)
        text = chunk if isinstance(chunk, str) else chunk.content if isinstance(chunk, AIMessageChunk) else None
        if not isinstance(text, str) or not text:
            return
        with suppress(Exception):  # it only saves time: an error shows when the answer is aligned
            if self.ahead is None:
                self.ahead = self._alignment.read_ahead(self._ask(chunk))
            self.ahead.feed(text)

    def release(self) -> list[Any]:
        """Decide on the sentences that have ended, by `by_sentence`, and give their text as a chunk, if it may be shown."""
        if self.ahead is None or not self.ahead.waiting:
            return []
        return self._as_chunks(run(self.ahead.decide()))

    async def arelease(self) -> list[Any]:
        """Give the same as `release`, and leave the event loop free."""
        if self.ahead is None or not self.ahead.waiting:
            return []
        return self._as_chunks(await arun(self.ahead.decide()))

    def _as_chunks(self, text: str) -> list[Any]:
        return [_text_chunk(self._chunks[-1], text)] if text else []

    @property
    def value(self) -> Any:
        """The chunks added up to one value; `None` where there was no chunk."""
        if not self._chunks:
            return None
        return reduce(add, [AddableDict(chunk) if isinstance(chunk, dict) else chunk for chunk in self._chunks])

    def close(self) -> None:
        """Free what reading ahead took."""
        if self.ahead is not None:
            self.ahead.close()


def whole_answer(alignment: Alignment, buffer: ChunkBuffer) -> Any:
    """Give the chunks added up to one value; `None` where there is nothing to align.

    Raises:
        Exception: If they cannot be added up; in shadow mode they are no answer then.
    """
    try:
        return buffer.value
    except Exception as exc:
        if alignment.mode == "correct":
            raise
        logger.warning("an answer was not aligned: %s", exc)
        return None


def aligned_chunks(
    alignment: Alignment,
    answer: Answer,
    question: QuestionOrError,
    ahead: ReadAhead | None,
    dispatch: Callable[[dict[str, Any]], None],
) -> Iterator[Any]:
    """Give an aligned answer in chunks: text as it is decided, and last all that is not text.

    Content blocks, dicts and whole messages are given whole. In shadow mode only the end is given, with the metadata.

    Args:
        alignment: The aligner and its options.
        answer: The answer, in the value that it came in.
        question: Its question.
        ahead: What has read the answer already.
        dispatch: Called with the answer's metadata once it is decided.

    Raises:
        Exception: The reason why the alignment failed, if the options say to raise it.
    """
    shown = _released(ahead)
    with closing(alignment.stream_pair(question, answer.text, ahead)) as stream:
        for text in stream:
            if _can_be_cut(answer.value):
                shown += text
                yield _text_chunk(answer.value, text)
    aligned = unwrap(stream.outcome)
    dispatch(aligned.metadata)
    yield from _end(alignment, answer, aligned, shown)


async def aaligned_chunks(
    alignment: Alignment,
    answer: Answer,
    question: QuestionOrError,
    ahead: ReadAhead | None,
    dispatch: Callable[[dict[str, Any]], Awaitable[None]],
) -> AsyncIterator[Any]:
    """Give the same as `aligned_chunks`, and leave the event loop free."""
    shown = _released(ahead)
    async with aclosing(alignment.stream_pair(question, answer.text, ahead)) as stream:
        async for text in stream:
            if _can_be_cut(answer.value):
                shown += text
                yield _text_chunk(answer.value, text)
    aligned = unwrap(stream.outcome)
    await dispatch(aligned.metadata)
    for chunk in _end(alignment, answer, aligned, shown):
        yield chunk


def untouched_end(alignment: Alignment, value: Any, ahead: ReadAhead | None) -> Iterator[Any]:
    """Give an answer that is not aligned: what was not shown of it, or in shadow mode its end."""
    if alignment.mode == "shadow":
        yield from end_chunk(value)
    elif value is not None:
        yield _after(value, _released(ahead))


def stands_alone(value: Any, *, shadow: bool) -> bool:
    """Say whether a value of a stream is aligned by itself: a graph's update, and in shadow mode all that is no chunk."""
    return is_update(value) or (shadow and _is_whole(value))


def without_end(chunk: Any) -> Any:
    """Give a chunk as shadow mode shows it: without its mark as the last, and without metadata, which `end_chunk` gives."""
    if isinstance(chunk, Mapping) and isinstance(chunk.get("answer"), AIMessageChunk):
        return AddableDict({**chunk, "answer": without_end(chunk["answer"])})
    if not isinstance(chunk, AIMessageChunk) or not (chunk.chunk_position or KEY in chunk.response_metadata):
        return chunk
    metadata = {key: value for key, value in chunk.response_metadata.items() if key != KEY}
    return chunk.model_copy(update={"chunk_position": None, "response_metadata": metadata})


def end_chunk(value: Any, aligned: Aligned | None = None) -> Iterator[Any]:
    """Give the end of an answer that shadow mode has shown: a chunk without text, marked as the last, with the metadata.

    An answer that is bare text has no place for metadata.

    Args:
        value: The chunks as they came, added up.
        aligned: The aligned answer; `None` where there was nothing to align.
    """
    if isinstance(value, Mapping):
        yield from (AddableDict(answer=end) for end in end_chunk(value.get("answer"), aligned))
    elif isinstance(value, AIMessageChunk):
        metadata = aligned.metadata if aligned else aligner_metadata(value)
        if metadata or value.chunk_position:
            yield AIMessageChunk(
                content="" if isinstance(value.content, str) else [],
                id=value.id,
                response_metadata={KEY: metadata} if metadata else {},
                chunk_position="last",
            )


def _is_whole(value: Any) -> bool:
    """Say whether a value is more than a chunk of an answer: a message, a state, or a question with a message."""
    if not isinstance(value, Mapping):
        return isinstance(value, AIMessage) and not isinstance(value, AIMessageChunk)
    if is_update(value) or isinstance(value.get("messages"), list):
        return True
    return "question" in value and _is_whole(value.get("answer"))


def _can_be_cut(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, AIMessageChunk) and isinstance(value.content, str))


def _text_chunk(value: Any, text: str) -> Any:
    return text if isinstance(value, str) else AIMessageChunk(content=text, id=value.id)


def _released(ahead: ReadAhead | None) -> str:
    return ahead.released if ahead is not None else ""


def _after(value: Any, shown: str) -> Any:
    """Give a value without the beginning of its text, which was shown."""
    if not shown:
        return value
    return value[len(shown) :] if isinstance(value, str) else with_text(value, text_of(value)[len(shown) :])


def _end(alignment: Alignment, answer: Answer, aligned: Aligned, shown: str) -> Iterator[Any]:
    """Give what is left once the decided text was shown: the rest of the text, and all that is not text."""
    value, text = answer.value, aligned.text[len(shown) :]
    if alignment.mode == "shadow":
        yield from end_chunk(value, aligned)
    elif isinstance(value, str):
        yield from [text] if text else []
    elif not shown or not _can_be_cut(value):
        yield _after(answer.replace(aligned), shown)
    else:
        rest = with_text(value, text) if aligned.metadata["changed"] else value.model_copy(update={"content": text})
        yield with_metadata(rest, aligner=aligned.metadata).model_copy(update={"chunk_position": "last"})
