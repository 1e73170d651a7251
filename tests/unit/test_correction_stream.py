"""`CorrectionStream`: one iterator at a time, by `for` or by `async for`, and its place in the engine is freed."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import time
import weakref
from collections.abc import AsyncIterator, Generator, Iterator
from typing import Any, cast

import pytest

from aligner_middleware import Aligner
from aligner_middleware.engine import Prefill
from aligner_middleware.engine.scheduler import Scheduler
from tests.fakes import fake_aligner

ANSWER = "Left, idiot."
CORRECTED = "Left, friend."
PLACE = 10  # seconds that a free place in the engine is waited for


def soften(question: str, answer: str) -> str:
    return answer.replace("idiot", "friend")


def test_a_stream_has_its_correction_only_at_its_end() -> None:
    with fake_aligner(soften) as aligner:
        stream = aligner.stream("q", ANSWER)
        with pytest.raises(RuntimeError, match="iterate it to its end first"):
            _ = stream.correction
        assert "".join(stream) == stream.correction.corrected == CORRECTED
        assert next(stream, None) is None


def test_a_stream_that_was_closed_has_no_correction() -> None:
    with fake_aligner(soften) as aligner:
        stream = aligner.stream("q", ANSWER)
        stream.close()
        assert list(stream) == []
        with pytest.raises(RuntimeError, match="no correction yet"):
            _ = stream.correction


def test_a_stream_may_be_closed_twice_before_and_after_its_end() -> None:
    with fake_aligner(soften) as aligner:
        stream = aligner.stream("q", ANSWER)
        assert "".join(stream) == CORRECTED
        unread = aligner.stream("q", ANSWER)
        for one in (stream, stream, unread, unread):
            one.close()
            asyncio.run(one.aclose())
        assert stream.correction.corrected == CORRECTED


class Chunks:
    """The chunks of an answer; the second waits until it is let go."""

    def __init__(self) -> None:
        self.reached, self.go_on = threading.Event(), threading.Event()

    def __iter__(self) -> Iterator[str]:
        yield "Left, "
        self.reached.set()
        assert self.go_on.wait(PLACE)
        yield "idiot."


def test_a_second_thread_cannot_iterate_or_close_a_stream_meanwhile() -> None:
    chunks = Chunks()
    with fake_aligner(soften) as aligner:
        stream, pieces = aligner.stream("q", chunks), list[str]()
        reader = threading.Thread(target=lambda: pieces.extend(stream))
        reader.start()
        assert chunks.reached.wait(PLACE)
        with pytest.raises(RuntimeError, match="being iterated already"):
            next(stream)
        with pytest.raises(RuntimeError, match="cannot be closed meanwhile"):
            stream.close()
        chunks.go_on.set()
        reader.join(PLACE)
        assert "".join(pieces) == stream.correction.corrected == CORRECTED  # the first reader is not disturbed


def test_a_second_task_cannot_iterate_a_stream_meanwhile() -> None:
    chunks = Chunks()

    async def main(aligner: Aligner) -> list[str]:
        stream = aligner.stream("q", chunks)

        async def read() -> list[str]:
            return [piece async for piece in stream]

        reader = asyncio.create_task(read())
        assert await asyncio.to_thread(chunks.reached.wait, PLACE)
        with pytest.raises(RuntimeError, match="being iterated already"):
            await anext(stream)
        chunks.go_on.set()
        return await reader

    with fake_aligner(soften) as aligner:
        assert "".join(asyncio.run(main(aligner))) == CORRECTED


@pytest.mark.parametrize("chunks", [["Left, ", "idiot."], iter(["Left, ", "idiot."]), ("Left, idiot.",)])
def test_a_plain_iterable_may_be_the_answer_in_an_event_loop(chunks: object) -> None:
    async def main(aligner: Aligner) -> str:
        return "".join([piece async for piece in aligner.stream("q", chunks)])  # type: ignore[arg-type]

    with fake_aligner(soften) as aligner:
        assert asyncio.run(main(aligner)) == CORRECTED


def test_an_async_iterator_is_refused_by_a_plain_loop() -> None:
    async def chunks() -> AsyncIterator[str]:
        yield ANSWER

    with fake_aligner(soften) as aligner, pytest.raises(TypeError, match="with `async for`"):
        list(aligner.stream("q", chunks()))


@pytest.mark.parametrize("begun", [False, True])
def test_a_dropped_stream_is_freed_and_leaves_its_place(begun: bool) -> None:
    with fake_aligner(lambda q, a: a + " Never the same? " * 40, draft=False) as aligner:
        stream = aligner.stream("q", ANSWER, on_doubt="keep")  # gives pieces as they are decoded
        if begun:
            next(stream)
        dropped = weakref.ref(stream)
        del stream
        gc.collect()
        assert dropped() is None
        assert aligner.correct("q", ANSWER, on_doubt="keep", timeout=PLACE).changed


def test_a_stream_keeps_its_aligner_alive() -> None:
    aligner = fake_aligner(soften)
    alive = weakref.ref(aligner)
    stream = aligner.stream("q", ANSWER)
    del aligner
    gc.collect()
    assert alive() is not None
    assert "".join(stream) == CORRECTED
    del stream
    gc.collect()
    assert alive() is None


def test_a_read_ahead_may_be_collected_while_it_submits() -> None:
    aligner = fake_aligner(soften)
    ahead = aligner.read_ahead("q")
    scheduler = aligner._scheduler

    class Closing:
        def prefill(self, prefill: Prefill) -> None:
            ahead.close()  # as the garbage collector does, in the same thread

        def abandon(self, prefill: Prefill) -> None:
            abandoned.append(prefill)

    abandoned: list[Prefill] = []
    ahead._scheduler = cast(Scheduler, Closing())
    ahead._submit("You fool. " * 20)
    assert abandoned
    ahead._scheduler = scheduler
    aligner.close()


@pytest.mark.parametrize("stream", [False, True])
def test_a_dropped_read_ahead_frees_its_place(stream: bool) -> None:
    aligner = fake_aligner(soften)
    ahead = aligner.read_ahead("q")
    for _ in range(20):
        ahead.feed("You fool, this is long enough to be read ahead. ")
        time.sleep(0.03)
    assert aligner._scheduler._prefills
    if stream:
        aligner.stream("q", ANSWER, ahead=ahead)
    del ahead
    gc.collect()
    deadline = time.monotonic() + 10
    while aligner._scheduler._prefills and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not aligner._scheduler._prefills
    aligner.close()


async def test_a_none_among_the_chunks_is_an_error() -> None:
    chunks: list[Any] = ["Left, ", None, "idiot."]
    with pytest.raises(TypeError):
        async for _ in fake_aligner(soften).stream("q", iter(chunks)):
            pass


@pytest.mark.parametrize("threaded", [False, True])
async def test_an_answer_that_cannot_be_read_to_its_end_is_closed_at_once(threaded: bool) -> None:
    closed = []

    def words() -> Generator[Any, None, None]:
        try:
            yield from ("Left, ", None, "idiot.")
        finally:
            closed.append(threading.get_ident())

    async def awords() -> AsyncIterator[Any]:
        with contextlib.closing(words()) as given:
            for word in given:
                yield word

    with fake_aligner(soften) as aligner:
        answer = words() if threaded else awords()
        with pytest.raises(TypeError):
            await anext(aligner.stream("q", answer))
        del answer
        assert closed


async def test_a_correction_that_is_cancelled_closes_its_answer() -> None:
    closed = []

    async def words() -> AsyncIterator[str]:
        try:
            yield "Left, "
            await asyncio.sleep(PLACE)
        finally:
            await asyncio.sleep(0)
            closed.append("words")

    with fake_aligner(soften) as aligner:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(aligner.stream("q", words())), 0.05)
        assert closed


def test_a_correction_stream_is_an_answer_in_a_plain_loop() -> None:
    aligner = fake_aligner(soften)
    assert "".join(aligner.stream("q", aligner.stream("q", ANSWER))) == aligner.correct("q", ANSWER).corrected
