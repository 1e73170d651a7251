"""`/v1/chat/completions` of OpenAI's API, before any upstream that has it: answers leave corrected."""

from __future__ import annotations

import asyncio
from contextlib import aclosing, suppress
from typing import Any

import httpx
from fastapi import APIRouter, Request, Response

from aligner_middleware.serve.access import TheClient, TheService, TheUpstream
from aligner_middleware.serve.answers import align_completion, parse_response
from aligner_middleware.serve.bodies import chat_question, is_structured, read_object, wants_stream
from aligner_middleware.serve.chunks import AlignedChunks
from aligner_middleware.serve.exchange import Exchange, unless_gone
from aligner_middleware.serve.problems import Problem
from aligner_middleware.serve.sse import EventStream, Put, read_events
from aligner_middleware.serve.upstream import Upstream, handed_on, headers_of

ROUTE = "/v1/chat/completions"
_PATH = "/chat/completions"
_REST = 0.5  # seconds in which the upstream may close a stream that has ended
# The body is read as it is; this only documents it.
OBJECT: dict[str, Any] = {
    "requestBody": {"required": True, "content": {"application/json": {"schema": {"type": "object"}}}}
}

router = APIRouter(tags=["openai"])


@router.post(ROUTE, openapi_extra=OBJECT)
async def complete_chat(request: Request, service: TheService, client: TheClient, upstream: TheUpstream) -> Response:
    """Answer by the upstream, and correct the answer: OpenAI's API, with `aligner` beside each choice."""
    raw, body = await read_object(request)
    exchange = Exchange(service, client, ROUTE, chat_question(body), is_structured(body))
    if wants_stream(body):
        return await unless_gone(request, _stream(request, raw, exchange, upstream))
    return await unless_gone(request, _complete(request, raw, exchange, upstream))


async def _complete(request: Request, raw: bytes, exchange: Exchange, upstream: Upstream) -> Response:
    response = await upstream.read(request, _PATH, raw)
    return await _aligned(exchange, response, response.content)


async def _aligned(exchange: Exchange, response: httpx.Response, content: bytes) -> Response:
    if not response.is_success:
        return handed_on(response, content)
    return await align_completion(exchange, parse_response(content), response)


async def _stream(request: Request, raw: bytes, exchange: Exchange, upstream: Upstream) -> Response:
    response = await upstream.open(request, _PATH, raw)
    if not response.headers.get("content-type", "").startswith("text/event-stream"):
        return await _aligned(exchange, response, await upstream.content(response))  # an error, or it does not stream

    async def produce(put: Put) -> None:
        async with aclosing(upstream.chunks(response)) as chunks, aclosing(read_events(chunks)) as events:
            await AlignedChunks(exchange, events).run(put)
            with suppress(Problem, TimeoutError):  # a connection that is read to its end serves another request
                async with asyncio.timeout(_REST):
                    async for _ in chunks:
                        pass

    keep_alive = exchange.service.settings.keep_alive
    return EventStream(produce, response.aclose, keep_alive=keep_alive, headers=headers_of(response))
