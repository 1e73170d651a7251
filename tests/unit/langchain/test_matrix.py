"""Every way of calling a runnable, over every shape of chain: the right question every time.

The upstream model answers `bad(question)` and the aligner writes the question that it was told into its correction, so
that an answer that met another's question shows.
"""

from __future__ import annotations

import asyncio
import gc
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from langchain_core.language_models import FakeListLLM
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import Runnable, RunnableBranch, RunnableLambda, RunnableParallel, RunnablePassthrough

from aligner_middleware import AlignerRunnable, question_record
from tests.chat_models import Scripted, answering
from tests.fakes import InstantAligner

ALIGN = AlignerRunnable(InstantAligner(lambda question, answer: answer.replace("bad", f"good for {question}")))


def good(question: str) -> str:
    return f"good for {question}({question})"


class Flaky(Scripted):
    """Fails every other time; not in a stream, which LangChain does not retry."""

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        if random.random() < 0.5:
            raise ConnectionError("busy")
        return super()._generate(*args, **kwargs)


def flaky() -> Runnable[Any, Any]:
    return Flaky(reply=answering().reply)


def down() -> Runnable[Any, Any]:
    def reply(messages: list[BaseMessage]) -> AIMessage:
        raise ConnectionError("down")

    return Scripted(reply=reply)


llm = answering()
chain = llm | ALIGN
other: Runnable[Any, Any] = RunnableLambda(lambda question: f"other {question}") | llm
REMEMBERED = 1024  # questions, by the record of all chains
SHAPES: dict[str, Runnable[Any, Any]] = {
    "chain": chain,
    "prompt and parser": ChatPromptTemplate.from_messages([("human", "{question}")]) | llm | ALIGN | StrOutputParser(),
    "parsed text": llm | StrOutputParser() | ALIGN,
    "text model": RunnableLambda(lambda question: FakeListLLM(responses=[f"bad({question})"])) | ALIGN,
    "nested chain": RunnablePassthrough()
    | (RunnablePassthrough() | (llm | StrOutputParser()))
    | (ALIGN | StrOutputParser()),
    "inside a function": RunnableLambda(lambda question: chain.invoke(question)),
    "parallel branches": RunnableParallel(one=chain, two=other | ALIGN) | RunnableLambda(lambda both: _both(both)),
    "two models, one aligner": llm | RunnableLambda(lambda m: m.text.removeprefix("bad(")[:-1]) | llm | ALIGN,
    "branch": RunnableBranch((lambda question: len(question) % 2 == 0, llm), llm) | ALIGN,
    "retry": flaky().with_retry(stop_after_attempt=30, wait_exponential_jitter=False) | ALIGN,
    "retry of the chain": chain.with_retry(),
    "fallback": down().with_fallbacks([llm]) | ALIGN,
    "fallback of the chain": (down() | ALIGN).with_fallbacks([chain]),
    "question and answer": RunnableParallel(question=RunnablePassthrough(), answer=llm)
    | ALIGN
    | RunnableLambda(lambda row: row["answer"]),
    "wrapped model": ALIGN.wrap(llm),
    "wrapped model in a chain": ALIGN.wrap(llm) | StrOutputParser(),
}


def _both(both: dict[str, Any]) -> str:
    one, two = text(both["one"]), text(both["two"])
    question = one.partition("(")[2][:-1]
    assert two == good(f"other {question}")
    return one


def text(value: Any) -> str:
    return value if isinstance(value, str) else str(value.text)


def joined(parts: list[Any]) -> str:
    return "".join(text(part) for part in parts)


def by_completion(runnable: Runnable[Any, Any], inputs: list[Any]) -> list[Any]:
    return [answer for _, answer in sorted(runnable.batch_as_completed(inputs), key=lambda pair: pair[0])]


async def aby_completion(runnable: Runnable[Any, Any], inputs: list[Any]) -> list[Any]:
    found = [pair async for pair in runnable.abatch_as_completed(inputs)]
    return [answer for _, answer in sorted(found, key=lambda pair: pair[0])]


async def acollect(parts: Any) -> list[Any]:
    return [part async for part in parts]


async def one_by_one(inputs: list[Any]) -> Any:
    for value in inputs:
        yield value


async def by_events(runnable: Runnable[Any, Any], value: Any) -> Any:
    events = [event async for event in runnable.astream_events(value, version="v2")]
    roots = [event for event in events if not event["parent_ids"] and event["event"].endswith("_end")]
    return roots[-1]["data"]["output"]


# Given a runnable and inputs, answers in their order; the asynchronous ones as coroutines.
METHODS: dict[str, Callable[[Runnable[Any, Any], list[Any]], Any]] = {
    "invoke": lambda r, inputs: [r.invoke(value) for value in inputs],
    "batch": lambda r, inputs: r.batch(inputs),
    "batch_as_completed": by_completion,
    "stream": lambda r, inputs: [joined(list(r.stream(value))) for value in inputs],
    "transform": lambda r, inputs: [joined(list(r.transform(iter([value])))) for value in inputs],
}
ASYNC_METHODS: dict[str, Callable[[Runnable[Any, Any], list[Any]], Any]] = {
    "ainvoke": lambda r, inputs: asyncio.gather(*(r.ainvoke(value) for value in inputs)),
    "abatch": lambda r, inputs: r.abatch(inputs),
    "abatch_as_completed": aby_completion,
    "astream": lambda r, inputs: _texts(acollect(r.astream(value)) for value in inputs),
    "atransform": lambda r, inputs: _texts(acollect(r.atransform(one_by_one([value]))) for value in inputs),
    "astream_events": lambda r, inputs: asyncio.gather(*(by_events(r, value) for value in inputs)),
}


async def _texts(streams: Any) -> list[str]:
    return [joined(parts) for parts in await asyncio.gather(*streams)]


def asked(shape: str, question: str) -> Any:
    return {"question": question} if shape == "prompt and parser" else question


def call(shape: str, method: str, questions: list[str], run: Callable[[Any], Any] = asyncio.run) -> list[str]:
    inputs = [asked(shape, question) for question in questions]
    if method in METHODS:
        return [text(answer) for answer in METHODS[method](SHAPES[shape], inputs)]

    async def main() -> list[Any]:
        return list(await ASYNC_METHODS[method](SHAPES[shape], inputs))

    return [text(answer) for answer in run(main())]


@pytest.mark.parametrize("method", [*METHODS, *ASYNC_METHODS])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_right_question(shape: str, method: str) -> None:
    questions = [f"q{number}" for number in range(4)]
    assert call(shape, method, questions) == [good(question) for question in questions]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_batch_of_twenty_in_threads_and_twenty_tasks(shape: str) -> None:
    questions = [f"q{number}" for number in range(20)]
    wanted = [good(question) for question in questions]
    runnable, inputs = SHAPES[shape], [asked(shape, question) for question in questions]
    assert [text(answer) for answer in runnable.batch(inputs, {"max_concurrency": 20})] == wanted
    with ThreadPoolExecutor(20) as pool:
        assert [text(answer) for answer in pool.map(runnable.invoke, inputs)] == wanted
        assert [joined(parts) for parts in pool.map(lambda value: list(runnable.stream(value)), inputs)] == wanted

    async def tasks() -> tuple[list[Any], list[str]]:
        answers = await asyncio.gather(*(runnable.ainvoke(value) for value in inputs))
        return list(answers), await _texts(acollect(runnable.astream(value)) for value in inputs)

    answers, streamed = asyncio.run(tasks())
    assert [text(answer) for answer in answers] == wanted
    assert streamed == wanted


def kept_objects() -> int:
    """Objects of this package and messages of LangChain's that are alive, whatever else the process holds."""
    gc.collect()
    modules = (str(type(one).__module__) for one in gc.get_objects())
    return sum(module.startswith(("aligner_middleware.", "langchain_core.messages.")) for module in modules)


@pytest.mark.parametrize("calls", [400, pytest.param(8000, marks=pytest.mark.slow)])
def test_many_mixed_calls_have_no_mix_up_and_nothing_of_them_is_kept(calls: int) -> None:
    rng = random.Random(0)
    jobs = [(rng.choice(list(SHAPES)), rng.choice([*METHODS, *ASYNC_METHODS]), f"q{n}") for n in range(REMEMBERED + calls)]

    def mix_ups(part: list[tuple[str, str, str]]) -> int:
        with asyncio.Runner() as loop:
            return sum(call(shape, method, [q], loop.run) != [good(q)] for shape, method, q in part)

    def run(part: list[tuple[str, str, str]]) -> int:
        with ThreadPoolExecutor(8) as pool:
            return sum(pool.map(mix_ups, (part[start::8] for start in range(8))))

    question_record.clear()
    assert run(jobs[:REMEMBERED]) == 0  # what is loaded once, and a full record
    before = kept_objects()
    assert run(jobs[REMEMBERED:]) == 0
    assert kept_objects() - before < calls / 4
    assert question_record.running == 0
    assert question_record.remembered <= REMEMBERED
