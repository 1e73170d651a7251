"""One request of a client, and the decisions on the answers to it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request

from aligner_middleware.errors import MissingQuestionError
from aligner_middleware.langchain.outcome import Aligned, unaligned
from aligner_middleware.read_ahead import ReadAhead
from aligner_middleware.serve.problems import Problem
from aligner_middleware.serve.service import Client, Service

Show = Callable[[str], Awaitable[None]]

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

    async def stream(self, answer: str, ahead: ReadAhead | None, show: Show) -> Aligned:
        """Align the answer of a stream, and show its text as soon as nothing can take it back.

        Args:
            answer: The whole answer.
            ahead: What has read it while it arrived. Text that it has released is not shown again.
            show: Awaited with each piece of text; what is left of the text is the caller's to show.

        Raises:
            Problem: As of `align`.
        """
        if passed := self._passed(answer):
            return passed
        start = time.perf_counter()
        stream = self.client.alignment.stream_pair(self.question, answer, ahead)
        async with aclosing(stream):
            async for piece in stream:
                await show(piece)
        return self.service.decided(self.client, self.route, self.question, answer, stream.outcome, start)

    def _passed(self, answer: str) -> Aligned | None:
        alignment = self.client.alignment
        if not answer.strip():
            return unaligned(alignment, answer, "no text")
        if not self.structured:
            return None
        outcome = unaligned(alignment, answer, "structured answer")
        return self.service.decided(self.client, self.route, self.question, answer, outcome, time.perf_counter())


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
