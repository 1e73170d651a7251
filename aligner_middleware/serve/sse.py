"""Server-sent events: read from the upstream, and sent to a client with signs of life while there is nothing to say."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import anyio
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from aligner_middleware.closing import aclosing
from aligner_middleware.remote import sse
from aligner_middleware.serve.problems import Problem
from aligner_middleware.serve.service import logger
from aligner_middleware.serve.upstream import unreadable

Put = Callable[[bytes], Awaitable[None]]

_KEEP_ALIVE = b": keep-alive\n\n"
_AHEAD = 64  # events that wait for the client at most


def event(data: str | Mapping[str, Any], name: str | None = None) -> bytes:
    """Make an event of text without line breaks, or of an object.

    Args:
        data: The text or the object.
        name: Of the event, where it has one; without line breaks.
    """
    text = data if isinstance(data, str) else json.dumps(data)
    return (f"event: {name}\n" if name else "").encode() + f"data: {text}\n\n".encode()


async def read_events(chunks: AsyncIterator[bytes]) -> AsyncGenerator[str, None]:
    """Give the data of each event in a stream of bytes.

    Raises:
        Problem: 502, if a line is too long, or is not UTF-8.
    """
    try:
        async with aclosing(sse.read_events(chunks)) as events:
            async for data in events:
                yield data
    except ValueError as exc:
        raise unreadable(str(exc)) from None


class EventStream(StreamingResponse):
    """Sends what a producer puts. It is cancelled when the client goes away; its error becomes an event.

    Args:
        produce: Gets a function to put events with, and runs until there are no more.
        close: Frees what the producer holds; awaited in any case.
        failed: Makes the event of an error.
        keep_alive: Seconds of silence after which a comment is sent.
        headers: Of the response.
    """

    def __init__(
        self,
        produce: Callable[[Put], Awaitable[None]],
        close: Callable[[], Awaitable[None]],
        failed: Callable[[Problem], bytes],
        *,
        keep_alive: float,
        headers: Mapping[str, str],
    ) -> None:
        self._produce = produce
        self._close = close
        self._failed = failed
        self._keep_alive = keep_alive
        self._queue = asyncio.Queue[bytes | None](_AHEAD)
        self._events = self._sent()
        unbuffered = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(self._events, headers={**headers, **unbuffered}, media_type="text/event-stream")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Respond, as of ASGI."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            with anyio.CancelScope(shield=True):
                await self._events.aclose()
                await self._close()

    async def _sent(self) -> AsyncGenerator[bytes, None]:
        task = asyncio.ensure_future(self._run())
        try:
            while True:
                try:
                    async with asyncio.timeout(self._keep_alive):
                        sent = await self._queue.get()
                except TimeoutError:
                    sent = _KEEP_ALIVE
                if sent is None:
                    return
                yield sent
        finally:
            task.cancel()
            with anyio.CancelScope(shield=True):
                await asyncio.wait({task})

    async def _run(self) -> None:
        try:
            await self._produce(self._queue.put)
        except Exception as exc:
            problem = Problem.of(exc)
            if problem is not exc:
                logger.error("a stream failed", exc_info=exc)
            await self._queue.put(self._failed(problem))
        await self._queue.put(None)
