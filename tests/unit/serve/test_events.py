"""/v1/responses as a stream: no raw message leaves before it is decided, and all else passes at once."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable
from itertools import pairwise
from typing import Any

import httpx2
import openai
import pytest

from tests.fakes import FakeAligner, judging_aligner
from tests.unit.serve.serving import POLITE, RUDE, Service, events_of, serving, streamed, without_insult

PATH = "/v1/responses"
ASKED: Any = {"model": "m", "input": "Who am I?"}


def said(kind: str, **fields: Any) -> dict[str, Any]:
    return {"type": f"response.{kind}", "sequence_number": 7, **fields}


def whole(status: str, output: list[Any], **fields: Any) -> dict[str, Any]:
    body = {"id": "r1", "object": "response", "created_at": 1, "model": "m", "status": status, "output": output}
    return body | {"parallel_tool_calls": True, "tool_choice": "auto", "tools": [], "error": None} | fields


def part(text: str, **fields: Any) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []} | fields


def message(*parts: Any, index: int = 0) -> dict[str, Any]:
    return {"type": "message", "id": f"m{index}", "role": "assistant", "status": "completed", "content": list(parts)}


def spoken(text: str, index: int = 0) -> list[dict[str, Any]]:
    """The events of a message, word by word."""
    at = {"item_id": f"m{index}", "output_index": index, "content_index": 0}
    words = [word + " " for word in text.split(" ")]
    words[-1] = words[-1][:-1]
    item = message(part(text), index=index)
    return [
        said("output_item.added", output_index=index, item=item | {"status": "in_progress", "content": []}),
        said("content_part.added", **at, part=part("")),
        *(said("output_text.delta", **at, delta=word, logprobs=[{"token": word}]) for word in words),
        said("output_text.done", **at, text=text, logprobs=[]),
        said("content_part.done", **at, part=part(text)),
        said("output_item.done", output_index=index, item=item),
    ]


REASONING = {"type": "reasoning", "id": "s", "summary": []}
CALL = {
    "type": "function_call",
    "id": "f",
    "call_id": "c",
    "name": "f",
    "arguments": '{"a": "an idiot"}',
    "status": "completed",
}
THINKING = [
    said("output_item.added", output_index=0, item=REASONING),
    said(
        "content_part.added", item_id="s", output_index=0, content_index=0, part={"type": "reasoning_text", "text": ""}
    ),
    said("reasoning_text.delta", item_id="s", output_index=0, content_index=0, delta="an idiot"),
    said("output_item.done", output_index=0, item=REASONING),
]
CALLING = [
    said("output_item.added", output_index=2, item=CALL | {"arguments": ""}),
    said("function_call_arguments.delta", item_id="f", output_index=2, delta=CALL["arguments"]),
    said("function_call_arguments.done", item_id="f", output_index=2, name="f", arguments=CALL["arguments"]),
    said("output_item.done", output_index=2, item=CALL),
]
BEGIN = [said("created", response=whole("in_progress", [])), said("in_progress", response=whole("in_progress", []))]
USAGE = {"input_tokens": 1, "output_tokens": 2, "total_tokens": 3}


def response(text: str, end: str = "completed") -> list[dict[str, Any]]:
    """The events of a response that has a message alone."""
    return [*BEGIN, *spoken(text), said(end, response=whole(end, [message(part(text))], usage=USAGE))]


def sse(events: Iterable[dict[str, Any]]) -> list[bytes]:
    return [f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode() for event in events]


async def stream(service: Service, **body: Any) -> list[Any]:
    reply = await service.ask(ASKED | {"stream": True} | body, PATH)
    assert reply.headers["content-type"].startswith("text/event-stream"), reply.text
    names = [line.removeprefix("event: ") for line in reply.text.splitlines() if line.startswith("event: ")]
    events = events_of("\n".join(line for line in reply.text.splitlines() if not line.startswith("event: ")))
    assert names == [event["type"] for event in events]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def text_of(events: list[Any]) -> str:
    return "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")


def kinds(events: list[Any]) -> list[str]:
    """The kinds of events, repetitions left out."""
    names = [event["type"].removeprefix("response.") for event in events]
    return [name for before, name in pairwise(["", *names]) if name != before]


ORDER = [
    "created", "in_progress", "output_item.added", "content_part.added", "output_text.delta", "output_text.done",
    "content_part.done", "output_item.done", "completed",
]  # fmt: skip


async def test_a_message_leaves_corrected_in_every_event_that_holds_its_text() -> None:
    async with serving(streamed(sse(response(RUDE)))) as service:
        events = await stream(service)
    assert kinds(events) == ORDER
    assert text_of(events) == POLITE
    done = {event["type"].removeprefix("response."): event for event in events}
    assert done["output_text.done"]["text"] == done["content_part.done"]["part"]["text"] == POLITE
    assert done["content_part.added"]["part"]["text"] == ""
    item, final = done["output_item.done"]["item"], done["completed"]["response"]
    assert item["content"][0]["text"] == POLITE
    assert final["output"] == [item]
    assert item["aligner"]["verdict"] == final["aligner"]["verdict"] == "edit"
    assert final["usage"] == USAGE
    assert "idiot" not in json.dumps(events)


async def test_a_kept_message_leaves_event_for_event() -> None:
    given = response("It rains.")
    async with serving(streamed(sse(given))) as service:
        events = await stream(service)
    *same, done, completed = [{**event, "sequence_number": 7} for event in events]
    assert same == given[:-2]
    assert done["item"].pop("aligner")["verdict"] == "keep"
    assert done == given[-2]
    assert completed["response"]["aligner"]["verdict"] == "keep"


async def test_reasoning_and_tool_calls_pass_at_once_and_each_message_is_decided_alone() -> None:
    more, output = asyncio.Event(), [REASONING, message(part(RUDE), index=1), CALL, message(part("Fine."), index=3)]

    async def chunks() -> AsyncIterator[bytes]:
        for sent in sse([*BEGIN, *THINKING, *spoken(RUDE, 1)[:3]]):
            yield sent
        await more.wait()
        for sent in sse(
            [
                *spoken(RUDE, 1)[3:],
                *CALLING,
                *spoken("Fine.", 3),
                said("completed", response=whole("completed", output)),
            ]
        ):
            yield sent

    async with serving(streamed(chunks()), keep_alive=0.05) as service:
        request = service.client.build_request("POST", PATH, json=ASKED | {"stream": True})
        reply = await service.client.send(request, stream=True)
        lines, before = reply.aiter_lines(), ""
        while ": keep-alive" not in before:  # all that can be sent is
            before += await anext(lines) + "\n"
        more.set()
        after = "\n".join([line async for line in lines])
    assert "reasoning_text.delta" in before
    assert "You" not in before
    events = events_of("\n".join(line for line in after.splitlines() if not line.startswith("event: ")))
    assert text_of(events) == POLITE + "Fine."
    assert [
        event["item"].get("aligner", {}).get("verdict")
        for event in events
        if event["type"] == "response.output_item.done"
    ] == ["edit", None, "keep"]
    (arguments,) = [event["arguments"] for event in events if event["type"] == "response.function_call_arguments.done"]
    assert "idiot" in arguments
    assert [item["type"] for item in events[-1]["response"]["output"]] == [
        "reasoning",
        "message",
        "function_call",
        "message",
    ]


@pytest.mark.parametrize(
    ("body", "policy", "field", "value"),
    [
        ({}, {"mode": "shadow"}, "would_change", True),
        ({"text": {"format": {"type": "json_schema", "schema": {}}}}, {}, "reason", "structured answer"),
        ({"input": []}, {}, "changed", False),
    ],
)
async def test_without_a_decision_to_wait_for_events_pass_as_they_come(
    body: Any, policy: Any, field: str, value: Any
) -> None:
    given = response(RUDE)
    async with serving(streamed(sse(given)), policy=policy) as service:
        events = await stream(service, **body)
    assert [{**event, "sequence_number": 7} for event in events[:-2]] == given[:-2]
    assert events[-2]["item"]["aligner"][field] == events[-1]["response"]["aligner"][field] == value


@pytest.mark.parametrize("end", ["incomplete", "failed"])
async def test_a_response_that_ends_early_is_aligned_as_far_as_it_came(end: str) -> None:
    async with serving(streamed(sse(response(RUDE, end)))) as service:
        events = await stream(service)
    assert events[-1]["type"] == f"response.{end}"
    assert text_of(events) == POLITE
    assert "idiot" not in json.dumps(events)


@pytest.mark.parametrize(
    "given",
    [
        [event for event in response(RUDE) if event["type"] != "response.output_item.added"],
        [event for event in response(RUDE) if event["type"] != "response.output_item.done"],
        [event for event in response(RUDE) if "delta" not in event["type"]],
        [*BEGIN, *spoken(RUDE)[:-1], said("output_item.done", output_index=0, item=message()), response(RUDE)[-1]],
        [*BEGIN, *spoken(RUDE)[:3], said("incomplete", response=whole("incomplete", [message(part(RUDE))]))],
        [said("created", response=whole("in_progress", [message(part(RUDE))])), *response(RUDE)[1:]],
        [*BEGIN, response(RUDE)[-1]],
    ],
)
async def test_no_raw_text_leaves_from_an_upstream_that_leaves_events_out(given: list[Any]) -> None:
    async with serving(streamed(sse(given))) as service:
        events = await stream(service)
    assert "idiot" not in json.dumps(events)
    assert events[-1]["type"] in ("response.completed", "response.incomplete")
    shown = events[-1]["response"]["output"][0]["content"]
    assert not shown or shown[0]["text"] == POLITE


@pytest.mark.parametrize(
    ("rest", "code"),
    [
        ([], "upstream_failed"),
        ([{"type": "error", "code": "busy", "message": "overloaded", "param": None, "sequence_number": 3}], "busy"),
        ([{"error": {"message": "overloaded", "code": "busy"}}], "busy"),
        ([{"type": "response.\nan idiot"}], "bad_upstream"),
        ([said("output_text.delta", output_index="an idiot", delta="x")], "bad_upstream"),
        ([said("output_text.delta", output_index=0, delta=[RUDE])], "bad_upstream"),
        ([said("completed", response=RUDE)], "bad_upstream"),
    ],
)
async def test_a_stream_that_breaks_off_ends_with_an_error_and_nothing_raw(rest: list[Any], code: str) -> None:
    sent = [*sse([*BEGIN, *spoken(RUDE)[:5]]), *(b"data: " + json.dumps(event).encode() + b"\n\n" for event in rest)]
    async with serving(lambda request: streamed(sent)) as service:
        events = await stream(service)
        async with openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key="k", max_retries=0) as client:
            with pytest.raises(openai.APIError) as raised:
                [event async for event in await client.responses.create(**ASKED, stream=True)]
    assert raised.value.code == events[-1]["code"] == events[-1]["error"]["code"] == code
    assert events[-1]["type"] == "error"
    assert text_of(events) == ""
    assert "idiot" not in json.dumps(events)


async def test_a_correction_that_fails_ends_the_stream_with_an_error() -> None:
    def fails(question: str, answer: str) -> str:
        raise RuntimeError("broken")

    async with serving(streamed(sse(response(RUDE))), judging_aligner(fails)) as service:
        events = await stream(service)
    assert events[-1]["code"] == "aligner_failed"
    assert "idiot" not in json.dumps(events)


async def test_a_message_is_read_while_it_arrives() -> None:
    aligner: FakeAligner = judging_aligner(without_insult)
    go, given = asyncio.Event(), response("It rains and rains, and then it rains again, for many days. " * 3 + "So.")

    async def chunks() -> AsyncIterator[bytes]:
        for sent in sse(given[:-4]):
            yield sent
        await go.wait()
        for sent in sse(given[-4:]):
            yield sent

    async with serving(streamed(chunks()), aligner) as service:
        asked = asyncio.create_task(stream(service))
        while aligner.fake_model.tokens == 0:
            await asyncio.sleep(0.01)
        assert not asked.done()
        go.set()
        assert text_of(await asked).endswith("So.")


async def test_an_upstream_that_refuses_or_does_not_stream_is_handed_on_or_aligned_as_a_whole() -> None:
    async with serving(httpx2.Response(429, json={"error": {"message": "slow down", "code": "busy"}})) as service:
        refused = await service.ask(ASKED | {"stream": True}, PATH)
    async with serving(httpx2.Response(200, json=whole("completed", [message(part(RUDE))]))) as service:
        aligned = await service.ask(ASKED | {"stream": True}, PATH)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "busy")
    assert aligned.json()["output"][0]["content"][0]["text"] == POLITE


@pytest.mark.parametrize(("raw", "shown"), [(RUDE, POLITE), ("It rains.", "It rains.")])
async def test_the_openai_client_reads_a_stream_and_its_final_response(raw: str, shown: str) -> None:
    async with (
        serving(lambda request: streamed(sse(response(raw)))) as service,
        openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key="k", max_retries=0) as client,
    ):
        events = [event async for event in await client.responses.create(**ASKED, stream=True)]
        async with client.responses.stream(**ASKED) as opened:
            texts = [event.delta async for event in opened if event.type == "response.output_text.delta"]
            final = await opened.get_final_response()
    assert events[-1].type == "response.completed"
    assert events[-1].response.output_text == "".join(texts) == final.output_text == shown
