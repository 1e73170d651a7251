"""An answer that comes in chunks: read ahead while it arrives, and given in chunks again as it is decided."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import suppress
from functools import reduce
from operator import add
from typing import Any

from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.runnables import AddableDict

from aligner_middleware.aligner import Aligner, ReadAhead
from aligner_middleware.langchain.alignment import Aligned, Alignment, Asked, Outcome, or_raise
from aligner_middleware.langchain.answers import Answer, is_update
from aligner_middleware.langchain.messages import with_metadata, with_text

_REPORT = "aligner"


class Gathering:
    """The chunks of an answer, which the aligner reads while they arrive.

    Args:
        aligner: What reads them.
        ask: Says what the question is, as far as it can be known from the first chunk.

    Attributes:
        ahead: What has read them, if there was any text.
    """

    def __init__(self, aligner: Aligner, ask: Callable[[Any], Asked | None]) -> None:
        self.ahead: ReadAhead | None = None
        self._aligner = aligner
        self._ask = ask
        self._chunks: list[Any] = []

    def add(self, chunk: Any) -> None:
        """Take in a chunk: text, a message chunk, or a part of a dict."""
        self._chunks.append(chunk)
        text = chunk if isinstance(chunk, str) else chunk.content if isinstance(chunk, AIMessageChunk) else None
        if not isinstance(text, str) or not text:
            return
        with suppress(Exception):  # it only saves time: what is wrong shows when the answer is aligned
            if self.ahead is None:
                question = self._ask(chunk)
                self.ahead = self._aligner.read_ahead(question if isinstance(question, str) else "")
            self.ahead.feed(text)

    @property
    def value(self) -> Any:
        """All of it as one value; `None` where there was no chunk."""
        if not self._chunks:
            return None
        return reduce(add, [AddableDict(chunk) if isinstance(chunk, dict) else chunk for chunk in self._chunks])

    def close(self) -> None:
        """Free what reading ahead took."""
        if self.ahead is not None:
            self.ahead.close()


def aligned_chunks(
    alignment: Alignment,
    answer: Answer,
    question: Asked,
    ahead: ReadAhead | None,
    tell: Callable[[Aligned], None],
) -> Iterator[Any]:
    """Give an aligned answer in chunks: text as it is decided, and last all that is not text.

    Content blocks, dicts and whole messages are given whole. In shadow mode only the end is given, with the report.

    Args:
        alignment: What aligns it.
        answer: The answer, in the value that it came in.
        question: What it answers.
        ahead: What has read it already.
        tell: Told what became of it.

    Raises:
        Exception: What made the alignment fail, if its policy is to raise.
    """
    given = ""
    if _can_be_cut(answer.value):
        pieces = alignment.stream_pair(question, answer.text, ahead)
        while True:
            try:
                piece = next(pieces)
            except StopIteration as end:
                outcome: Outcome = end.value
                break
            given += piece
            yield _piece_of(answer.value, piece)
    else:
        (outcome,) = alignment.align_pairs([(question, answer.text)])
    aligned = or_raise(outcome)
    tell(aligned)
    yield from closing(answer.value, aligned) if alignment.mode == "shadow" else _rest(answer, aligned, given)


async def aaligned_chunks(
    alignment: Alignment,
    answer: Answer,
    question: Asked,
    ahead: ReadAhead | None,
    tell: Callable[[Aligned], Awaitable[None]],
) -> AsyncIterator[Any]:
    """Do as `aligned_chunks` does, and leave the event loop free."""
    given = ""
    if _can_be_cut(answer.value):
        async for piece in alignment.astream_pair(question, answer.text, ahead):
            if isinstance(piece, str):
                given += piece
                yield _piece_of(answer.value, piece)
            else:
                outcome: Outcome = piece
    else:
        outcome = await alignment.aalign_pair(question, answer.text)
    aligned = or_raise(outcome)
    await tell(aligned)
    for rest in closing(answer.value, aligned) if alignment.mode == "shadow" else _rest(answer, aligned, given):
        yield rest


def is_whole(value: Any) -> bool:
    """Say whether what a stream gives is more than a piece of an answer: a message, a state, or a question with one."""
    if not isinstance(value, Mapping):
        return isinstance(value, AIMessage) and not isinstance(value, AIMessageChunk)
    return (
        is_update(value)
        or isinstance(value.get("messages"), list)
        or ("question" in value and is_whole(value.get("answer")))
    )


def passing(chunk: Any) -> Any:
    """Give a chunk as shadow mode lets it by: what only the end may say (that it is the last, a report) is for `closing`."""
    if isinstance(chunk, Mapping) and isinstance(chunk.get("answer"), AIMessageChunk):
        return AddableDict({**chunk, "answer": passing(chunk["answer"])})
    if not isinstance(chunk, AIMessageChunk) or not (chunk.chunk_position or _REPORT in chunk.response_metadata):
        return chunk
    metadata = {key: value for key, value in chunk.response_metadata.items() if key != _REPORT}
    return chunk.model_copy(update={"chunk_position": None, "response_metadata": metadata})


def closing(value: Any, aligned: Aligned | None = None) -> Iterator[Any]:
    """Give the end of an answer that shadow mode let by: a chunk without text that is the last, with the report.

    Text has no place for it.

    Args:
        value: The chunks as they came, added up.
        aligned: What became of it; `None` where there was nothing to align.
    """
    if isinstance(value, Mapping):
        yield from (AddableDict(answer=end) for end in closing(value.get("answer"), aligned))
    elif isinstance(value, AIMessageChunk):
        report = aligned.report if aligned else value.response_metadata.get(_REPORT)
        if report or value.chunk_position:
            yield AIMessageChunk(
                content="" if isinstance(value.content, str) else [],
                id=value.id,
                response_metadata={_REPORT: report} if report else {},
                chunk_position="last",
            )


def _can_be_cut(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, AIMessageChunk) and isinstance(value.content, str))


def _piece_of(value: Any, text: str) -> Any:
    return text if isinstance(value, str) else AIMessageChunk(content=text, id=value.id)


def _rest(answer: Answer, aligned: Aligned, given: str) -> Iterator[Any]:
    """Give what is left when the pieces were given: text that was not, and all that is not text."""
    value, text = answer.value, aligned.text[len(given) :]
    if isinstance(value, str):
        yield from [text] if text else []
    elif not given:
        yield answer.put(aligned)
    else:
        rest = with_text(value, text) if aligned.report["changed"] else value.model_copy(update={"content": text})
        yield with_metadata(rest, aligner=aligned.report).model_copy(update={"chunk_position": "last"})
