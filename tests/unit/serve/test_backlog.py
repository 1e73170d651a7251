"""Requests are refused while an answer would wait for the aligner for too long, and not before."""

from __future__ import annotations

import asyncio
import itertools
import statistics
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import pytest

from aligner_middleware.serve.backlog import Backlog
from tests.unit.serve.serving import ASKED, completion, serving


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def backlog(clock: Clock) -> Backlog:
    """One that has seen 100 answers, each decided in half a second."""
    backlog = Backlog(clock)
    for _ in range(100):
        with backlog.waiting():
            clock.now += 0.5
        clock.now += 7  # idle
    return backlog


@pytest.fixture
def queue(backlog: Backlog) -> Iterator[ExitStack]:
    """Forty answers that wait."""
    with ExitStack() as stack:
        for _ in range(40):
            stack.enter_context(backlog.waiting())
        yield stack


def test_an_answer_waits_for_those_before_it_at_the_pace_of_the_latest(backlog: Backlog, queue: ExitStack) -> None:
    assert backlog.seconds == pytest.approx(40 * 0.5)


def test_the_wait_grows_while_nothing_is_decided(backlog: Backlog, queue: ExitStack, clock: Clock) -> None:
    clock.now += 32
    assert backlog.seconds == pytest.approx(40 * (64 * 0.5 + 32) / 64)


def test_it_is_over_when_all_are_decided(backlog: Backlog, queue: ExitStack) -> None:
    queue.close()
    assert backlog.seconds == 0


def test_answers_that_share_passes_do_not_wait(backlog: Backlog, clock: Clock) -> None:
    with ExitStack() as stack:
        for _ in range(15):
            stack.enter_context(backlog.waiting())
        clock.now += 1000
        assert backlog.seconds == 0


def test_one_that_is_given_up_tells_no_pace_and_waits_no_longer(backlog: Backlog, queue: ExitStack) -> None:
    for _ in range(100):
        with suppress(asyncio.CancelledError), backlog.waiting():
            raise asyncio.CancelledError
    assert backlog.seconds == pytest.approx(40 * 0.5)


def test_before_the_first_decisions_sixteen_are_taken_for_nearly_done(clock: Clock) -> None:
    backlog = Backlog(clock)
    with ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(backlog.waiting())
        assert backlog.seconds == 0
        clock.now += 2
        assert backlog.seconds == pytest.approx(200 * 2 / 16)


async def test_where_it_would_be_too_long_requests_are_refused_before_the_upstream_is_asked() -> None:
    async with serving(completion("Fine."), longest_wait=30) as service:
        backlog = service.app.state.service.backlog
        ticks = itertools.count()
        backlog._clock = lambda: float(next(ticks))  # each look at the clock takes a second
        for _ in range(20):
            assert (await service.ask()).status_code == 200
        asked = len(service.upstream.requests)
        with ExitStack() as stack:
            for _ in range(40):
                stack.enter_context(backlog.waiting())
            refused = await service.ask()
            health = await service.client.get("/healthz")
            models = await service.client.get("/v1/models")
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "too_many_requests"
        assert int(refused.headers["retry-after"]) > 30
        assert (health.status_code, models.status_code) == (200, 200)
        assert len(service.upstream.requests) == asked + 1  # for the models
        assert (await service.ask(ASKED)).status_code == 200


@pytest.mark.parametrize("together", [1, 16])
@pytest.mark.parametrize("load", [2, 10])
def test_at_several_times_the_pace_none_waits_longer_and_the_aligner_is_never_idle(load: int, together: int) -> None:
    """Answers come evenly, at so many times the pace; so many are decided together, the first that came first."""
    clock = Clock()
    backlog, queue, waits, idle = Backlog(clock), deque[tuple[float, ExitStack]](), list[float](), 0
    pause = 0.3 / load  # between arrivals, where a decision takes 0.3 seconds
    for arrival in range(2000 * load):
        clock.now += pause
        if backlog.seconds <= 30:
            waiting = ExitStack()
            waiting.enter_context(backlog.waiting())
            queue.append((clock.now, waiting))
        if arrival % (load * together) == 0 and arrival > 0:
            decided = [queue.popleft() for _ in range(min(together, len(queue)))]
            idle += together - len(decided)
            for came, waiting in decided:
                waiting.close()
                waits.append(clock.now - came)
    assert max(waits) <= 30 * 1.3
    assert statistics.median(waits) >= 30 * 0.8
    assert idle <= together
