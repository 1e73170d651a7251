"""Very many corrections at once, with cancelled tasks, timeouts and dropped streams, on one event loop and on several.

    python benchmarks/load.py [--calls 500 5000] [--loops 1 4] [--real] [--limit 3600] [--out benchmarks/results]

Answers of three lengths are corrected at once: by `acorrect`, `astream` (whole answers, and chunks as they arrive), and by
`correct` and `stream` in threads. One call in ten is cancelled, one has a timeout, one drops its stream. The network is a
fake that takes no processor and little time, or with `--real` the default aligner. What has to hold:

- all calls end, and what is not given up is answered;
- no answer is another call's: each holds a number of its own;
- nothing is left afterwards: no sequence waits or runs, and none is held;
- of the calls of one length, none waits for its first pass longer than three times the median, in seconds or, since a busy
  machine stretches some of them, in rounds of passes;
- no other task of an event loop waits longer than 20 ms for work that the loop's own thread does, but for the garbage
  collector's rounds over thousands of tasks. What the machine does beside that shows in the longest wait by the clock.

A table and `load.json` come out. It ends with status 1 where something did not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import itertools
import json
import random
import re
import resource
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, cast
from unittest.mock import patch
from weakref import WeakKeyDictionary

sys.path.insert(0, str(Path(__file__).parents[1]))

from rich.console import Console
from rich.table import Table

from aligner_middleware import Aligner, Correction, CorrectionTimeoutError
from aligner_middleware.codec import Codec
from aligner_middleware.engine import Decoder, Generation
from aligner_middleware.engine.onnx_session import give_memory_back
from aligner_middleware.engine.scheduler import Scheduler
from tests.fakes import FakeModel, judging_aligner

Way = Literal["acorrect", "astream", "chunks", "cancelled", "timeout", "dropped", "correct", "stream"]
WAYS: tuple[Way, ...] = (
    *("acorrect",) * 3,
    *("astream", "chunks", "cancelled", "timeout", "dropped", "correct", "stream"),
)
LENGTHS = {"short": 1, "middle": 6, "long": 24}  # sentences, unless --sentences says otherwise
FIRST = 100_000  # number of the first call: an aligner's own sentences hold no such number
SENTENCE = "Turn left at mill {number}, then go on."
INSULT = " Hurry up, idiot {number}."
AT_ONCE, APART = 10, 0.005  # so many calls set out together, so many seconds after those before them
GIVEN_UP = 2.0  # seconds after which a call is cancelled or times out, at most
FREE_SECONDS, FREE_ROUNDS = 0.25, 20  # that anybody may wait
LONGEST_STALL = 0.02  # seconds


@dataclass(frozen=True)
class Call:
    """One correction: who asks, in which way, and when it is given up."""

    number: int
    way: Way
    length: str
    patience: float

    @property
    def question(self) -> str:
        """What is asked."""
        return f"How do I find mill {self.number}?"

    @property
    def answer(self) -> str:
        """What is answered: every third one is rude."""
        said = " ".join([SENTENCE] * LENGTHS[self.length]) + (INSULT if self.number % 3 == 0 else "")
        return said.format(number=self.number)


@dataclass
class Result:
    """What came of a run."""

    calls: int
    loops: int
    seconds: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    waits: dict[str, list[float]] = field(default_factory=lambda: {length: [] for length in LENGTHS})
    rounds: dict[str, list[int]] = field(default_factory=lambda: {length: [] for length in LENGTHS})
    mixed_up: list[str] = field(default_factory=list)
    stall: float = 0.0
    own_work: float = 0.0
    left_over: int = 0
    megabytes: dict[str, float] = field(default_factory=dict)

    @property
    def held(self) -> dict[str, bool]:
        """What had to hold, and whether it did."""
        fair = (
            _fair(self.waits[length], FREE_SECONDS) or _fair(self.rounds[length], FREE_ROUNDS) for length in self.waits
        )
        return {
            "all end": self.outcomes.total() == self.calls and not self.outcomes["not ended"],
            "none fails": not any(outcome.startswith("failed") for outcome in self.outcomes),
            "each gets its own": not self.outcomes["another's"],
            "nothing is left": self.left_over == 0,
            "waits are fair": all(fair),
            "the loop is free": self.own_work <= LONGEST_STALL,
        }


def _fair(waits: Sequence[float], free: float) -> bool:
    return max(waits) <= max(3 * statistics.median(waits), free)


class QuickModel(FakeModel):
    """A fake whose passes sleep, as native code computes without the interpreter, and that predicts only what is wanted."""

    def append(self, held: list[int], tokens: Sequence[int], wanted: int, capacity: int) -> Any:
        """Sleep for a little, and predict."""
        time.sleep(0.0001)
        held.extend(tokens[:-1])
        return super().append(held, tokens[-1:], 1, capacity)


def soften(question: str, answer: str) -> str:
    """Correct as the fake network does."""
    return re.sub(r" Hurry up, idiot \d+\.", "", answer)


def quick_aligner() -> Aligner:
    """An aligner with verdicts over the fake network."""
    aligner = judging_aligner(soften)
    aligner._model.__class__ = QuickModel
    return aligner


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--calls", type=int, nargs="+", default=[500, 5000])
    parser.add_argument("--loops", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--real", action="store_true", help="the default aligner")
    parser.add_argument("--sentences", type=int, nargs=3, default=[*LENGTHS.values()], help="of the three lengths")
    parser.add_argument("--limit", type=float, default=3600, help="seconds for a run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    LENGTHS.update(zip(LENGTHS, options.sentences, strict=True))
    make = Aligner.load if options.real else quick_aligner
    results: list[Result] = []
    for calls, loops in itertools.product(options.calls, options.loops):
        results.append(run(make, calls, loops, exact=not options.real, limit=options.limit, seed=options.seed))
        Console(width=120).print(as_table(results[-1:]))  # each when it is done: the next may take half an hour
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
            lines = [asdict(result) | {"outcomes": {**result.outcomes}, "held": result.held} for result in results]
            (options.out / "load.json").write_text(json.dumps(lines, indent=1) + "\n")
    return int(not all(all(result.held.values()) for result in results))


def run(
    make: Callable[[], Aligner], calls: int, loops: int, *, exact: bool = True, limit: float = 3600, seed: int = 0
) -> Result:
    """Make very many calls at once.

    Args:
        make: Makes the aligner.
        calls: How many.
        loops: On how many event loops, each in a thread of its own.
        exact: Whether the corrected texts are known.
        limit: Seconds for all of them.
        seed: Of what is given up when.
    """
    chance = random.Random(seed)
    planned = [
        Call(number, chance.choice(WAYS), chance.choice(list(LENGTHS)), chance.uniform(0.001, GIVEN_UP))
        for number in range(FIRST, FIRST + calls)
    ]
    result = Result(calls, loops)
    _Watching.result = result
    _Watching.begun.clear()
    with (
        patch("aligner_middleware.engine.scheduler.Decoder", _Watching),
        patch.object(Codec, "encode", _encode),
        make() as aligner,
    ):
        aligner.correct(planned[0].question, planned[0].answer)  # what is made at the first call
        before = _generations()
        result.megabytes["before"] = resident()
        start = time.perf_counter()
        caller = _Caller(aligner, exact, result)
        shares = [planned[share::loops] for share in range(loops)]
        threads = [threading.Thread(target=asyncio.run, args=(caller.all_of(share, limit),)) for share in shares]
        with _peak(result):
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        result.seconds = time.perf_counter() - start
        _Watching.begun.clear()
        aligner.correct(planned[0].question, planned[0].answer)  # those given up leave between passes
        result.left_over = _left_over(aligner)
    result.left_over += max(0, _generations() - before)
    give_memory_back()
    result.megabytes["after"] = resident()
    return result


class _Caller:
    """Makes calls, and notes what comes of each."""

    def __init__(self, aligner: Aligner, exact: bool, result: Result) -> None:
        self._aligner = aligner
        self._exact = exact
        self._result = result
        self._lock = threading.Lock()

    async def all_of(self, calls: Sequence[Call], limit: float) -> None:
        """Make calls from one event loop, and watch it."""
        watcher = asyncio.create_task(self._watch())
        tasks = []
        with ThreadPoolExecutor(32) as pool:
            for at, call in enumerate(calls):
                tasks.append(asyncio.create_task(self._noted(call, pool)))
                if at % AT_ONCE == AT_ONCE - 1:
                    await asyncio.sleep(APART)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(limit):
                    for task in tasks:
                        await asyncio.wait([task])
            watcher.cancel()
            late = [task for task in tasks if not task.done()]
            for task in late:
                task.cancel()
        with self._lock:
            self._result.outcomes.update(task.result() for task in tasks if task not in late)
            self._result.outcomes["not ended"] += len(late)

    async def _noted(self, call: Call, pool: ThreadPoolExecutor) -> str:
        try:
            if call.way in ("correct", "stream"):
                work = self._corrected if call.way == "correct" else self._streamed
                return await asyncio.get_running_loop().run_in_executor(pool, work, call)
            self._begin(call)
            outcome: str = await getattr(self, f"_{call.way}")(call)
            return outcome
        except CorrectionTimeoutError:
            return "timed out"
        except Exception as exc:
            return f"failed: {type(exc).__name__}: {exc}"

    async def _acorrect(self, call: Call) -> str:
        return self._outcome(call, await self._aligner.acorrect(call.question, call.answer))

    async def _timeout(self, call: Call) -> str:
        return self._outcome(call, await self._aligner.acorrect(call.question, call.answer, timeout=call.patience))

    async def _cancelled(self, call: Call) -> str:
        task = asyncio.create_task(self._acorrect(call))
        await asyncio.wait([task], timeout=call.patience)
        task.cancel()
        try:
            return await task
        except asyncio.CancelledError:
            return "cancelled"

    async def _astream(self, call: Call) -> str:
        pieces = [piece async for piece in self._aligner.astream(call.question, call.answer)]
        return self._outcome(call, "".join(pieces))

    async def _chunks(self, call: Call) -> str:
        pieces = [piece async for piece in self._aligner.astream(call.question, _arriving(call.answer))]
        return self._outcome(call, "".join(pieces))

    async def _dropped(self, call: Call) -> str:
        stream = self._aligner.astream(call.question, _arriving(call.answer))
        first = asyncio.ensure_future(anext(stream))
        await asyncio.wait([first], timeout=call.patience)
        first.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await first
        await cast(AsyncGenerator[str, None], stream).aclose()
        return "dropped"

    def _begin(self, call: Call) -> None:
        _Watching.begun[call.question] = (call.length, time.perf_counter(), _Watching.rounds)

    def _corrected(self, call: Call) -> str:
        self._begin(call)
        return self._outcome(call, self._aligner.correct(call.question, call.answer))

    def _streamed(self, call: Call) -> str:
        self._begin(call)
        return self._outcome(call, "".join(self._aligner.stream(call.question, call.answer)))

    def _outcome(self, call: Call, found: Correction | str) -> str:
        """Say whether an answer is the call's own: every number in it is."""
        text = found if isinstance(found, str) else found.corrected
        own = (
            set(re.findall(r"\d{6,}", text)) <= {str(call.number)}
            if not self._exact
            else text == soften("", call.answer)
        )
        own = own and (isinstance(found, str) or (found.question, found.original) == (call.question, call.answer))
        if not own:
            self._result.mixed_up.append(f"{call.number}: {text}")
        return "answered" if own else "another's"

    async def _watch(self) -> None:
        """Note how long other tasks have to wait, by the clock and for the loop's own work."""
        collecting, began = 0.0, 0.0  # seconds that the garbage collector took in this thread
        own_thread = threading.get_ident()

        def collected(phase: str, info: dict[str, int]) -> None:
            nonlocal collecting, began
            if threading.get_ident() == own_thread:
                if phase == "start":
                    began = time.thread_time()
                else:
                    collecting += time.thread_time() - began

        gc.callbacks.append(collected)
        try:
            while True:
                clock, work = time.perf_counter(), time.thread_time() - collecting
                await asyncio.sleep(0.001)
                stall, own = time.perf_counter() - clock - 0.001, time.thread_time() - collecting - work
                self._result.stall = max(self._result.stall, stall)
                self._result.own_work = max(self._result.own_work, own)
        finally:
            gc.callbacks.remove(collected)


async def _arriving(answer: str) -> AsyncIterator[str]:
    for at in range(0, len(answer), 60):
        yield answer[at : at + 60]
        await asyncio.sleep(0.002)


class _Watching(Decoder):
    """Notes how long sequences wait until they are through their first pass."""

    result: Result
    rounds = 0
    # Length of the answer, seconds and round of each call when it was made, by its question and by its sequence:
    begun: ClassVar[dict[str, tuple[str, float, int]]] = {}
    calls: ClassVar[WeakKeyDictionary[Generation, tuple[str, float, int]]] = WeakKeyDictionary()

    def step(self) -> list[Generation]:
        waiting = [held for held in self.running if isinstance(held, Generation) and not held.started]
        moved = super().step()
        now = time.perf_counter()
        _Watching.rounds += 1
        for generation in waiting:
            if generation.started and generation in self.calls:
                length, seconds, rounds = self.calls[generation]
                self.result.waits[length].append(now - seconds)
                self.result.rounds[length].append(self.rounds - rounds)
        return moved


_its_encode = Codec.encode


def _encode(codec: Codec, question: str, *args: Any, **options: Any) -> Any:
    call = _its_encode(codec, question, *args, **options)
    if question in _Watching.begun and call.generation is not None:
        _Watching.calls[call.generation] = _Watching.begun[question]
    return call


def _left_over(aligner: Aligner) -> int:
    """Count what the engine still has to do, some rounds after the last call."""
    scheduler = aligner._scheduler
    assert isinstance(scheduler, Scheduler)
    for _ in range(100):
        left = len(scheduler._calls) + len(scheduler._waiting) + len(scheduler._prefills)
        left += len(scheduler._decoder.running)
        if not left:
            break
        time.sleep(0.05)
    return left


def _generations() -> int:
    """Count the sequences that are still in memory."""
    gc.collect()
    return sum(isinstance(one, Generation) for one in gc.get_objects())


def resident() -> float:
    """Memory that this process holds now, in MB; 0 where that is not told."""
    path = Path("/proc/self/statm")
    return int(path.read_text().split()[1]) * resource.getpagesize() / 1e6 if path.exists() else 0.0


@contextlib.contextmanager
def _peak(result: Result) -> Iterator[None]:
    """Note the most memory that is held meanwhile."""
    over = threading.Event()
    seen = [resident()]

    def look() -> None:
        while not over.wait(0.1):
            seen.append(resident())

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        result.megabytes["at most"] = max(seen)


def as_table(results: Sequence[Result]) -> Table:
    """Show runs side by side."""
    table = Table("", *(f"{result.calls} calls, {result.loops} loops" for result in results))
    table.add_row("seconds", *(f"{result.seconds:.1f}" for result in results))
    for outcome in sorted({outcome for result in results for outcome in result.outcomes}):
        table.add_row(outcome, *(str(result.outcomes[outcome]) for result in results))
    for length in LENGTHS:
        waits = [result.waits[length] or [0.0] for result in results]
        cells = (f"{max(wait):.2f} / {statistics.median(wait):.2f}" for wait in waits)
        table.add_row(f"wait of {length} answers, s: longest / median", *cells)
        rounds = [result.rounds[length] or [0] for result in results]
        cells = (f"{max(wait)} / {statistics.median(wait):.0f}" for wait in rounds)
        table.add_row("    in rounds", *cells)
    stalls = (f"{1000 * result.own_work:.1f} / {1000 * result.stall:.1f}" for result in results)
    table.add_row("longest stall of a loop, ms: its own work / by the clock", *stalls)
    for when in ("before", "at most", "after"):
        table.add_row(f"memory {when}, MB", *(f"{result.megabytes[when]:.0f}" for result in results))
    for name in results[0].held:
        table.add_row(name, *("yes" if result.held[name] else "[bold red]no" for result in results))
    return table


if __name__ == "__main__":
    sys.exit(main())
