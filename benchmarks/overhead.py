"""What the LangChain side costs: a call beside one without an aligner, and the event loop while corrections run.

    python benchmarks/overhead.py [--out benchmarks/results]

- overhead: milliseconds a call takes with an aligner that does nothing, minus those of the same call without it: a chat
  model with `| AlignerRunnable()` and without, wrapped and bare, an agent with the middleware and without; and beside them
  a `RunnableLambda` that does nothing. Medians of rounds in turn, so that all see the same machine;
- event loop: the longest time, and the 99th percentile, that another task had to wait while the default aligner corrected
  held-out rows, 32 under way at once that came 5 ms apart, in each way of calling it, beside the same calls without an
  aligner. A task that only sleeps for a millisecond at a time measures it. What was loaded before is kept from the garbage
  collector (`gc.freeze`), whose full rounds over it stop all of Python for some 50 ms.

A table and `overhead.json` come out.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterable, Sequence
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

from langchain.agents import create_agent
from langchain.agents.middleware import InputAgentState
from langchain_core.language_models import BaseChatModel, GenericFakeChatModel, LanguageModelInput
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.runnables import RunnableLambda
from latency import machine
from rich.console import Console
from rich.table import Table

from aligner_middleware import Aligner, AlignerMiddleware, AlignerRunnable, Correction, Usage
from aligner_middleware.locations import DEFAULT_FOLDER
from aligner_middleware.steps import Step
from aligner_middleware.streaming import CorrectionStream

ROUNDS = 300
AT_ONCE = 32
Pair = tuple[str, BaseChatModel]  # a question, and a model that answers it


class NoOp(Aligner):
    """Gives every answer back at once."""

    def correct_batch(self, pairs: Iterable[tuple[str, str]], **options: Any) -> list[Any]:
        """Keep them all."""
        return [Correction(question, answer, answer, "stop", Usage(passes=1)) for question, answer in pairs]

    async def acorrect(self, question: str, answer: str, **options: Any) -> Correction:
        """Keep it."""
        return Correction(question, answer, answer, "stop", Usage(passes=1))

    def stream(self, question: str, answer: Any, **options: Any) -> CorrectionStream:
        """Keep it."""
        return CorrectionStream(Kept(Correction(question, answer, answer, "stop", Usage(passes=1))))

    astream = stream


class Kept:
    """The flow of a stream that gives a correction at once."""

    def __init__(self, correction: Correction) -> None:
        self.correction: Correction | None = correction
        self._text = correction.corrected

    def steps(self) -> Generator[str | Step, None, None]:
        """See `Flow`."""
        yield self._text

    def free(self) -> None:
        """See `Flow`."""

    async def aclose(self) -> None:
        """See `Flow`."""


class Says(BaseChatModel):
    """A chat model that takes no time."""

    answer: str = "The capital of Japan is Tokyo."

    @property
    def _llm_type(self) -> str:
        return "says"

    def _generate(self, messages: Any, stop: Any = None, run_manager: Any = None, **kwargs: Any) -> ChatResult:
        return ChatResult(generations=[ChatGeneration(message=AIMessage(self.answer))])

    async def _agenerate(self, *args: Any, **kwargs: Any) -> ChatResult:
        return self._generate(*args, **kwargs)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    aligner = Aligner.load()
    found: dict[str, Any] = {"overhead, ms a call": overhead(no_op(aligner))}
    found["event loop, ms"] = asyncio.run(event_loop(aligner))
    for title, rows in found.items():
        names = list(next(iter(rows.values())))
        table = Table(title, *names)
        for case, row in rows.items():
            table.add_row(case, *(f"{row[name]:.3g}" if name in row else "" for name in names))
        Console(width=110).print(table)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "overhead.json").write_text(json.dumps({"machine": machine(5), "results": found}, indent=1) + "\n")


def no_op(aligner: Aligner) -> NoOp:
    """Give the aligner's parts to one that does not use them."""
    return NoOp(aligner._model, aligner._codec.tokenizer, aligner._codec.template, [2], name="no-op")


def overhead(aligner: Aligner) -> dict[str, dict[str, float]]:
    """Time calls with and without an aligner, in turn."""
    llm, align = Says(), AlignerRunnable(aligner)
    within, beside, wrapped = llm | align, llm | RunnableLambda(lambda message: message), align.wrap(llm)
    plain, agent = create_agent(llm), create_agent(llm, middleware=[AlignerMiddleware(align)])
    state: InputAgentState = {"messages": [HumanMessage("q")]}
    batch: list[LanguageModelInput] = ["q"] * 50
    loop = asyncio.new_event_loop()
    cases: dict[str, tuple[list[Callable[[], Any]], int]] = {
        "invoke": ([lambda: llm.invoke("q"), lambda: beside.invoke("q"), lambda: within.invoke("q")], 1),
        "stream": (
            [lambda: list(llm.stream("q")), lambda: list(beside.stream("q")), lambda: list(within.stream("q"))],
            1,
        ),
        "ainvoke": (
            [
                lambda: loop.run_until_complete(llm.ainvoke("q")),
                lambda: loop.run_until_complete(beside.ainvoke("q")),
                lambda: loop.run_until_complete(within.ainvoke("q")),
            ],
            1,
        ),
        "batch of 50": ([lambda: llm.batch(batch), lambda: beside.batch(batch), lambda: within.batch(batch)], 50),
        "wrapped model, invoke": ([lambda: llm.invoke("q"), lambda: wrapped.invoke("q")], 1),
        "agent, invoke": ([lambda: plain.invoke(state), lambda: agent.invoke(state)], 1),
    }
    found = {}
    for name, (ways, calls) in cases.items():
        times: list[list[float]] = [[] for _ in ways]
        for _ in range(ROUNDS // (10 if calls > 1 else 1)):
            for way, taken in zip(ways, times, strict=True):
                start = time.perf_counter()
                way()
                taken.append((time.perf_counter() - start) * 1000 / calls)
        without, *others = [statistics.median(taken) for taken in times]
        found[name] = {
            "without": without,
            "aligner": others[-1] - without,
        } | ({"RunnableLambda": others[0] - without} if len(others) > 1 else {})
    loop.close()
    return found


async def event_loop(aligner: Aligner) -> dict[str, dict[str, float]]:
    """Measure how long the loop is held up, in each way of calling an aligner."""
    rows = [json.loads(line) for line in (DEFAULT_FOLDER / "held_out.jsonl").read_text("utf-8").splitlines()][:AT_ONCE]
    align = AlignerRunnable(aligner)
    pairs: list[Pair] = [(row["question"], model(row["answer"])) for row in rows]
    long = "Rain fell on the quiet town, and the river rose a little. " * 120  # about 1,700 tokens

    async def drain(stream: AsyncIterator[Any]) -> None:
        async for _ in stream:
            pass

    def agent(question: str, llm: BaseChatModel) -> Awaitable[Any]:
        return create_agent(llm, middleware=[AlignerMiddleware(align)]).ainvoke({"messages": [HumanMessage(question)]})

    same = RunnableLambda(lambda message: message)
    gc.collect()
    gc.freeze()
    ways: dict[str, list[Callable[[], Awaitable[Any]]]] = {
        "nothing": [lambda: asyncio.sleep(2)],
        "without an aligner, ainvoke": bind(lambda q, m: (m | same).ainvoke(q), pairs),
        "without an aligner, astream": bind(lambda q, m: drain((m | same).astream(q)), pairs),
        "llm | aligner, ainvoke": bind(lambda q, m: (m | align).ainvoke(q), pairs),
        "llm | aligner, astream": bind(lambda q, m: drain((m | align).astream(q)), pairs),
        "wrapped model, ainvoke": bind(lambda q, m: align.wrap(m).ainvoke(q), pairs),
        "wrapped model, astream": bind(lambda q, m: drain(align.wrap(m).astream(q)), pairs),
        "agent, ainvoke": bind(agent, pairs[:8]),
        "one answer of 1,700 tokens, ainvoke": [lambda: (model(long) | align).ainvoke("Write about rain.")],
    }
    return {name: await watched(way) for name, way in ways.items()}


def bind(
    call: Callable[[str, BaseChatModel], Awaitable[Any]], pairs: Sequence[Pair]
) -> list[Callable[[], Awaitable[Any]]]:
    """Make one call for each question and its model, to be begun later."""
    return [partial(call, question, llm) for question, llm in pairs]


def model(answer: str) -> BaseChatModel:
    """A chat model that gives this answer, word by word when it streams."""
    return GenericFakeChatModel(messages=repeat(AIMessage(answer)))


async def watched(calls: list[Callable[[], Awaitable[Any]]]) -> dict[str, float]:
    """Run calls at once, and measure how much longer than a millisecond another task's sleeps of one take."""
    waits: list[float] = []

    async def watch() -> None:
        while True:
            start = time.perf_counter()
            await asyncio.sleep(0.001)
            waits.append((time.perf_counter() - start - 0.001) * 1000)

    for call in calls[:1]:
        await call()  # what is made at the first call
    watchdog = asyncio.create_task(watch())
    under_way = []
    for call in calls:
        under_way.append(asyncio.ensure_future(call()))
        await asyncio.sleep(0.005)
    await asyncio.gather(*under_way)
    watchdog.cancel()
    return {"longest": max(waits), "99th percentile": statistics.quantiles(waits, n=100)[98], "samples": len(waits)}


if __name__ == "__main__":
    main()
