"""A reader that stops early closes all that it read from at once, not when the garbage collector comes to it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from langchain_core.callbacks import AsyncCallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, HumanMessage
from langchain_core.outputs import ChatGenerationChunk
from langchain_core.runnables import ConfigurableField, RunnableConfig

from aligner_middleware import AlignerRunnable
from aligner_middleware.closing import aclosing
from aligner_middleware.langchain.nested import map_chat_models
from aligner_middleware.streaming import CorrectionStream
from tests.chat_models import Scripted
from tests.fakes import InstantAligner

QUESTION: list[BaseMessage] = [HumanMessage("why?")]


class Upstream(Scripted):
    """A chat model that notes when its stream is closed, after a moment in which a task may be switched."""

    note: Callable[[str], None]

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        try:
            for chunk in self._stream(messages):
                yield chunk
        finally:
            await asyncio.sleep(0)
            self.note("upstream")

    async def astream(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any
    ) -> AsyncIterator[AIMessageChunk]:
        async with aclosing(self._astream(QUESTION)) as chunks:  # LangChain's own leaves it to the garbage collector
            async for chunk in chunks:
                assert isinstance(chunk.message, AIMessageChunk)
                yield chunk.message


class Noted(InstantAligner):
    """An aligner that notes when a correction is given up."""

    def __init__(self, closed: list[str]) -> None:
        super().__init__(lambda question, answer: answer.replace("bad", "good"))
        self._closed = closed

    def stream(self, question: str, answer: Any, **options: Any) -> CorrectionStream:
        stream = super().stream(question, answer, **options)
        stream._flow.free = lambda: self._closed.append("correction")  # type: ignore[method-assign]
        return stream


def upstream(closed: list[str]) -> BaseChatModel:
    return Upstream(reply=lambda messages: AIMessage("so bad"), note=closed.append)


def aligned(closed: list[str], **options: Any) -> AlignerRunnable:
    return AlignerRunnable(Noted(closed), question="why?", **options)


def chosen(closed: list[str]) -> Any:
    model = upstream(closed).configurable_alternatives(ConfigurableField(id="model"), other=upstream([]))
    return map_chat_models(model, lambda inner: inner)


READERS: dict[str, tuple[Callable[[list[str]], Any], str]] = {
    "runnable, reading": (lambda to: aligned(to, mode="shadow").atransform(upstream(to).astream("q")), "upstream"),
    "runnable, correcting": (lambda to: aligned(to).atransform(upstream([]).astream("q")), "correction"),
    "runnable of a whole answer": (lambda to: aligned(to).astream("so bad"), "correction"),
    "chat model, reading": (lambda to: aligned(to, mode="shadow").wrap(upstream(to))._astream(QUESTION), "upstream"),
    "chat model, correcting": (lambda to: aligned(to).wrap(upstream([]))._astream(QUESTION), "correction"),
    "chosen chat model": (lambda to: chosen(to).astream("q"), "upstream"),
}


@pytest.mark.parametrize(("read", "left"), READERS.values(), ids=READERS)
async def test_a_reader_that_stops_early_closes_what_it_read_from(read: Callable[[list[str]], Any], left: str) -> None:
    closed: list[str] = []
    pieces = read(closed)
    await anext(pieces)
    assert not closed
    await pieces.aclose()
    assert closed == [left]


async def test_an_iterator_that_cannot_be_closed_is_read_as_it_is() -> None:
    class Words:
        def __init__(self) -> None:
            self._words: Iterator[str] = iter(["so ", "bad"])

        def __aiter__(self) -> Words:
            return self

        async def __anext__(self) -> str:
            for word in self._words:
                return word
            raise StopAsyncIteration

    pieces = [piece async for piece in aligned([]).atransform(Words())]
    assert "".join(pieces) == "so good"
