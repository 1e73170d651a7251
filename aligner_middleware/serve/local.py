"""A small chat model in place of an upstream, so that the service can be tried without one.

It speaks as much of OpenAI's API as the service needs: `/chat/completions`, streamed or not, and `/models`.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import threading
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from typing import Any

import httpx2

from aligner_middleware.errors import MissingExtraError
from aligner_middleware.remote.sse import DONE
from aligner_middleware.serve.local_model import Asked, Generate, SmallModel, Usage
from aligner_middleware.serve.problems import Problem
from aligner_middleware.serve.sse import event

NAME = "SmolLM2-135M-Instruct"
_MOST_TOKENS, _TOKENS = 1024, 256  # of an answer: at most, and by default


def check_local() -> None:
    """Check that the model can run here.

    Raises:
        MissingExtraError: If `[build]` is not installed.
    """
    if not all(map(importlib.util.find_spec, ("torch", "transformers"))):
        raise MissingExtraError("aligner serve without --upstream, by a small local model,", "build")


class LocalTransport(httpx2.AsyncBaseTransport):
    """Answers the requests of a client of httpx2 by a small model, one after the other.

    Args:
        generate: Writes the answers; by default SmolLM2, which is loaded with the first of them.

    Raises:
        MissingExtraError: If SmolLM2 is wanted and `[build]` is not installed.
    """

    def __init__(self, generate: Generate | None = None) -> None:
        if generate is None:
            check_local()
        self._generate = generate or SmallModel()
        self._turn = asyncio.Lock()

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Answer a request, as of httpx2; an error has OpenAI's shape."""
        try:
            return await self._answer(request)
        except Problem as problem:
            return httpx2.Response(problem.status, json=problem.body)

    async def _answer(self, request: httpx2.Request) -> httpx2.Response:
        model = {"id": NAME, "object": "model", "created": 0, "owned_by": "aligner-middleware"}
        if request.method == "GET" and request.url.path.endswith("/models"):
            return httpx2.Response(200, json={"object": "list", "data": [model]})
        if request.method == "GET" and request.url.path.endswith(f"/models/{NAME}"):
            return httpx2.Response(200, json=model)
        if not request.url.path.endswith("/chat/completions"):
            raise Problem(
                404, "the local model only has /v1/chat/completions and /v1/models: set an upstream", code="not_found"
            )
        body = json.loads(await request.aread())  # checked by the service
        asked = _asked(body)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": NAME}
        if body.get("stream"):
            options = body.get("stream_options")
            usage = isinstance(options, dict) and bool(options.get("include_usage"))
            content = _Events(self._chunks(asked, head, with_usage=usage))
            return httpx2.Response(200, headers={"content-type": "text/event-stream"}, stream=content)
        text, end = "", Usage()
        async for piece in self._pieces(asked):
            if isinstance(piece, Usage):
                end = piece
            else:
                text += piece
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": end.finish_reason}
        answer = head | {"object": "chat.completion", "choices": [choice], "usage": _usage(end)}
        return httpx2.Response(200, json=answer)

    async def _chunks(self, asked: Asked, head: dict[str, Any], *, with_usage: bool) -> AsyncGenerator[bytes, None]:
        head = head | {"object": "chat.completion.chunk"}

        def chunk(delta: dict[str, Any], reason: str | None = None) -> bytes:
            return event(head | {"choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}]})

        yield chunk({"role": "assistant", "content": ""})
        try:
            async for piece in self._pieces(asked):
                if not isinstance(piece, Usage):
                    yield chunk({"content": piece})
                    continue
                yield chunk({}, piece.finish_reason)
                if with_usage:
                    yield event(head | {"choices": [], "usage": _usage(piece)})
        except Problem as problem:
            yield event(problem.body)
            return
        yield event(DONE)

    async def _pieces(self, asked: Asked) -> AsyncGenerator[str | Usage, None]:
        """Generate in a thread; it stops soon after this is closed."""
        stop = threading.Event()
        async with self._turn:
            pieces = self._generate(asked, stop)
            try:
                while (piece := await asyncio.to_thread(_next, pieces)) is not None:
                    yield piece
            finally:
                stop.set()


class _Events(httpx2.AsyncByteStream):
    def __init__(self, chunks: AsyncGenerator[bytes, None]) -> None:
        self._chunks = chunks

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._chunks

    async def aclose(self) -> None:
        await self._chunks.aclose()


def _next(pieces: Iterator[str | Usage]) -> str | Usage | None:
    return next(pieces, None)


def _usage(end: Usage) -> dict[str, int]:
    total = end.prompt_tokens + end.completion_tokens
    return {"prompt_tokens": end.prompt_tokens, "completion_tokens": end.completion_tokens, "total_tokens": total}


def _asked(body: Mapping[str, Any]) -> Asked:
    """Read a request.

    Raises:
        Problem: 400, if a value does not fit, or several answers are asked for.
    """
    tokens = _number(body, "max_completion_tokens", None) or _number(body, "max_tokens", _TOKENS) or 0
    temperature = _number(body, "temperature", 0) or 0
    if tokens < 1:
        raise Problem(400, f"max_tokens is {tokens:g}, expected 1 or more", code="invalid_value", param="max_tokens")
    if not 0 <= temperature <= 2:
        raise Problem(
            400, f"temperature is {temperature:g}, expected 0 to 2", code="invalid_value", param="temperature"
        )
    if body.get("n") not in (None, 1):
        raise Problem(
            400, "the local model gives one answer at a time: leave n out", code="unsupported_value", param="n"
        )
    stop = body.get("stop") or ()
    stops = (stop,) if isinstance(stop, str) else tuple(text for text in stop if isinstance(text, str) and text)
    messages = [
        {"role": _role(message["role"]), "content": _text(message.get("content"))} for message in body["messages"]
    ]
    return Asked(messages, min(int(tokens), _MOST_TOKENS), float(temperature), stops)


def _number(body: Mapping[str, Any], name: str, default: float | None) -> float | None:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise Problem(400, f"{name} is {value!r:.80}, expected a number", code="invalid_value", param=name)
    return value


def _role(role: str) -> str:
    return {"developer": "system", "tool": "user", "function": "user"}.get(role, role)


def _text(content: Any) -> str:
    if isinstance(content, list):
        return "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""
