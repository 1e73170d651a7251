"""The service as a real server, before an upstream whose every byte a test writes."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import httpx2
import uvicorn

from aligner_middleware import Aligner
from aligner_middleware.serve.app import create_app
from aligner_middleware.serve.connections import CONNECTION
from aligner_middleware.serve.settings import ServeSettings
from tests.fakes import judging_aligner

ASKED = {"model": "m", "messages": [{"role": "user", "content": "Who am I?"}]}
RUDE, POLITE = "You are an idiot, and it rains.", "You are a friend, and it rains."
Reply = Callable[[httpx2.Request], Any]


def without_insult(question: str, answer: str) -> str:
    return answer.replace("an idiot", "a friend")


def polite_aligner() -> Aligner:
    return judging_aligner(without_insult)


class Body(httpx2.AsyncByteStream):
    """The body of a streamed response, which knows whether it was closed."""

    def __init__(self, chunks: AsyncIterator[bytes] | Iterable[bytes]) -> None:
        self._chunks = chunks
        self.closed = asyncio.Event()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        if isinstance(self._chunks, Iterable):
            for chunk in self._chunks:
                yield chunk
        else:
            async for chunk in self._chunks:
                yield chunk

    async def aclose(self) -> None:
        self.closed.set()


class Upstream(httpx2.AsyncBaseTransport):
    """Replies as it is told, and keeps the requests.

    Args:
        reply: A response or an error for every request, or a function of the request.
    """

    def __init__(self, reply: httpx2.Response | Exception | Reply) -> None:
        self.reply = reply
        self.requests: list[httpx2.Request] = []

    @property
    def sent(self) -> Any:
        return json.loads(self.requests[-1].content)

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        await request.aread()
        self.requests.append(request)
        reply = self.reply(request) if callable(self.reply) else self.reply
        if asyncio.iscoroutine(reply):
            reply = await reply
        if isinstance(reply, Exception):
            raise reply
        assert isinstance(reply, httpx2.Response)
        return reply


def completion(*contents: Any, **fields: Any) -> httpx2.Response:
    """A chat completion with one choice for each content: text, or a message."""
    messages = [content if isinstance(content, dict) else {"content": content} for content in contents]
    choices = [
        {"index": index, "message": {"role": "assistant"} | message, "finish_reason": "stop"}
        for index, message in enumerate(messages)
    ]
    usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
    body = {"id": "c1", "object": "chat.completion", "created": 1, "model": "m", "choices": choices, "usage": usage}
    return httpx2.Response(200, json=body | fields)


def data(body: Any) -> bytes:
    return b"data: " + (body if isinstance(body, str) else json.dumps(body)).encode() + b"\n\n"


def chunk(delta: Mapping[str, Any], finish: str | None = None, index: int = 0, **fields: Any) -> bytes:
    choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}
    return data(
        {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice | fields]}
    )


def spoken(text: str, index: int = 0) -> list[bytes]:
    """The chunks of a whole answer, word by word."""
    words = [chunk({"content": word + " "}, index=index) for word in text.split(" ")[:-1]]
    last = chunk({"content": text.split(" ")[-1]}, index=index)
    return [chunk({"role": "assistant", "content": ""}, index=index), *words, last, chunk({}, "stop", index=index)]


USAGE = data({"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [],
              "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}})  # fmt: skip
DONE = data("[DONE]")


def streamed(chunks: AsyncIterator[bytes] | Iterable[bytes], **headers: str) -> httpx2.Response:
    return httpx2.Response(200, headers={"content-type": "text/event-stream"} | headers, stream=Body(chunks))


@asynccontextmanager
async def serving(
    reply: httpx2.Response | Exception | Reply,
    aligner: Aligner | None = None,
    drain: int = 1,
    **settings: Any,
) -> AsyncGenerator[Service, None]:
    """Serve on a free port as `aligner serve` does, before an upstream that replies so."""
    upstream = Upstream(reply)
    given = ServeSettings(**{"upstream": "http://upstream/v1", **settings})
    app = create_app(given, aligner or polite_aligner(), upstream)
    options: dict[str, Any] = {"http": CONNECTION, "ws": "none", "timeout_graceful_shutdown": drain}
    config = uvicorn.Config(app, log_level="warning", lifespan="on", **options)
    server = uvicorn.Server(config)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        task = asyncio.create_task(server.serve(sockets=[listening]))
        while not server.started:
            await asyncio.sleep(0.005)
            assert not task.done()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        try:
            async with httpx2.AsyncClient(base_url=url, timeout=30) as client:
                yield Service(url, client, upstream, app, server)
        finally:
            server.should_exit = True
            await task


class Service:
    """A running service, a plain client of it, and its upstream."""

    def __init__(
        self, url: str, client: httpx2.AsyncClient, upstream: Upstream, app: Any, server: uvicorn.Server
    ) -> None:
        self.url = url
        self.client = client
        self.upstream = upstream
        self.app = app
        self.server = server

    async def ask(self, body: Any = ASKED, path: str = "/v1/chat/completions", **options: Any) -> httpx2.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return await self.client.post(path, content=content, **options)

    async def stream(self, body: Mapping[str, Any] = ASKED, **options: Any) -> list[Any]:
        """The data of all events of a stream."""
        response = await self.ask({**body, "stream": True}, **options)
        assert response.headers["content-type"].startswith("text/event-stream"), response.text
        return events_of(response.text)


def events_of(text: str) -> list[Any]:
    blocks = [block.strip() for block in text.split("\n\n")]
    events = [block.removeprefix("data: ") for block in blocks if block.startswith("data: ")]
    return [event if event == "[DONE]" else json.loads(event) for event in events]


def text_of(events: Iterable[Any], index: int = 0) -> str:
    """The text that the events of a stream say for one choice."""
    choices = [choice for event in events if event != "[DONE]" for choice in event.get("choices", [])]
    return "".join(choice["delta"].get("content") or "" for choice in choices if choice["index"] == index)
