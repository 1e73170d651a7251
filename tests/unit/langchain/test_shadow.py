"""Shadow mode: nothing that anybody sees changes and nothing is raised; all that would have become of it is reported."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from itertools import chain as flat
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import ModelFallbackMiddleware
from langchain_core.callbacks import BaseCallbackHandler, get_usage_metadata_callback
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, HumanMessage, ToolMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.outputs import ChatGenerationChunk
from langchain_core.runnables import Runnable, RunnableGenerator, RunnableLambda, RunnableParallel, RunnablePassthrough
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph
from typer.testing import CliRunner

from aligner_middleware import (
    AlignedChatModel,
    Aligner,
    AlignerMiddleware,
    AlignerRunnable,
    Correction,
    question_record,
)
from aligner_middleware.cli import app as cli
from tests.chat_models import USAGE, Scripted, answering, saying
from tests.fakes import FakeModel, InstantAligner, collected, fake_aligner, joined, judging_aligner


def correct(question: str, answer: str) -> str:
    """Correct `bad` to `good`; and `bad` that is `odd` to letters of another script, which a safeguard objects to."""
    return answer.replace("bad", "плохо" if "odd" in answer else "good")


ALIGNER = judging_aligner(correct)


class Failing(InstantAligner):
    def _made(self, question: str, answer: str) -> Correction:
        raise RuntimeError("out of order")


class Slow(FakeModel):
    def append(self, *args: Any) -> Any:
        time.sleep(0.05)
        return super().append(*args)


def closed() -> Any:
    aligner = judging_aligner(correct)
    aligner.close()
    return aligner


def slow() -> Any:
    aligner = judging_aligner(correct)
    aligner.fake_model.__class__ = Slow
    return aligner


def broken(*args: Any) -> Any:
    raise KeyError("oops")


def shadow(aligner: Any = ALIGNER, **options: Any) -> AlignerRunnable:
    question_record.clear()
    return AlignerRunnable(aligner, mode="shadow", **options)


def wrap(llm: Any, aligner: Any = ALIGNER, **options: Any) -> Any:
    return shadow(aligner, **options).wrap(llm)


# What would otherwise be changed, replaced or raised, and what the report says of it.
TROUBLES: dict[str, tuple[Callable[[], dict[str, Any]], dict[str, Any]]] = {
    "a correction": (dict, {"would_change": True, "score": pytest.approx(1)}),
    "a failing aligner": (lambda: {"aligner": Failing(correct)}, {"reason": "RuntimeError: out of order"}),
    "a closed aligner": (lambda: {"aligner": closed()}, {"reason": "ClosedError: this aligner was closed"}),
    "a replacement": (
        lambda: {"aligner": Failing(correct), "fallback": "Sorry."},
        {"reason": "RuntimeError: out of order"},
    ),
    "no question": (
        lambda: {"question": lambda value: None},
        {"reason": "question not known: the function question= returned None"},
    ),
    "a failing question": (lambda: {"question": broken}, {"reason": "KeyError: 'oops'"}),
    "a blank question": (lambda: {"question": " "}, {}),
    "a failing condition": (lambda: {"when": broken}, {"reason": "KeyError: 'oops'"}),
    "a condition": (lambda: {"when": lambda question, answer: False}, {"reason": "when"}),
    "a listener that fails": (lambda: {"on_correction": broken}, {"would_change": True}),
    "a long answer": (lambda: {"max_answer_tokens": 2}, {}),
    "too little time": (lambda: {"aligner": slow(), "timeout": 0.01}, {}),
}


def options_of(trouble: str) -> dict[str, Any]:
    return {"question": "q", **TROUBLES[trouble][0]()}


def reports(value: Any) -> list[dict[str, Any]]:
    """Find the reports in what came out."""
    if isinstance(value, BaseMessage):
        return [value.response_metadata["aligner"]] if "aligner" in value.response_metadata else []
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [report for one in inner for report in reports(one)]


def seen(value: Any) -> Any:
    """All of a value but the reports."""
    if isinstance(value, BaseMessage):
        rest = {name: data for name, data in value.response_metadata.items() if name != "aligner"}
        return value.model_copy(update={"response_metadata": rest})
    if isinstance(value, dict):
        return {name: seen(one) for name, one in value.items()}
    return [seen(one) for one in value] if isinstance(value, list) else value


async def one_by_one(values: list[Any]) -> AsyncIterator[Any]:
    for value in values:
        yield value


CALLS: dict[str, Callable[[Runnable[Any, Any], Any], Any]] = {
    "invoke": lambda r, value: r.invoke(value),
    "batch": lambda r, value: r.batch([value, value])[1],
    "stream": lambda r, value: joined(list(r.stream(value))),
    "transform": lambda r, value: joined(list(r.transform(iter([value])))),
    "ainvoke": lambda r, value: asyncio.run(r.ainvoke(value)),
    "abatch": lambda r, value: asyncio.run(r.abatch([value, value]))[1],
    "astream": lambda r, value: joined(asyncio.run(collected(r.astream(value)))),
    "atransform": lambda r, value: joined(asyncio.run(collected(r.atransform(one_by_one([value]))))),
}
STREAMS: dict[str, Callable[[Runnable[Any, Any], Any], list[Any]]] = {
    "stream": lambda r, value: list(r.stream(value)),
    "astream": lambda r, value: asyncio.run(collected(r.astream(value))),
}
VALUES: list[Any] = [
    "bad",
    AIMessage("bad", id="7", tool_calls=[{"name": "f", "args": {}, "id": "1"}], usage_metadata=USAGE),
    AIMessageChunk(content="bad", id="7", usage_metadata=USAGE, chunk_position="last"),
    AIMessage([{"type": "reasoning", "reasoning": "hm"}, {"type": "text", "text": "bad"}]),
    {"question": "q", "answer": "bad", "more": 1},
    {"question": "q", "answer": AIMessage("bad", id="7"), "more": 1},
    {"messages": [HumanMessage("q"), AIMessage("bad", id="7")], "more": 1},
    {"model": {"messages": [AIMessage("bad", id="7")]}},
]


class Ear(BaseCallbackHandler):
    """Hears the tokens and the events."""

    def __init__(self) -> None:
        self.reports: list[dict[str, Any]] = []
        self.tokens: list[Any] = []

    def on_custom_event(self, name: str, data: Any, **kwargs: Any) -> None:
        self.reports.append({"name": name, **data})

    def on_llm_new_token(self, token: Any, **kwargs: Any) -> None:
        self.tokens.append(token)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("trouble", TROUBLES)
def test_every_value_goes_on_as_it_came_and_whatever_happens_is_reported(trouble: str, call: str) -> None:
    options, wanted = options_of(trouble), TROUBLES[trouble][1]
    for value in VALUES:
        ear = Ear()
        result = CALLS[call](shadow(**options).with_config(callbacks=[ear]), value)
        assert type(result) is type(value)
        assert seen(result) == seen(value)
        event = ear.reports[-1]
        told = reports(result)
        assert len(told) == ("AIMessage" in repr(value))
        for report in told:
            assert {"name": "aligner_correction", **report} in ear.reports
        if not (isinstance(value, dict) and trouble in ("no question", "a failing question")):  # some dicts tell it
            assert event == {**event, **wanted}
        assert event == {**event, "mode": "shadow", "aligned": False, "changed": False}
        assert ("would_change" in event) != ("reason" in event)


@pytest.mark.parametrize("call", CALLS)
def test_what_is_no_answer_passes_and_is_logged(call: str, caplog: pytest.LogCaptureFixture) -> None:
    assert CALLS[call](shadow(question="q"), 42) == 42
    assert "not int" in caplog.text
    for empty in ("", " ", AIMessage("", tool_calls=[{"name": "f", "args": {}, "id": "1"}])):
        assert CALLS[call](shadow(question="q"), empty) == empty


def test_what_cannot_be_added_up_passes_piece_by_piece(caplog: pytest.LogCaptureFixture) -> None:
    pieces: list[Any] = ["bad", 1, None, AIMessageChunk(content="x")]
    assert list(shadow(question="q").transform(iter(pieces))) == pieces
    assert asyncio.run(collected(shadow(question="q").atransform(one_by_one(pieces)))) == pieces
    assert "was not aligned" in caplog.text


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(("on_doubt", "would_change"), [("passthrough", False), ("raise", False), ("keep", True)])
@pytest.mark.parametrize("wrapped", [False, True])
def test_the_report_says_what_would_have_become_of_a_doubtful_correction(
    call: str, on_doubt: str, would_change: bool, wrapped: bool
) -> None:
    told: list[Correction] = []
    align = shadow(on_doubt=on_doubt, on_correction=told.append)
    model = saying("bad odd")
    result = CALLS[call](align.wrap(model) if wrapped else model | align, "q")
    assert result.content == "bad odd"
    (report,) = reports(result)
    wanted = {"would_change": would_change, "doubts": ["script"], "proposed": "плохо odd", "verdict": "edit"}
    assert report == {**report, **wanted}
    assert {(one.doubts, one.changed) for one in told} == {(("script",), would_change)}


def test_what_is_kept_has_nothing_proposed() -> None:
    (report,) = reports(shadow(question="q").invoke(AIMessage("fine")))
    assert (report["would_change"], report["verdict"]) == (False, "keep")
    assert "proposed" not in report


@pytest.mark.parametrize("call", CALLS)
def test_pieces_of_a_long_answer_are_reported_as_one(call: str) -> None:
    answer = "fine here.\n\nbad one.\n\nbad odd.\n"
    align = shadow(question="q", max_answer_tokens=14, on_long_answer="piecewise")
    result = CALLS[call](align, AIMessage(answer))
    assert result.content == answer
    (report,) = reports(result)
    wanted = {"would_change": True, "verdict": "edit", "doubts": ["script"], "score": pytest.approx(1)}
    assert report == {**report, **wanted, "proposed": "fine here.\n\ngood one.\n\nплохо odd.\n"}


# --- streams ------------------------------------------------------------------------------------------


def without_run(chunks: list[Any]) -> list[Any]:
    """Chunks without what differs from one run to the next."""
    return [chunk.model_copy(update={"id": chunk.id and chunk.id[:8]}) for chunk in chunks]


CALL = {"name": "f", "args": {"a": 1}, "id": "1", "type": "tool_call"}


class Unmarked(Scripted):
    """Does not mark its last chunk, and has message ids of its own."""

    def _stream(self, *args: Any, **kwargs: Any) -> Iterator[ChatGenerationChunk]:
        for chunk in super()._stream(*args, **kwargs):
            yield ChatGenerationChunk(
                message=chunk.message.model_copy(update={"chunk_position": None, "id": "chatcmpl"})
            )


UPSTREAMS: dict[str, Callable[[], Scripted]] = {
    "text": lambda: saying("some bad words"),
    "a kept text": lambda: saying("some fine words"),
    "text and a tool call": lambda: Scripted(reply=lambda messages: AIMessage("so bad", tool_calls=[CALL])),
    "a bare tool call": lambda: Scripted(reply=lambda messages: AIMessage("", tool_calls=[CALL])),
    "content blocks": lambda: Scripted(
        reply=lambda messages: AIMessage(
            [{"type": "reasoning", "reasoning": "hm", "index": 0}, {"type": "text", "text": "bad", "index": 1}]
        )
    ),
    "an unmarked end": lambda: Unmarked(reply=lambda messages: AIMessage("some bad words")),
    "standard content": lambda: saying("some bad words").model_copy(update={"output_version": "v1"}),
}
CHAINS: dict[str, Callable[[Any, dict[str, Any]], Any]] = {
    "chain": lambda model, options: model | shadow(**options),
    "wrap": lambda model, options: wrap(model, **options),
}


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("upstream", UPSTREAMS)
def test_a_models_chunks_come_as_they_are_and_the_last_one_reports(upstream: str, chain: str, stream: str) -> None:
    model = UPSTREAMS[upstream]()
    raw = STREAMS[stream](model, "q")
    chunks = STREAMS[stream](CHAINS[chain](model, {}), "q")
    assert [chunk.content for chunk in chunks if chunk.content] == [chunk.content for chunk in raw if chunk.content]
    assert [chunk.tool_call_chunks for chunk in chunks if chunk.tool_call_chunks] == [
        chunk.tool_call_chunks for chunk in raw if chunk.tool_call_chunks
    ]
    assert [chunk.chunk_position for chunk in chunks] == [None] * (len(chunks) - 1) + ["last"]
    assert {chunk.id[:8] for chunk in chunks} <= {chunk.id[:8] for chunk in raw}
    assert len({chunk.id for chunk in chunks}) <= len({chunk.id for chunk in raw})
    assert len([chunk for chunk in chunks if chunk.usage_metadata]) == 1
    assert seen(without_run([joined(chunks)])[0]) == without_run([joined(raw)])[0]
    assert joined(chunks).tool_calls == joined(raw).tool_calls
    told = reports(chunks)
    assert told == reports([chunks[-1]])
    if upstream == "a bare tool call":
        assert not told
    else:
        assert (told[0]["would_change"], told[0]["mode"]) == (upstream != "a kept text", "shadow")


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("trouble", TROUBLES)
def test_whatever_happens_a_stream_ends_as_the_models_own(trouble: str, chain: str, stream: str) -> None:
    model = saying("some bad words")
    raw = STREAMS[stream](model, "q")
    chunks = STREAMS[stream](CHAINS[chain](model, options_of(trouble)), "q")
    assert seen(without_run([joined(chunks)])[0]) == without_run([joined(raw)])[0]
    (report,) = reports(chunks)
    assert report == {**report, **TROUBLES[trouble][1], "mode": "shadow", "aligned": False, "changed": False}


@pytest.mark.parametrize("chain", [*CHAINS, "text"])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_chunks_arrive_before_the_model_has_ended(chain: str, asynchronous: bool) -> None:
    log: list[str] = []

    class Talking(Scripted):
        def _stream(self, *args: Any, **kwargs: Any) -> Iterator[ChatGenerationChunk]:
            for chunk in super()._stream(*args, **kwargs):
                log.append(f"said {chunk.text}")
                yield chunk

    model = Talking(reply=lambda messages: AIMessage("one bad end"))
    runnable = model | StrOutputParser() | shadow() if chain == "text" else CHAINS[chain](model, {})

    def hear(chunk: Any) -> None:
        log.append(f"heard {chunk if isinstance(chunk, str) else chunk.content}")

    async def listen() -> None:
        async for chunk in runnable.astream("q"):
            hear(chunk)

    if asynchronous:
        asyncio.run(listen())
    else:
        for chunk in runnable.stream("q"):
            hear(chunk)
    wanted = [f"{verb} {word}" for word in ("one ", "bad ", "end") for verb in ("said", "heard")]
    assert [line for line in log if line.split()[1:]] == wanted


def test_an_answer_is_read_while_it_is_shown_and_not_read_again() -> None:
    aligner = fake_aligner(lambda question, answer: answer)
    words = "words, " * 40
    read: list[int] = []

    class Slow(Scripted):
        def _stream(self, *args: Any, **kwargs: Any) -> Iterator[ChatGenerationChunk]:
            for _ in range(40):
                time.sleep(0.003)
                yield ChatGenerationChunk(message=AIMessageChunk(content="words, "))
            read.append(aligner.fake_model.tokens)

    chain = Slow(reply=answering().reply) | shadow(aligner)
    assert joined(list(chain.stream("q"))).content == words
    assert read[0] > 0.5 * len(words)
    streamed = aligner.fake_model.tokens
    aligner.correct("q", words)
    alone = aligner.fake_model.tokens - streamed
    assert streamed < 1.2 * alone


@pytest.mark.parametrize("stream", STREAMS)
def test_pieces_of_text_and_of_dicts_come_as_they_are(stream: str) -> None:
    text = saying("some bad words") | StrOutputParser()
    assert STREAMS[stream](text | shadow(), "q") == STREAMS[stream](text, "q")
    row = RunnableParallel(question=RunnablePassthrough(), answer=saying("some bad words")) | shadow()
    pieces = STREAMS[stream](row, "q")
    assert [piece["answer"].content for piece in pieces if "answer" in piece] == ["some ", "bad ", "words", "", ""]
    whole = joined(pieces)
    assert (whole["question"], whole["answer"].content) == ("q", "some bad words")
    assert reports(whole) == reports([pieces[-1]])
    assert reports(whole)[0]["proposed"] == "some good words"
    assert [piece["answer"].chunk_position for piece in pieces if "answer" in piece] == [None] * 4 + ["last"]


@pytest.mark.parametrize("stream", STREAMS)
def test_whole_messages_in_a_stream_are_each_reported(stream: str) -> None:
    def say(values: Iterator[Any]) -> Iterator[Any]:
        for _ in values:
            yield from [AIMessage("bad one", id="1"), AIMessage("fine", id="2")]

    async def asay(values: AsyncIterator[Any]) -> AsyncIterator[Any]:
        async for value in values:
            for message in say(iter([value])):
                yield message

    messages = STREAMS[stream](RunnableGenerator(say, asay) | shadow(question="q"), "q")
    assert [(message.content, message.id) for message in messages] == [("bad one", "1"), ("fine", "2")]
    assert [report["would_change"] for report in reports(messages)] == [True, False]


@pytest.mark.parametrize("call", CALLS)
def test_what_shadow_mode_looked_at_is_still_aligned(call: str) -> None:
    made: list[Correction] = []
    align = AlignerRunnable(ALIGNER, on_correction=made.append)
    for chain in (
        saying("bad words") | shadow() | align,
        wrap(saying("bad words")) | align,
        align.wrap(wrap(saying("bad words"))),
    ):
        made.clear()
        result = CALLS[call](chain, "q")
        assert result.content == "good words"
        (report,) = reports(result)
        assert (report["aligned"], report["changed"]) == (True, True)
        assert "mode" not in report
        assert len(made) == (2 if "batch" in call else 1)
    corrected = CALLS[call](saying("bad words") | align | shadow(), "q")
    assert (corrected.content, reports(corrected)[0]["aligned"]) == ("good words", True)


@pytest.mark.parametrize("call", CALLS)
def test_of_two_that_only_look_the_later_one_reports_and_both_are_told(call: str) -> None:
    likely = judging_aligner(correct, lambda question, answer: 1.0)
    chains: list[Any] = [
        saying("bad words") | shadow(likely, strength="low") | shadow(likely, strength="high"),
        wrap(saying("bad words"), likely, strength="low") | shadow(likely, strength="high"),
    ]
    for chain in chains:
        ear = Ear()
        result = CALLS[call](chain.with_config(callbacks=[ear]), "q")
        assert result.content == "bad words"
        assert [report["would_change"] for report in reports(result)] == [True]
        if not isinstance(chain.first, AlignedChatModel) or call in ("invoke", "ainvoke"):
            assert {report["would_change"] for report in ear.reports} == {False, True}
    nested = CALLS[call](wrap(wrap(saying("bad words"), likely, strength="low"), likely, strength="high"), "q")
    assert [report["would_change"] for report in reports(nested)] == [True]


# --- a wrapped model ----------------------------------------------------------------------------------


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_wrapped_models_answer_is_the_inner_models(asynchronous: bool) -> None:
    model = answering().model_copy(update={"n": 2})

    def generate(llm: Any) -> Any:
        messages = [[HumanMessage("q")], [HumanMessage("r")]]
        return asyncio.run(llm.agenerate(messages)) if asynchronous else llm.generate(messages)

    raw, result = generate(model), generate(wrap(model))
    assert result.llm_output == raw.llm_output
    for mine, inner in zip(flat(*result.generations), flat(*raw.generations), strict=True):
        assert (mine.text, mine.generation_info) == (inner.text, inner.generation_info)
        assert seen(without_run([mine.message])[0]) == without_run([inner.message])[0]
        assert reports(mine.message)[0]["proposed"] == inner.text.replace("bad", "good")


def test_usage_counts_once_and_callbacks_hear_the_models_own_tokens() -> None:
    raw, ear = Ear(), Ear()
    with get_usage_metadata_callback() as usage:
        list(answering().stream("why", {"callbacks": [raw]}))
        assert usage.usage_metadata["scripted"]["total_tokens"] == 8
        list((wrap(answering()) | RunnableLambda(lambda message: message)).stream("why", {"callbacks": [ear]}))
        assert usage.usage_metadata["scripted"]["total_tokens"] == 16
    assert [token for token in ear.tokens if token] == [token for token in raw.tokens if token]
    assert [report["proposed"] for report in ear.reports] == ["good(why)"]


@pytest.mark.parametrize("streams", [True, False])
def test_events_end_with_the_models_own_answer(streams: bool) -> None:
    model = answering() if streams else answering().model_copy(update={"disable_streaming": True})

    async def events(llm: Any) -> list[Any]:
        return [event async for event in llm.astream_events("why", version="v2")]

    def ends(llm: Any) -> list[AIMessageChunk]:
        found = asyncio.run(events(llm))
        return [event["data"]["output"] for event in found if event["event"] == "on_chat_model_end"]

    (raw,), (end,) = ends(model), ends(wrap(model))
    assert seen(without_run([end])[0]) == without_run([raw])[0]
    assert reports(end)[0]["would_change"]
    custom = [
        event["data"]
        for event in asyncio.run(events(RunnablePassthrough() | wrap(model)))
        if event["event"] == "on_custom_event"
    ]
    assert [data["proposed"] for data in custom] == ["good(why)"]


def test_json_that_was_asked_for_is_not_looked_at_and_its_stream_ends_as_ever() -> None:
    bound = wrap(saying('{"bad": 1}')).bind(response_format={"type": "json_object"})
    chunks = list(bound.stream("q"))
    assert not reports(chunks) and not reports(bound.invoke("q"))
    assert joined(chunks).content == '{"bad": 1}'
    assert [chunk.chunk_position for chunk in chunks] == [None] * (len(chunks) - 1) + ["last"]


def test_the_models_own_failure_is_raised_as_ever() -> None:
    model = Scripted(reply=broken)
    for chain in (model | shadow(), wrap(model)):
        for call in ("invoke", "stream", "ainvoke", "astream"):
            with pytest.raises(KeyError, match="oops"):
                CALLS[call](chain, "q")


def test_who_stops_listening_leaves_the_aligner_to_others() -> None:
    for chain in (saying("some bad words") | shadow(), wrap(saying("some bad words"))):
        stream: Any = chain.stream("q")
        assert next(stream).content == "some "
        stream.close()
    assert ALIGNER.correct("q", "bad").corrected == "good"


# --- agents and graphs --------------------------------------------------------------------------------

ASK: Any = {"messages": [HumanMessage("why", id="0")]}


@tool
def weather(place: str) -> str:
    """Tell the weather of a place."""
    return f"sunny in {place}"


def tool_then_answer() -> Scripted:
    call = {"name": "weather", "args": {"place": "Rome"}, "id": "call", "type": "tool_call"}

    def reply(messages: list[BaseMessage]) -> AIMessage:
        return (
            AIMessage("some bad words") if isinstance(messages[-1], ToolMessage) else AIMessage("", tool_calls=[call])
        )

    return Scripted(reply=reply)


def agent(**options: Any) -> Any:
    aligner = options.pop("aligner", ALIGNER)
    more = {name: options.pop(name) for name in ("checkpointer",) if name in options}
    middleware = [AlignerMiddleware(aligner, mode="shadow", **options)]
    return create_agent(tool_then_answer(), [weather], middleware=middleware, **more)


def plain(messages: list[Any]) -> list[Any]:
    """Messages without reports, and without what differs from one run to the next."""
    return [seen(message).model_copy(update={"id": None}) for message in messages]


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("trouble", TROUBLES)
def test_an_agents_state_is_as_without_it_and_whatever_happens_is_reported(trouble: str, asynchronous: bool) -> None:
    def state(graph: Any) -> list[Any]:
        found = asyncio.run(graph.ainvoke(ASK)) if asynchronous else graph.invoke(ASK)
        return list(found["messages"])

    raw = state(create_agent(tool_then_answer(), [weather]))
    graph = agent(**options_of(trouble))
    mine = state(graph)
    assert plain(mine) == plain(raw)
    wanted = {} if trouble == "no question" else TROUBLES[trouble][1]  # the model's own messages tell it
    (report,) = reports(mine)
    assert report == {**report, **wanted, "mode": "shadow", "aligned": False, "changed": False}
    (event,) = [part["aligner_correction"] for part in graph.stream(ASK, stream_mode="custom")]
    assert event == {**event, **wanted, "mode": "shadow"}


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("raw_streaming", [False, True])
def test_an_agents_tokens_are_the_models_own_under_the_id_that_is_stored(
    raw_streaming: bool, asynchronous: bool
) -> None:
    def tokens(graph: Any, config: Any = None) -> list[Any]:
        parts: Any = (
            asyncio.run(collected(graph.astream(ASK, config, stream_mode="messages")))
            if asynchronous
            else graph.stream(ASK, config, stream_mode="messages")
        )
        return [chunk for chunk, _ in parts if chunk.text and not isinstance(chunk, ToolMessage)]

    graph = agent(raw_streaming=raw_streaming, checkpointer=InMemorySaver())
    config = {"configurable": {"thread_id": "1"}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mine = tokens(graph, config)
    raw = tokens(create_agent(tool_then_answer(), [weather]))
    assert [chunk.content for chunk in mine] == [chunk.content for chunk in raw] == ["some ", "bad ", "words"]
    stored = graph.get_state(config).values["messages"]
    assert {chunk.id for chunk in mine} == {stored[-1].id}
    assert (len(stored), stored[-1].usage_metadata) == (4, USAGE)
    assert reports(stored)[0]["proposed"] == "some good words"


def test_an_agent_that_only_looks_warns_of_no_raw_tokens() -> None:
    fallback = ModelFallbackMiddleware(saying("bad fallback"))
    looking = AlignerMiddleware(ALIGNER, mode="shadow")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        graph = create_agent(Scripted(reply=broken), middleware=[looking, fallback])
        (last,) = graph.invoke(ASK)["messages"][1:]
    assert last.content == "bad fallback"
    assert reports(last)[0]["proposed"] == "good fallback"


@pytest.mark.parametrize("raw_streaming", [False, True])
def test_an_agent_corrects_what_its_model_only_looked_at(raw_streaming: bool) -> None:
    middleware = AlignerMiddleware(ALIGNER, raw_streaming=raw_streaming)
    graph = create_agent(wrap(tool_then_answer()), [weather], middleware=[middleware])
    for state in (graph.invoke(ASK), asyncio.run(graph.ainvoke(ASK))):
        assert state["messages"][-1].content == "some good words"
        assert [report["aligned"] for report in reports(state["messages"])] == [True]
    shown = [chunk.text for chunk, _ in graph.stream(ASK, stream_mode="messages") if isinstance(chunk, AIMessageChunk)]
    assert "".join(shown) == ("some bad words" if raw_streaming else "some good words")


@pytest.mark.parametrize("stream", STREAMS)
def test_each_update_of_a_graph_is_reported(stream: str) -> None:
    graph = create_agent(tool_then_answer(), [weather])
    raw = STREAMS[stream](graph, ASK)
    updates = STREAMS[stream](graph | shadow(question="q"), ASK)
    assert [list(update) for update in updates] == [["model"], ["tools"], ["model"]]
    for mine, inner in zip(updates, raw, strict=True):
        ((_, mine),), ((_, inner),) = mine.items(), inner.items()
        assert plain(mine["messages"]) == plain(inner["messages"])
    assert [report["proposed"] for report in reports(updates)] == ["some good words"]
    for update in STREAMS[stream](graph | shadow(Failing(correct), question=broken), ASK):
        assert "bad" in repr(update) or not reports(update)


def test_as_a_node_of_a_graph() -> None:
    def answer(state: MessagesState) -> Any:
        return {"messages": [saying("bad node").invoke(state["messages"])]}

    builder = StateGraph(MessagesState)
    builder.add_node("answer", answer)
    builder.add_node("look", shadow())
    builder.add_edge(START, "answer")
    builder.add_edge("answer", "look")
    graph = builder.compile()
    for state in (graph.invoke(ASK), asyncio.run(graph.ainvoke(ASK))):
        assert [message.content for message in state["messages"]] == ["why", "bad node"]
        assert [report["proposed"] for report in reports(state["messages"])] == ["good node"]


def test_the_log_tells_what_would_have_been(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="aligner_middleware"):
        shadow(question="q").batch(["bad", "fine"])
    told = [record.getMessage() for record in caplog.records]
    assert [line.partition(" an answer")[0] for line in told] == ["would correct", "kept"]


# --- the command line ---------------------------------------------------------------------------------


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    aligner = judging_aligner(correct, lambda question, answer: 1.0 if "bad" in answer else -20.0)
    monkeypatch.setattr(Aligner, "load", lambda *args, **options: aligner)

    def invoke(*arguments: str, stdin: str | None = None) -> Any:
        return CliRunner().invoke(cli.app, ["correct", "--mode", "shadow", *arguments], input=stdin)

    return invoke


def test_the_command_prints_the_answer_as_it_is_and_what_would_become_of_it(run: Callable[..., Any]) -> None:
    ask = ("-q", "q", "-a", "bad words")
    assert run(*ask).stdout == "bad words\n"
    row = json.loads(run(*ask, "--json").stdout)
    wanted = {"mode": "shadow", "corrected": "bad words", "changed": False, "would_change": True}
    assert row == {
        **row,
        **wanted,
        "proposed": "good words",
        "verdict": "edit",
        "score": pytest.approx(0.731, abs=1e-3),
    }
    low = json.loads(run(*ask, "--json", "--strength", "low").stdout)
    assert low == {**low, **wanted, "would_change": False, "proposed": None, "verdict": "keep"}


@pytest.mark.parametrize(("on_doubt", "would_change"), [("passthrough", False), ("raise", False), ("keep", True)])
def test_the_command_raises_nothing_in_doubt(run: Callable[..., Any], on_doubt: str, would_change: bool) -> None:
    outcome = run("-q", "q", "-a", "bad odd", "--json", "--on-doubt", on_doubt)
    assert outcome.exit_code == 0, outcome.output
    row = json.loads(outcome.stdout)
    assert (row["corrected"], row["would_change"], row["proposed"]) == ("bad odd", would_change, "плохо odd")
    assert row["doubts"] == ["script"]


def test_one_line_that_cannot_be_corrected_does_not_stop_the_command(run: Callable[..., Any]) -> None:
    lines = [{"question": " ", "answer": "bad"}, {"question": "q", "answer": "bad"}]
    outcome = run(stdin="".join(json.dumps(line) + "\n" for line in lines))
    assert outcome.exit_code == 0, outcome.output
    first, second = map(json.loads, outcome.stdout.splitlines())
    assert (first["corrected"], first["would_change"]) == ("bad", False)
    assert first["reason"].startswith("InputError: the question is blank")
    assert "the question is blank" in outcome.stderr
    assert (second["corrected"], second["proposed"]) == ("bad", "good")
