"""One request of a client, and the decisions on the answers to it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request

from aligner_middleware.errors import MissingQuestionError
from aligner_middleware.langchain.outcome import Aligned, unaligned
from aligner_middleware.read_ahead import ReadAhead
from aligner_middleware.serve.problems import Problem
from aligner_middleware.serve.service import Client, Service
from aligner_middleware.steps import arun

T = TypeVar("T")


@dataclass(frozen=True)
class Exchange:
    """A client's request, as far as decisions depend on it.

    Attributes:
        service: The service.
        client: Whose request it is.
        route: Its route.
        question: The question, or why it is not known.
        structured: Whether a structured answer is asked for, which stays as it is.
    """

    service: Service
    client: Client
    route: str
    question: str | MissingQuestionError
    structured: bool

    @property
    def holds(self) -> bool:
        """Whether the text of a stream has to be held back until it is decided."""
        decides = not self.structured and isinstance(self.question, str)
        return decides and self.client.policy.mode == "correct"

    def read_ahead(self) -> ReadAhead | None:
        """Get ready to read an answer while it arrives; `None` where nothing will be decided."""
        if self.structured or not isinstance(self.question, str):
            return None
        return self.client.alignment.read_ahead(self.question)

    async def align(self, answer: str) -> Aligned:
        """Align a whole answer.

        Raises:
            Problem: If the correction fails, and the policy says `raise`.
        """
        if passed := self._passed(answer):
            return passed
        return await self.service.align(self.client, self.route, self.question, answer)

    def stream(self, answer: str, ahead: ReadAhead | None) -> AsyncGenerator[str | Aligned, None]:
        """Align the whole answer of a stream, in pieces, as `Service.stream` does.

        Args:
            answer: The whole answer.
            ahead: What has read it while it arrived. Text that it has released is not given again.
        """
        if passed := self._passed(answer):
            return _at_once(passed)
        return self.service.stream(self.client, self.route, self.question, answer, ahead)

    def _passed(self, answer: str) -> Aligned | None:
        alignment = self.client.alignment
        if not answer.strip():
            return unaligned(alignment, answer, "no text")
        if not self.structured:
            return None
        outcome = unaligned(alignment, answer, "structured answer")
        return self.service.decided(self.client, self.route, self.question, answer, outcome, time.perf_counter())


class Arriving:
    """The text of an answer, as far as it has arrived; it is read ahead where something will be decided.

    Args:
        exchange: The request.
    """

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._parts: list[str] = []
        self._ahead: ReadAhead | None = None

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self._parts)

    def add(self, text: str) -> None:
        """Add a piece."""
        if not text:
            return
        if not self._parts:
            self._ahead = self._exchange.read_ahead()
        self._parts.append(text)
        if self._ahead is not None:
            self._ahead.feed(text)

    async def release(self) -> str:
        """By the policy's `by_sentence`, decide on the sentences that have ended, and give those that may be shown now."""
        return await arun(self._ahead.decide()) if self._ahead is not None and self._ahead.waiting else ""

    def aligned(self, answer: str) -> AsyncGenerator[str | Aligned, None]:
        """Align the whole answer, as `Exchange.stream` does; what was read ahead helps where it is the same text."""
        return self._exchange.stream(answer, self._ahead if answer == self.text else None)

    def close(self) -> None:
        """Read it no further."""
        if self._ahead is not None:
            self._ahead.close()


async def _at_once(aligned: Aligned) -> AsyncGenerator[str | Aligned, None]:
    if aligned.text:
        yield aligned.text
    yield aligned


async def unless_gone(request: Request, call: Coroutine[Any, Any, T]) -> T:
    """Await a call, and cancel it when the client goes away.

    Raises:
        Problem: 499, if the client is gone; nobody reads it.
    """
    task, gone = asyncio.ensure_future(call), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise Problem(499, "the client has gone away", code="client_gone")
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
