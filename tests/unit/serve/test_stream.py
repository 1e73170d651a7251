"""/v1/chat/completions as a stream: nothing raw leaves before it is decided, and all else passes at once."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import openai
import pytest
from langchain_openai import ChatOpenAI

from tests.fakes import FakeAligner, InstantAligner, judging_aligner
from tests.unit.serve.serving import (
    ASKED,
    DONE,
    POLITE,
    RUDE,
    USAGE,
    Body,
    chunk,
    completion,
    data,
    events_of,
    serving,
    spoken,
    streamed,
    text_of,
    without_insult,
)

MESSAGES: Any = ASKED["messages"]


def deltas(events: list[Any], index: int = 0) -> list[dict[str, Any]]:
    choices = [choice for event in events if event != "[DONE]" for choice in event["choices"]]
    return [choice["delta"] for choice in choices if choice["index"] == index]


async def test_the_text_leaves_corrected_then_the_end_with_the_decision_then_usage() -> None:
    async with serving(streamed([*spoken(RUDE), USAGE, DONE])) as service:
        events = await service.stream()
    assert text_of(events) == POLITE
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    *_, finish, usage, done = events
    assert finish["choices"][0]["finish_reason"] == "stop"
    assert finish["choices"][0]["aligner"]["verdict"] == "edit"
    assert finish["choices"][0]["aligner"]["changed"] is True
    assert usage["usage"]["total_tokens"] == 3
    assert done == "[DONE]"
    assert {(event["id"], event["created"], event["model"], event["object"]) for event in events[:-1]} == {
        ("c1", 1, "m", "chat.completion.chunk")
    }
    assert "idiot" not in json.dumps(events)


async def test_a_kept_answer_leaves_byte_for_byte_with_its_logprobs() -> None:
    said = [
        chunk({"role": "assistant"}),
        *(chunk({"content": c}, logprobs={"content": [{"token": c}]}) for c in "Fine\u2028!"),
    ]
    async with serving(streamed([*said, chunk({}, "stop"), DONE])) as service:
        events = await service.stream()
    assert text_of(events) == "Fine\u2028!"
    (finish,) = events[-2]["choices"]
    assert [entry["token"] for entry in finish["logprobs"]["content"]] == list("Fine\u2028!")
    assert finish["aligner"]["verdict"] == "keep"


async def test_logprobs_and_citations_of_a_changed_answer_are_dropped() -> None:
    said = chunk(
        {"role": "assistant", "content": RUDE, "annotations": [{"a": 1}]}, logprobs={"content": [{"token": RUDE}]}
    )
    async with serving(streamed([said, chunk({}, "stop"), DONE])) as service:
        events = await service.stream()
    assert text_of(events) == POLITE
    assert "idiot" not in json.dumps(events)
    assert "annotations" not in json.dumps(events)


async def test_n_choices_that_are_mixed_are_decided_apart_and_usage_comes_last() -> None:
    one, two = spoken(RUDE, 0), spoken("It is fine so.", 1)
    mixed = [part for pair in zip(one, two, strict=False) for part in pair]
    mixed += one[len(two) :] + two[len(one) :]
    async with serving(streamed([*mixed, USAGE, DONE])) as service:
        events = await service.stream(ASKED | {"n": 2})
    assert (text_of(events, 0), text_of(events, 1)) == (POLITE, "It is fine so.")
    ends = {c["index"]: c["aligner"]["verdict"] for e in events[:-1] for c in e["choices"] if c["finish_reason"]}
    assert ends == {0: "edit", 1: "keep"}
    assert events[-2]["usage"] and events[-1] == "[DONE]"


async def test_choices_in_one_chunk_are_taken_apart() -> None:
    def both(*choices: dict[str, Any], **more: Any) -> bytes:
        filled = [{"logprobs": None, "finish_reason": None, "delta": {}} | choice for choice in choices]
        return data({"id": "c1", "created": 1, "model": "m", "choices": filled, **more})

    said = both({"index": 0, "delta": {"content": RUDE}}, {"index": 1, "delta": {"content": "Fine."}})
    end = both(
        {"index": 0, "finish_reason": "stop"}, {"index": 1, "finish_reason": "length"}, usage={"total_tokens": 3}
    )
    async with serving(streamed([said, end, DONE])) as service:
        events = await service.stream()
    assert (text_of(events, 0), text_of(events, 1)) == (POLITE, "Fine.")
    assert sum("usage" in event for event in events[:-1]) == 1


async def test_text_that_comes_with_the_end_or_in_parts_or_twice_is_held_back_too() -> None:
    parts = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": RUDE}]
    last = chunk({"content": [{"type": "text", "text": " Bye."}]}, "stop", message={"content": RUDE + " Bye."})
    async with serving(streamed([chunk({"role": "assistant", "content": parts}), last, DONE])) as service:
        events = await service.stream()
    said = [delta["content"] for delta in deltas(events) if delta.get("content")]
    assert said[0] == [{"type": "thinking", "thinking": "hm"}]
    assert "".join(said[1:]) == POLITE + " Bye."
    assert "idiot" not in json.dumps(events)


async def test_an_upstream_without_reasons_for_the_end_or_without_done_is_understood() -> None:
    async with serving(streamed([*spoken(RUDE)[:-1], DONE])) as service:
        assert text_of(await service.stream()) == POLITE
    async with serving(streamed([*spoken(RUDE)[:-1], chunk({}, "stop").strip()])) as service:
        events = await service.stream()
    assert text_of(events) == POLITE
    assert events[-1] == "[DONE]"


async def test_bytes_may_be_cut_anywhere_and_lines_may_end_anyhow() -> None:
    whole = b"\xef: hello\r\n".replace(b"\xef", b"") + b"".join([*spoken(RUDE + " ☃"), DONE]).replace(b"\n", b"\r\n")
    async with serving(streamed([whole[n : n + 1] for n in range(len(whole))])) as service:
        assert text_of(await service.stream()) == POLITE + " ☃"
    async with serving(streamed([whole.replace(b"\r\n", b"\r")])) as service:
        assert text_of(await service.stream()) == POLITE + " ☃"


async def test_tool_calls_and_reasoning_pass() -> None:
    call = {"index": 0, "id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": "an idiot"}'}}
    said = [
        chunk({"role": "assistant", "content": None, "reasoning_content": "an idiot"}),
        chunk({"tool_calls": [call]}),
    ]
    async with serving(streamed([*said, chunk({}, "tool_calls"), DONE])) as service:
        events = await service.stream()
    assert deltas(events)[0]["reasoning_content"] == "an idiot"
    assert deltas(events)[1]["tool_calls"] == [call]
    assert events[-2]["choices"][0]["finish_reason"] == "tool_calls"
    assert events[-2]["choices"][0]["aligner"]["reason"] == "no text"


@pytest.mark.parametrize(
    ("body", "policy", "field", "value"),
    [
        ({}, {"mode": "shadow"}, "would_change", True),
        ({"response_format": {"type": "json_object"}}, {}, "reason", "structured answer"),
        ({"messages": [{"role": "system", "content": "s"}]}, {}, "changed", False),
    ],
)
async def test_in_shadow_mode_and_without_a_decision_chunks_pass_as_they_come(
    body: Any, policy: Any, field: str, value: Any
) -> None:
    more = asyncio.Event()

    async def chunks() -> AsyncIterator[bytes]:
        first, *rest = spoken(RUDE)[1:]
        yield first
        await more.wait()
        for part in rest:
            yield part
        yield DONE

    async with serving(streamed(chunks()), policy=policy) as service:
        request = service.client.build_request("POST", "/v1/chat/completions", json={**ASKED, **body, "stream": True})
        response = await service.client.send(request, stream=True)
        lines = response.aiter_lines()
        assert "You " in await anext(lines)
        more.set()
        events = events_of("\n".join([line async for line in lines]))
    assert "You " + text_of(events) == RUDE
    assert events[-2]["choices"][0]["aligner"][field] == value


# --- what fails in the middle


async def broken(*parts: bytes, error: Exception | None = None) -> AsyncIterator[bytes]:
    for part in parts:
        yield part
    if error:
        raise error


@pytest.mark.parametrize(
    ("chunks", "code"),
    [
        (lambda: broken(*spoken(RUDE)[:4], error=httpx2.RemoteProtocolError("cut")), "upstream_failed"),
        (lambda: broken(*spoken(RUDE)[:4], error=httpx2.ReadTimeout("slow")), "upstream_timeout"),
        (lambda: broken(*spoken(RUDE)[:4]), "upstream_failed"),
        (lambda: broken(), "upstream_failed"),
        (lambda: broken(*spoken(RUDE)[:4], data({"error": {"message": "overloaded", "code": "busy"}}), DONE), "busy"),
        (lambda: broken(*spoken(RUDE)[:4], b"data: {an idiot\n\n", DONE), "bad_upstream"),
        (lambda: broken(*spoken(RUDE)[:4], b"data: \xff\n\n", DONE), "bad_upstream"),
        (lambda: broken(data({"choices": [{"index": 0, "delta": {"content": {"text": RUDE}}}]}), DONE), "bad_upstream"),
        (lambda: broken(data({"choices": [{"index": 0, "delta": RUDE}]}), DONE), "bad_upstream"),
        (lambda: broken(data({"choices": [{"index": "an idiot", "delta": {}}]}), DONE), "bad_upstream"),
        (lambda: broken(data({"choices": RUDE}), DONE), "bad_upstream"),
    ],
)
async def test_a_stream_that_breaks_off_ends_with_an_error_and_nothing_raw(chunks: Any, code: str) -> None:
    async with serving(lambda request: streamed(chunks())) as service:
        events = await service.stream()
        async with openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key="k", max_retries=0) as client:
            stream: Any = await client.chat.completions.create(model="m", messages=MESSAGES, stream=True)
            with pytest.raises(openai.APIError) as raised:
                [part async for part in stream]
    assert events[-1]["error"]["code"] == code
    assert raised.value.code == code
    assert text_of(events) == ""
    assert "idiot" not in json.dumps(events)


async def test_a_correction_that_fails_ends_the_stream_with_an_error_or_passes_by_the_policy() -> None:
    def fails(question: str, answer: str) -> str:
        raise RuntimeError("broken")

    for on_error in ("raise", "passthrough"):
        reply = streamed([*spoken(RUDE), DONE])
        async with serving(reply, judging_aligner(fails), policy={"on_error": on_error}) as service:
            events = await service.stream()
        if on_error == "raise":
            assert events[-1]["error"]["type"] == "server_error"
            assert "idiot" not in json.dumps(events)
        else:
            assert text_of(events) == RUDE
            assert "broken" in events[-2]["choices"][0]["aligner"]["reason"]


async def test_an_upstream_that_does_not_stream_is_aligned_as_a_whole() -> None:
    async with serving(completion(RUDE)) as service:
        response = await service.ask(ASKED | {"stream": True})
    assert response.json()["choices"][0]["message"]["content"] == POLITE


# --- time: keep-alive, reading ahead, clients that go away


class Paused:
    """A stream that says some chunks, and the rest when it is told to."""

    def __init__(self, first: list[bytes], rest: list[bytes]) -> None:
        self.first, self.rest, self.go = first, rest, asyncio.Event()
        self.body = Body(self._chunks())

    async def _chunks(self) -> AsyncIterator[bytes]:
        for part in self.first:
            yield part
        await self.go.wait()
        for part in self.rest:
            yield part

    def response(self) -> httpx2.Response:
        return httpx2.Response(200, headers={"content-type": "text/event-stream; charset=utf-8"}, stream=self.body)


async def opened(service: Any) -> httpx2.Response:
    request = service.client.build_request("POST", "/v1/chat/completions", json=ASKED | {"stream": True})
    response: httpx2.Response = await service.client.send(request, stream=True)
    return response


async def test_comments_go_out_while_text_is_held_back() -> None:
    paused = Paused(spoken(RUDE)[1:5], [*spoken(RUDE)[5:], DONE])
    async with serving(paused.response(), keep_alive=0.02) as service:
        response = await opened(service)
        lines = response.aiter_lines()
        said = [await anext(lines) for _ in range(6)]
        paused.go.set()
        events = events_of("\n".join([line async for line in lines]))
    assert said == [": keep-alive", ""] * 3
    assert text_of(events) == POLITE


async def test_an_answer_is_read_while_it_arrives() -> None:
    aligner: FakeAligner = judging_aligner(without_insult)
    words = spoken("It rains and rains, and then it rains again, for many days. " * 3)
    paused = Paused(words[:-1], [words[-1], DONE])
    async with serving(paused.response(), aligner) as service:
        response = await opened(service)
        while aligner.fake_model.tokens == 0:
            await asyncio.sleep(0.01)
        paused.go.set()
        await response.aread()


class _Ahead:
    waiting, released = False, ""

    def __init__(self) -> None:
        self.fed, self.closed = "", asyncio.Event()

    def feed(self, text: str) -> None:
        self.fed += text

    def close(self) -> None:
        self.closed.set()


async def test_a_client_that_goes_away_closes_the_upstream_and_frees_the_aligner() -> None:
    aligner, ahead = InstantAligner(without_insult), _Ahead()
    aligner.read_ahead = lambda question, **options: ahead  # type: ignore[method-assign]
    paused = Paused(spoken(RUDE)[:4], [])
    async with serving(paused.response(), aligner, concurrency=1) as service:
        response = await opened(service)
        assert (await service.ask()).status_code == 429
        while not ahead.fed:
            await asyncio.sleep(0.01)
        assert not ahead.closed.is_set()
        await response.aclose()
        await asyncio.wait_for(paused.body.closed.wait(), 10)
        await asyncio.wait_for(ahead.closed.wait(), 10)
        await asyncio.sleep(0.05)
        service.upstream.reply = streamed([*spoken(RUDE), DONE])
        assert text_of(await service.stream()) == POLITE


async def test_a_client_that_goes_away_while_its_answer_is_corrected_frees_the_engine() -> None:
    started, go = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def slow(question: str, answer: str) -> str:
        loop.call_soon_threadsafe(started.set)
        asyncio.run_coroutine_threadsafe(go.wait(), loop).result(30)
        return without_insult(question, answer)

    async with serving(streamed([*spoken(RUDE), DONE]), judging_aligner(slow), concurrency=1) as service:
        response = await opened(service)
        await asyncio.wait_for(started.wait(), 10)
        await response.aclose()
        await asyncio.sleep(0.1)
        go.set()
        service.upstream.reply = streamed([*spoken("It rains."), DONE])
        assert text_of(await service.stream()) == "It rains."


async def test_a_stream_that_ended_is_closed() -> None:
    paused = Paused([*spoken(RUDE), DONE], [])
    async with serving(paused.response()) as service:
        assert text_of(await service.stream()) == POLITE
        await asyncio.wait_for(paused.body.closed.wait(), 10)


# --- real clients


async def test_the_openai_client_streams_with_usage_and_helpers() -> None:
    options: Any = {"messages": MESSAGES, "stream_options": {"include_usage": True}}
    async with (
        serving(lambda request: streamed([*spoken(RUDE), USAGE, DONE])) as service,
        openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key="k", max_retries=0) as client,
        client.chat.completions.stream(model="m", **options) as stream,
    ):
        said: Any = await stream.get_final_completion()
    assert said.choices[0].message.content == POLITE
    assert said.choices[0].finish_reason == "stop"
    assert said.usage.total_tokens == 3
    assert service.upstream.sent["stream_options"] == {"include_usage": True}


async def test_langchains_chat_openai_streams_text_and_tool_calls() -> None:
    call = {"index": 0, "id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}

    def reply(request: httpx2.Request) -> httpx2.Response:
        tools = [chunk({"role": "assistant", "content": None}), chunk({"tool_calls": [call]}), chunk({}, "tool_calls")]
        return streamed([*(tools if b'"tools"' in request.content else spoken(RUDE)), USAGE, DONE])

    async with serving(reply) as service:
        llm = ChatOpenAI(base_url=f"{service.url}/v1", api_key="k", model="m", max_retries=0)
        text = "".join([part.text async for part in llm.astream("Who am I?")])
        tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
        called: Any = None
        async for part in llm.bind_tools([tool]).astream("Who am I?"):
            called = part if called is None else called + part
    assert text == POLITE
    assert called.tool_calls[0]["name"] == "f"
