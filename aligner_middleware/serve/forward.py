"""A request to OpenAI's API on its way: to the upstream, and back with its answers aligned, whole or as a stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import httpx2
from fastapi import Request, Response

from aligner_middleware.serve.answers import parse_response
from aligner_middleware.serve.exchange import Exchange, unless_gone
from aligner_middleware.serve.problems import Problem
from aligner_middleware.serve.sse import EventStream, Put, read_events
from aligner_middleware.serve.upstream import Upstream, handed_on, headers_of

_REST = 0.5  # seconds in which the upstream may close a stream that has ended


class Aligning(Protocol):
    """Aligns the events of one stream."""

    async def run(self, put: Put) -> None:
        """Put the aligned events."""

    def failed(self, problem: Problem) -> bytes:
        """Make the event of an error, which is the last one."""


@dataclass(frozen=True)
class Endpoint:
    """One of the upstream's endpoints.

    Attributes:
        path: After the upstream's base URL.
        align: Aligns a whole response, which was parsed, and makes the client's.
        aligning: Makes what aligns the data of a stream's events.
    """

    path: str
    align: Callable[[Exchange, dict[str, Any], httpx2.Response], Awaitable[Response]]
    aligning: Callable[[Exchange, AsyncIterator[str]], Aligning]


async def forward(
    request: Request, raw: bytes, exchange: Exchange, upstream: Upstream, endpoint: Endpoint, *, stream: bool
) -> Response:
    """Answer a request by the upstream, with its answers aligned; given up when the client goes away.

    Args:
        request: The client's.
        raw: Its body.
        exchange: What decisions depend on.
        upstream: The upstream.
        endpoint: The upstream's endpoint.
        stream: Whether a stream is asked for.

    Raises:
        Problem: If the upstream fails, its response is unreadable, or a correction fails and the policy says `raise`.
    """
    answer = _stream if stream else _whole
    return await unless_gone(request, answer(request, raw, exchange, upstream, endpoint))


async def _whole(request: Request, raw: bytes, exchange: Exchange, upstream: Upstream, endpoint: Endpoint) -> Response:
    response = await upstream.read(request, endpoint.path, raw)
    return await _aligned(exchange, endpoint, response, response.content)


async def _aligned(exchange: Exchange, endpoint: Endpoint, response: httpx2.Response, content: bytes) -> Response:
    if not response.is_success:
        return handed_on(response, content)
    return await endpoint.align(exchange, parse_response(content), response)


async def _stream(request: Request, raw: bytes, exchange: Exchange, upstream: Upstream, endpoint: Endpoint) -> Response:
    response = await upstream.open(request, endpoint.path, raw)
    if not response.headers.get("content-type", "").startswith("text/event-stream"):
        # an error, or it does not stream
        return await _aligned(exchange, endpoint, response, await upstream.content(response))
    chunks = upstream.chunks(response)
    events = read_events(chunks)
    aligning = endpoint.aligning(exchange, events)

    async def produce(put: Put) -> None:
        async with aclosing(chunks), aclosing(events):
            await aligning.run(put)
            with suppress(Problem, TimeoutError):  # a connection that is read to its end serves another request
                async with asyncio.timeout(_REST):
                    async for _ in chunks:
                        pass

    keep_alive = exchange.service.settings.keep_alive
    return EventStream(produce, response.aclose, aligning.failed, keep_alive=keep_alive, headers=headers_of(response))
