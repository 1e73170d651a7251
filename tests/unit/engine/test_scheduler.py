"""Concurrent calls share passes; none waits for ever, none gets another's answer."""

import asyncio
import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aligner_middleware import Aligner
from aligner_middleware.engine import Decoder, Generation, Prefill, VerdictRule
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
        decoder.step()
    return copy.tokens


IDS = st.lists(st.integers(1, 12), max_size=12)
CALL = st.tuples(st.lists(st.integers(1, 12), min_size=1, max_size=12), IDS, st.integers(1, 20))


@given(st.lists(CALL, min_size=1, max_size=12))
@settings(max_examples=30)
def test_who_calls_together_gets_what_each_gets_alone(calls: list[tuple[list[int], list[int], int]]) -> None:
    scheduler = Scheduler(FakeModel(rule), STOP)
    generations = [Generation(prompt, draft, limit) for prompt, draft, limit in calls]
    futures = [scheduler.submit(generation) for generation in generations]
    for generation, future in zip(generations, futures, strict=True):
        assert future.result(timeout=60) is generation
        assert generation.tokens == alone(generation)
    scheduler.close()


def test_hundreds_of_calls_from_many_threads_are_answered_each_with_its_own() -> None:
    with fake_aligner(soften) as aligner, ThreadPoolExecutor(32) as pool:
        answers = [f"no {number}, idiot {number % 7}" for number in range(400)]
        corrections = list(pool.map(lambda answer: aligner.correct(f"q {answer[3]}", answer), answers))
    assert [c.corrected for c in corrections] == [soften(f"q {answer[3]}", answer) for answer in answers]


class GatedModel(FakeModel):
    """Waits in its passes until the gate is open."""

    def __init__(self, rule: Callable[[list[int]], int]) -> None:
        super().__init__(rule)
        self.gate, self.begun = threading.Event(), threading.Event()

    def append(self, *args: object) -> object:  # type: ignore[override]
        self.begun.set()
        assert self.gate.wait(timeout=60)
        return super().append(*args)  # type: ignore[arg-type]


def test_concurrent_sequences_share_passes() -> None:
    model = GatedModel(lambda tokens: 0 if len(tokens) >= 104 else 5)
    scheduler = Scheduler(model, STOP)
    futures = [scheduler.submit(Generation([1] * 4, max_new_tokens=200)) for _ in range(8)]
    model.gate.set()
    assert all(len(future.result(timeout=60).tokens) == 100 for future in futures)
    assert model.passes < 8 * 101 / 3
    scheduler.close()


LONG = " ".join(f"Go on to mill {number}, idiot." for number in range(20))


def test_the_event_loop_is_never_blocked() -> None:
    longest = 0.0

    async def watch() -> None:
        nonlocal longest
        while True:
            before = time.thread_time()  # of the loop's own work: what else this machine does is not counted
            await asyncio.sleep(0.001)
            longest = max(longest, time.thread_time() - before)

    async def gathered(aligner: Aligner) -> str:
        async def chunks() -> AsyncIterator[str]:
            for at in range(0, len(LONG), 40):
                yield LONG[at : at + 40]
                await asyncio.sleep(0.001)

        return "".join([piece async for piece in aligner.astream("q", chunks())])

    async def main() -> list[str]:
        aligner = fake_aligner(soften)
        watcher = asyncio.create_task(watch())
        said = await asyncio.gather(*(aligner.acorrect("q", f"{LONG} {number}") for number in range(4)))
        streamed = await gathered(aligner)
        watcher.cancel()
        aligner.close()
        return [*(c.corrected for c in said), streamed]

    assert asyncio.run(main()) == [*(soften("q", f"{LONG} {number}") for number in range(4)), soften("q", LONG)]
    assert longest < 0.02


def test_a_cancelled_task_leaves_its_row_to_others() -> None:
    model = SlowModel(lambda tokens: 5)  # never ends by itself
    scheduler = Scheduler(model, STOP)
    endless = [scheduler.submit(Generation([1], max_new_tokens=4000)) for _ in range(4)]
    waiting = scheduler.submit(Generation([1], max_new_tokens=3))
    time.sleep(0.05)
    assert not waiting.done()
    for future in endless:
        assert future.cancel()
    assert len(waiting.result(timeout=60).tokens) == 3
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
        futures[1].result(timeout=60)
    assert futures[0].result(timeout=60).tokens == alone(good)
    assert futures[2].result(timeout=60).finish_reason
    scheduler.close()


def test_a_model_that_fails_outside_its_passes_leaves_nobody_waiting() -> None:
    class Forgetful(FakeModel):
        def new_cache(self, rows, capacity):  # type: ignore[no-untyped-def]
            made = super().new_cache(rows, capacity)
            trim = made.trim

            def failing(row: int, length: int) -> None:
                if length == 300:
                    raise RuntimeError("lost")
                trim(row, length)

            made.trim = failing  # type: ignore[method-assign]
            return made

    scheduler = Scheduler(Forgetful(lambda tokens: 5), STOP)
    endless = scheduler.submit(Generation([1], max_new_tokens=1500))
    prefill = Prefill([1] * 400)
    scheduler.prefill(prefill)
    while len(prefill.cached_tokens) < 400:
        time.sleep(0.001)
    prefill.prompt = [1] * 300 + [2] * 300  # its second half was read in vain
    scheduler.prefill(prefill)
    with pytest.raises(RuntimeError, match="lost"):
        endless.result(timeout=60)
    assert len(scheduler.submit(Generation([1], max_new_tokens=4)).result(timeout=60).tokens) == 4
    scheduler.close()


@pytest.mark.parametrize("error", [MemoryError, RuntimeError])
def test_memory_that_runs_out_fails_the_call_that_needed_it(error: type[Exception]) -> None:
    class Small(FakeModel):
        def new_cache(self, rows, capacity):  # type: ignore[no-untyped-def]
            if capacity > 2048:
                raise error
            return super().new_cache(rows, capacity)

    scheduler = Scheduler(Small(rule), STOP)
    with pytest.raises(error):
        scheduler.submit(Generation([1] * 3000)).result(timeout=60)
    assert scheduler.submit(Generation([1, 2], max_new_tokens=4)).result(timeout=60).finish_reason
    scheduler.close()


def test_whoever_came_first_is_taken_first_however_many_wait() -> None:
    model = GatedModel(rule)
    taken: list[int] = []
    scheduler = Scheduler(model, STOP)
    calls = [
        scheduler.submit(Generation([1, 1 + number % 12], max_new_tokens=1), partial(taken.append, number))
        for number in range(3000)
    ]
    assert calls[1000].cancel()
    model.gate.set()
    calls[-1].result(timeout=120)
    scheduler.close()
    assert taken == [number for number in range(3000) if number != 1000]


@pytest.mark.parametrize("streams", [True, False])
def test_memory_that_runs_out_fails_a_stream_too(streams: bool) -> None:
    class Full(FakeModel):
        def new_cache(self, rows, capacity):  # type: ignore[no-untyped-def]
            raise MemoryError

    aligner = fake_aligner(soften)
    aligner._scheduler._model.__class__ = Full
    for chunks in ("an idiot", iter(["an idiot and", " so on and on and on and on"])):  # what is read ahead fails, too
        with pytest.raises(MemoryError):
            list(aligner.stream("q", chunks, on_doubt="keep" if streams else "passthrough", timeout=60))
    aligner.close()


def test_closing_fails_what_is_under_way_and_what_comes_later() -> None:
    model = GatedModel(lambda tokens: 5)
    scheduler = Scheduler(model, STOP)
    futures = [scheduler.submit(Generation([1], max_new_tokens=3000)) for _ in range(9)]
    assert model.begun.wait(timeout=60)
    threading.Timer(0.1, model.gate.set).start()
    scheduler.close()
    assert model.gate.is_set()  # it waited for the pass that was under way
    assert all(future.done() for future in futures)
    for future in futures:
        with pytest.raises(ClosedError):
            future.result(timeout=60)
    with pytest.raises(ClosedError):
        scheduler.submit(Generation([1]))


def test_an_aligner_that_is_forgotten_ends_its_thread() -> None:
    before = set(threading.enumerate())
    aligner = fake_aligner(soften)
    aligner.correct("q", "idiot")
    (thread,) = set(threading.enumerate()) - before
    del aligner
    gc.collect()
    thread.join(timeout=60)
    assert not thread.is_alive()


ENDS = {
    "the end": "",
    "sys.exit": "sys.exit(3)",
    "an interrupt": "raise KeyboardInterrupt",
    "an error": "raise ValueError",
    "close": "threading.Timer(0.1, model.gate.set).start(); aligner.close()",
    "forgotten": "del aligner, call; gc.collect()",
}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_python_ends_after_the_pass_that_is_under_way_and_never_in_it(end: str) -> None:
    program = f"""
import atexit, gc, sys, threading, time
from tests.unit.engine.test_scheduler import GatedModel, fake_aligner, soften

class Model(GatedModel):
    def append(self, *args):
        try:
            return super().append(*args)
        finally:
            time.sleep(0.05)
            print("pass over", flush=True)

aligner = fake_aligner(soften)
model = aligner._scheduler._model
model.__class__, model.gate, model.begun = Model, threading.Event(), threading.Event()
atexit.register(lambda: model.gate.set())
call = aligner._scheduler.submit(__import__("aligner_middleware.engine").engine.Generation([1], max_new_tokens=500))
assert model.begun.wait(60)
{end}
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False)
    assert ended.stdout == "pass over\n", ended.stderr
    assert ended.returncode == {"sys.exit(3)": 3, "raise KeyboardInterrupt": -2, "raise ValueError": 1}.get(end, 0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_corrects_and_ends_by_itself() -> None:
    program = """
import os, sys, threading
from tests.unit.engine.test_scheduler import fake_aligner, soften
aligner = fake_aligner(soften)
assert aligner.correct("q", "an idiot").changed
child = os.fork()
if not child:
    sys.exit(7 if aligner.correct("r", "an idiot").corrected == "r: an friend" else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert aligner.correct("q", "an idiot").changed
"""
    subprocess.run([sys.executable, "-c", program], timeout=300, check=True)


FORKS = {
    "what reads ahead": """
scheduler.prefill = block
ahead.feed("An idiot, and more that is enough to be read ahead.")
""",
    "a scheduler that is starting": """
module.refuse_green_threads = block
threading.Thread(target=aligner.correct, args=("q", "an idiot")).start()
""",
    "all schedulers, as one is starting": """
module._running = type("Blocking", (set,), {"add": block})()
threading.Thread(target=fake_aligner(soften).correct, args=("q", "an idiot")).start()
""",
    "the record of questions": """
question_record._runs.put = block
threading.Thread(target=question_record.start, args=(uuid.uuid4(), None)).start()
""",
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("hold", FORKS.values(), ids=FORKS)
def test_a_forked_process_finds_no_lock_held_by_a_thread_that_it_lacks(hold: str) -> None:
    program = f"""
import os, signal, threading, uuid
from langchain_core.language_models import GenericFakeChatModel
from aligner_middleware import AlignerRunnable, question_record
from aligner_middleware.engine import threads as module
from tests.unit.engine.test_scheduler import fake_aligner, soften

held, go_on = threading.Event(), threading.Event()
def block(*arguments):
    if os.getpid() == parent:
        held.set()
        assert go_on.wait(60)

parent = os.getpid()
aligner = fake_aligner(soften)
scheduler, ahead = aligner._scheduler, aligner.read_ahead("q")
{hold}
assert held.wait(60)
child = os.fork()
if not child:
    signal.alarm(30)
    vars(question_record._runs).pop("put", None)
    ahead.feed("An idiot")
    stream = aligner.stream("q", "an idiot", ahead=ahead)
    assert "".join(stream) == "q: an friend"
    chain = GenericFakeChatModel(messages=iter(["an idiot"])) | AlignerRunnable(aligner)
    os._exit(7 if chain.invoke("r").content == "r: an friend" else 1)
ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
go_on.set()
assert ended == 7, ended
"""
    subprocess.run([sys.executable, "-c", program], timeout=300, check=True)


def test_memory_for_keys_and_values_is_given_back_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aligner_middleware.engine.scheduler._IDLE", 0.01)
    made: list[weakref.ref[object]] = []

    class Seen(FakeModel):
        def new_cache(self, rows, capacity):  # type: ignore[no-untyped-def]
            new = super().new_cache(rows, capacity)
            made.append(weakref.ref(new))
            return new

    scheduler = Scheduler(Seen(rule), STOP)
    for _ in range(2):
        assert scheduler.submit(Generation([1, 2], max_new_tokens=4)).result(timeout=60).finish_reason
        while made[-1]() is not None:
            time.sleep(0.01)
    assert len(made) == 2
    scheduler.close()


def test_a_stream_that_is_dropped_frees_its_row() -> None:
    aligner = fake_aligner(lambda question, answer: answer.upper())
    stream = aligner.stream("q", "never the same, " * 20, on_doubt="keep")  # gives pieces as they are decided
    next(stream)
    stream.close()
    assert aligner.correct("q", "next").corrected == "NEXT"
    aligner.close()


CHUNKS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), min_size=1, max_size=12)


@given(CHUNKS)
@settings(max_examples=40)
def test_chunks_as_they_come_give_what_the_whole_gives(chunks: list[str]) -> None:
    with fake_aligner(soften) as aligner:
        assert "".join(aligner.stream("q", iter(chunks))) == aligner.correct("q", "".join(chunks)).corrected


def test_what_is_known_of_a_prompt_goes_through_before_the_rest_is() -> None:
    aligner = fake_aligner(lambda question, answer: answer)
    model = aligner.fake_model
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
        assert scheduler.submit(call).result(timeout=60).tokens == alone(call)
    late = Generation([1] * 1500 + [2, 2], max_new_tokens=9, prefill=prefills[0])
    assert scheduler.submit(late).result(timeout=60).tokens == alone(late)
    scheduler.close()


def test_a_prompt_that_is_given_up_before_its_bare_verdict_gets_no_row_back() -> None:
    model = GatedModel(lambda tokens: 5)
    scheduler = Scheduler(model, STOP)
    prefill = Prefill()
    verdict = VerdictRule(5, 6, 7)
    future = scheduler.submit(Generation([1] * 9, prefill=prefill, rule=verdict, verdict_only=True))
    other = scheduler.submit(Generation([2], max_new_tokens=1))
    assert model.begun.wait(timeout=60)
    scheduler.abandon(prefill)
    model.gate.set()
    for one in (future, other, scheduler.submit(Generation([3], max_new_tokens=1))):
        one.result(timeout=60)
    assert not scheduler._decoder.running
    scheduler.close()
