"""Connections of a real server: its stop under an open page, and clients that send a byte at a time, or no HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from typing import Any

import pytest

from tests.fakes import InstantAligner
from tests.unit.serve.serving import Service, completion, serving, without_insult

CORRECT = b"POST /v1/correct HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 35\r\n\r\n"
BODY = b'{"question": "Q", "answer": "Fine"}'
QUICK = 0.3  # seconds that a head or a body may take here


def started(**settings: Any) -> Any:
    return serving(completion("Fine"), InstantAligner(without_insult), **settings)


@contextlib.asynccontextmanager
async def connected(service: Service) -> Any:
    reader, writer = await asyncio.open_connection("127.0.0.1", int(service.url.rpartition(":")[2]))
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def drip(writer: asyncio.StreamWriter, content: bytes) -> None:
    with contextlib.suppress(ConnectionError):
        for byte in content:
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0.05)


def problem_in(answer: bytes) -> tuple[int, str]:
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]["code"]


async def test_an_open_page_does_not_hold_up_a_stop() -> None:
    async with started(drain=20) as service:
        async with service.client.stream("GET", "/page/events") as events:
            lines = events.aiter_lines()
            assert (await anext(lines)).startswith("retry")
            start = time.monotonic()
            service.server.should_exit = True  # what uvicorn's handler of SIGTERM does
            assert [line async for line in lines if line] == []
        while service.server.server_state.connections or service.server.server_state.tasks:
            await asyncio.sleep(0.02)
            assert time.monotonic() - start < 5
    assert time.monotonic() - start < 5


async def test_a_running_request_may_end_when_the_server_stops() -> None:
    class Slow(InstantAligner):
        async def acorrect_batch(self, pairs: Any, **options: Any) -> Any:
            begun.set()
            await asyncio.sleep(0.5)
            return self.correct_batch(pairs)

    begun = asyncio.Event()
    async with serving(completion("Fine"), Slow(without_insult), drain=20) as service:
        asked = asyncio.create_task(
            service.client.post("/v1/correct", content=BODY, headers={"content-type": "application/json"})
        )
        await begun.wait()
        service.server.should_exit = True
        assert (await asked).json()["corrected"] == "Fine"


@pytest.mark.parametrize(
    ("whole", "dripped", "said"),
    [
        (b"", CORRECT, (408, "headers_timeout")),
        (CORRECT, BODY, (408, "body_timeout")),
    ],
    ids=["head", "body"],
)
async def test_whoever_sends_a_byte_at_a_time_is_dropped(whole: bytes, dripped: bytes, said: tuple[int, str]) -> None:
    async with started(body_timeout=QUICK) as service, connected(service) as (reader, writer):
        start = time.monotonic()
        writer.write(whole)
        dripping = asyncio.create_task(drip(writer, dripped * 10))
        answer = await asyncio.wait_for(reader.read(), 10)
        taken = time.monotonic() - start
        dripping.cancel()
    assert problem_in(answer) == said
    assert QUICK <= taken < QUICK + 3


async def test_a_connection_without_a_request_is_closed_and_nothing_is_said() -> None:
    async with started(body_timeout=QUICK) as service, connected(service) as (reader, _):
        start = time.monotonic()
        assert await asyncio.wait_for(reader.read(), 10) == b""
        assert QUICK <= time.monotonic() - start < QUICK + 3


async def test_a_slow_second_request_is_dropped_too_and_an_early_refusal_ends_the_connection() -> None:
    async with started(body_timeout=QUICK, max_body=1024) as service:
        async with connected(service) as (reader, writer):
            writer.write(b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n")
            assert b"200 OK" in await reader.readuntil(b"}")
            dripping = asyncio.create_task(drip(writer, CORRECT))
            assert problem_in(await asyncio.wait_for(reader.read(), 10)) == (408, "headers_timeout")
            dripping.cancel()
        async with connected(service) as (reader, writer):
            writer.write(CORRECT.replace(b"35", b"99999"))
            dripping = asyncio.create_task(drip(writer, b"x" * 1000))
            assert problem_in(await asyncio.wait_for(reader.read(), 10)) == (413, "body_too_large")
            dripping.cancel()


@pytest.mark.parametrize("sent", [b"\x16\x03\x01 no http\r\n\r\n", b"GET / HTTP/1.1\r\nA: " + b"x" * 100_000])
async def test_what_is_no_http_is_refused_in_openais_shape(sent: bytes) -> None:
    async with started() as service, connected(service) as (reader, writer):
        writer.write(sent)
        answer = await asyncio.wait_for(reader.read(), 10)
    assert problem_in(answer) == (400, "invalid_http")
