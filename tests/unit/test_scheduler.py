"""Concurrent calls share passes; none waits for ever, none gets another's answer."""

import asyncio
import gc
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aligner_middleware.engine import Decoder, Generation, Prefill
from aligner_middleware.engine.scheduler import Scheduler
from aligner_middleware.errors import ClosedError
from tests.fakes import FakeModel, fake_aligner

STOP = frozenset({0})


def rule(tokens: list[int]) -> int:
    """Looks random and depends on every token; 0 ends."""
    return sum((place + 7) * token for place, token in enumerate(tokens[-9:])) * 2654435761 % 2**32 // 7 % 13


def soften(question: str, answer: str) -> str:
    return f"{question}: {answer.replace('idiot', 'friend')}"


class SlowModel(FakeModel):
    """Sleeps in every prediction, as a real model computes without the interpreter."""

    def append(self, *args: object) -> object:  # type: ignore[override]
        time.sleep(0.001)
        return super().append(*args)  # type: ignore[arg-type]


def alone(generation: Generation) -> list[int]:
    copy = Generation(generation.prompt, max_new_tokens=generation.max_new_tokens)
    decoder = Decoder(FakeModel(rule), STOP)
    decoder.admit(copy, copy.longest)
    while not copy.done:
        decoder.round()
    return copy.tokens


IDS = st.lists(st.integers(1, 12), max_size=12)
CALL = st.tuples(st.lists(st.integers(1, 12), min_size=1, max_size=12), IDS, st.integers(1, 20))


@given(st.lists(CALL, min_size=1, max_size=12))
@settings(deadline=None, max_examples=30)
def test_who_calls_together_gets_what_each_gets_alone(calls: list[tuple[list[int], list[int], int]]) -> None:
    scheduler = Scheduler(FakeModel(rule), STOP)
    generations = [Generation(prompt, draft, limit) for prompt, draft, limit in calls]
    futures = [scheduler.submit(generation) for generation in generations]
    for generation, future in zip(generations, futures, strict=True):
        assert future.result(timeout=10) is generation
        assert generation.tokens == alone(generation)
    scheduler.close()


def test_a_thousand_calls_from_many_threads_are_answered_each_with_its_own() -> None:
    with fake_aligner(soften) as aligner, ThreadPoolExecutor(32) as pool:
        answers = [f"no {number}, idiot {number % 7}" for number in range(1000)]
        corrections = list(pool.map(lambda answer: aligner.correct(f"q {answer[3]}", answer), answers))
    assert [c.corrected for c in corrections] == [soften(f"q {answer[3]}", answer) for answer in answers]


def test_concurrent_sequences_share_passes() -> None:
    model = FakeModel(lambda tokens: 0 if len(tokens) >= 104 else 5)
    scheduler = Scheduler(model, STOP)
    scheduler.submit(Generation([1] * 4, max_new_tokens=1)).result(timeout=10)
    with scheduler._changed:  # let all of them come at once
        futures = [scheduler.submit(Generation([1] * 4, max_new_tokens=200)) for _ in range(8)]
    assert all(len(future.result(timeout=10).tokens) == 100 for future in futures)
    assert model.passes < 8 * 101 / 3
    scheduler.close()


def test_the_event_loop_is_never_blocked() -> None:
    longest = 0.0

    async def watch() -> None:
        nonlocal longest
        while True:
            before = time.perf_counter()
            await asyncio.sleep(0.002)
            longest = max(longest, time.perf_counter() - before)

    async def main() -> list[str]:
        aligner = fake_aligner(soften)
        aligner.fake_model.__class__ = SlowModel  # type: ignore[attr-defined]
        watcher = asyncio.create_task(watch())
        corrections = await asyncio.gather(*(aligner.acorrect("q", f"idiot {number}") for number in range(20)))
        watcher.cancel()
        aligner.close()
        return [c.corrected for c in corrections]

    assert asyncio.run(main()) == [f"q: friend {number}" for number in range(20)]
    assert longest < 0.1


def test_a_cancelled_task_leaves_its_row_to_others() -> None:
    model = SlowModel(lambda tokens: 5)  # never ends by itself
    scheduler = Scheduler(model, STOP)
    endless = [scheduler.submit(Generation([1], max_new_tokens=4000)) for _ in range(4)]
    waiting = scheduler.submit(Generation([1], max_new_tokens=3))
    time.sleep(0.05)
    assert not waiting.done()
    for future in endless:
        assert future.cancel()
    assert len(waiting.result(timeout=10).tokens) == 3
    scheduler.close()


def test_a_pass_that_raises_fails_its_own_call_alone() -> None:
    class Breaking(FakeModel):
        def append(self, held, tokens, wanted, capacity):  # type: ignore[no-untyped-def]
            if 666 in tokens:
                raise RuntimeError("no such token")
            return super().append(held, tokens, wanted, capacity)

    scheduler = Scheduler(Breaking(rule), STOP)
    good, bad = Generation([1, 2]), Generation([1, 666])
    futures = [scheduler.submit(good), scheduler.submit(bad), scheduler.submit(Generation([3]))]
    with pytest.raises(RuntimeError, match="no such token"):
        futures[1].result(timeout=10)
    assert futures[0].result(timeout=10).tokens == alone(good)
    assert futures[2].result(timeout=10).finish_reason
    scheduler.close()


def test_a_model_that_fails_outside_its_passes_leaves_nobody_waiting() -> None:
    class Forgetful(FakeModel):
        def new_rows(self, rows, capacity):  # type: ignore[no-untyped-def]
            made = super().new_rows(rows, capacity)
            trim = made.trim

            def failing(row: int, length: int) -> None:
                if length == 300:
                    raise RuntimeError("lost")
                trim(row, length)

            made.trim = failing
            return made

    scheduler = Scheduler(Forgetful(lambda tokens: 5), STOP)
    endless = scheduler.submit(Generation([1], max_new_tokens=1500))
    prefill = Prefill([1] * 400)
    scheduler.prefill(prefill)
    while len(prefill.fed) < 400:
        time.sleep(0.001)
    prefill.prompt = [1] * 300 + [2] * 300  # its second half was read in vain
    scheduler.prefill(prefill)
    with pytest.raises(RuntimeError, match="lost"):
        endless.result(timeout=10)
    assert len(scheduler.submit(Generation([1], max_new_tokens=4)).result(timeout=10).tokens) == 4
    scheduler.close()


@pytest.mark.parametrize("error", [MemoryError, RuntimeError])
def test_memory_that_runs_out_fails_the_call_that_needed_it(error: type[Exception]) -> None:
    class Small(FakeModel):
        def new_rows(self, rows, capacity):  # type: ignore[no-untyped-def]
            if capacity > 2048:
                raise error
            return super().new_rows(rows, capacity)

    scheduler = Scheduler(Small(rule), STOP)
    with pytest.raises(error):
        scheduler.submit(Generation([1] * 3000)).result(timeout=10)
    assert scheduler.submit(Generation([1, 2], max_new_tokens=4)).result(timeout=10).finish_reason
    scheduler.close()


def test_a_full_queue_makes_callers_wait_or_says_so() -> None:
    model = SlowModel(lambda tokens: 5)
    scheduler = Scheduler(model, STOP, queue_limit=1)
    futures = [scheduler.submit(Generation([1], max_new_tokens=30)) for _ in range(12)]
    with pytest.raises(BlockingIOError):
        for _ in range(20):
            futures.append(scheduler.submit(Generation([1], max_new_tokens=30), timeout=0))
    assert all(len(future.result(timeout=10).tokens) == 30 for future in futures)
    scheduler.close()


def test_closing_fails_what_is_under_way_and_what_comes_later() -> None:
    scheduler = Scheduler(SlowModel(lambda tokens: 5), STOP)
    futures = [scheduler.submit(Generation([1], max_new_tokens=3000)) for _ in range(9)]
    time.sleep(0.02)
    scheduler.close()
    for future in futures:
        with pytest.raises(ClosedError):
            future.result(timeout=10)
    with pytest.raises(ClosedError):
        scheduler.submit(Generation([1]))


def test_an_aligner_that_is_forgotten_ends_its_thread() -> None:
    before = threading.active_count()
    aligner = fake_aligner(soften)
    aligner.correct("q", "idiot")
    assert threading.active_count() == before + 1
    del aligner
    gc.collect()
    for _ in range(100):
        if threading.active_count() == before:
            return
        time.sleep(0.01)
    raise AssertionError("its thread still runs")


def test_a_stream_that_is_dropped_frees_its_row() -> None:
    aligner = fake_aligner(lambda question, answer: answer.upper())
    stream = aligner.stream("q", "never the same, " * 20, on_doubt="keep")  # gives pieces as they are decided
    next(stream)
    stream.close()
    assert aligner.correct("q", "next").corrected == "NEXT"
    aligner.close()


CHUNKS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), min_size=1, max_size=12)


@given(CHUNKS)
@settings(deadline=None, max_examples=40)
def test_chunks_as_they_come_give_what_the_whole_gives(chunks: list[str]) -> None:
    with fake_aligner(soften) as aligner:
        assert "".join(aligner.stream("q", iter(chunks))) == aligner.correct("q", "".join(chunks)).corrected


def test_what_is_known_of_a_prompt_goes_through_before_the_rest_is() -> None:
    aligner = fake_aligner(lambda question, answer: answer)
    model = aligner.fake_model  # type: ignore[attr-defined]
    seen = []

    def chunks() -> Iterator[str]:
        for number in range(30):
            yield f"word {number} "
            time.sleep(0.005)
        seen.append(model.tokens)

    assert "".join(aligner.stream("q", chunks())).startswith("word 0 word 1 ")
    prompt = len("word 10 ") * 30
    assert seen[0] > 0.6 * prompt
    assert model.tokens < 2.5 * prompt
    aligner.close()


def test_unfinished_prompts_give_way_to_finished_ones() -> None:
    scheduler = Scheduler(FakeModel(rule), STOP)
    prefills = [Prefill([number + 1] * 1500) for number in range(6)]
    for prefill in prefills:
        scheduler.prefill(prefill)
    time.sleep(0.05)
    calls = [Generation([3, number], max_new_tokens=9) for number in range(8)]
    for call in calls:
        assert scheduler.submit(call).result(timeout=10).tokens == alone(call)
    late = Generation([1] * 1500 + [2, 2], max_new_tokens=9, prefill=prefills[0])
    assert scheduler.submit(late).result(timeout=10).tokens == alone(late)
    scheduler.close()
