"""A policy with `by_sentence`: a stream sends what is kept while the upstream still talks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from pydantic import ValidationError

from aligner_middleware import sentences as module
from aligner_middleware.serve.settings import PolicySettings
from tests.fakes import judging_aligner
from tests.unit.serve.serving import ASKED, DONE, Body, chunk, data, events_of, serving, spoken, streamed, text_of

KEPT = "Turn left. Then go on. It is near."
RUDE, POLITE = "Turn left. Then go on, idiot. It is near.", "Turn left. Then go on, friend. It is near."
POLICY: dict[str, Any] = {"policy": {"by_sentence": True}}


@pytest.fixture(autouse=True)
def _every_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PAUSE", 0.0)


def aligner() -> Any:
    return judging_aligner(lambda question, answer: answer.replace("idiot", "friend"))


def texts(events: list[Any], index: int = 0) -> list[str]:
    choices = [choice for event in events[:-1] for choice in event["choices"] if choice["index"] == index]
    return [choice["delta"]["content"] for choice in choices if choice["delta"].get("content")]


async def test_sentences_leave_as_they_are_kept_and_the_end_has_the_decision() -> None:
    async with serving(streamed([*spoken(RUDE), DONE]), aligner(), **POLICY) as service:
        events = await service.stream()
    assert texts(events) == ["Turn left.", POLITE.removeprefix("Turn left.")]
    (finish,) = events[-2]["choices"]
    assert (finish["aligner"]["verdict"], finish["aligner"]["released"]) == ("edit", len("Turn left."))


async def test_they_leave_before_the_upstream_has_ended() -> None:
    ended = asyncio.Event()

    async def parts() -> AsyncIterator[bytes]:
        yield chunk({"role": "assistant", "content": "Turn left. Then"})
        await ended.wait()
        for part in (chunk({"content": " go on."}), chunk({}, "stop"), DONE):
            yield part

    async with serving(streamed(parts()), aligner(), **POLICY) as service:
        said = ""
        async with service.client.stream("POST", "/v1/chat/completions", json=ASKED | {"stream": True}) as response:
            async for line in response.aiter_text():
                said += line
                if "Turn left." in said and not ended.is_set():
                    assert "Then" not in said
                    ended.set()
    assert text_of(events_of(said)) == "Turn left. Then go on."


async def test_choices_are_decided_on_apart() -> None:
    mixed = [
        part for pair in zip(spoken(KEPT, 0), spoken(KEPT.replace("near", "far"), 1), strict=True) for part in pair
    ]
    async with serving(streamed([*mixed, DONE]), aligner(), **POLICY) as service:
        events = await service.stream(ASKED | {"n": 2})
    assert texts(events, 0) == ["Turn left.", " Then go on.", " It is near."]
    assert texts(events, 1) == ["Turn left.", " Then go on.", " It is far."]


async def test_json_and_structured_answers_leave_whole() -> None:
    said = '{"a": "Turn left. Then go on.", "b": 1}'
    for body in (ASKED, ASKED | {"response_format": {"type": "json_object"}}):
        async with serving(streamed([*spoken(said), DONE]), aligner(), **POLICY) as service:
            events = await service.stream(body)
        assert text_of(events) == said


async def test_a_client_that_goes_away_frees_its_place() -> None:
    body = Body(endless())
    made = aligner()
    async with serving(streamed([]), made, **POLICY) as service:
        service.upstream.reply = lambda request: reply(body)
        async with service.client.stream("POST", "/v1/chat/completions", json=ASKED | {"stream": True}) as response:
            async for _ in response.aiter_text():
                break
        await asyncio.wait_for(body.closed.wait(), 10)
        for _ in range(1000):
            if not made._scheduler._decoder.running:
                break
            await asyncio.sleep(0.01)
        assert not made._scheduler._decoder.running


def reply(body: Body) -> Any:
    response = streamed([])
    response.stream = body
    return response


async def endless() -> AsyncIterator[bytes]:
    for number in range(10_000):
        yield chunk({"content": f"Turn left at {number}. "})
        await asyncio.sleep(0.01)


async def test_an_upstream_that_breaks_off_says_so_after_what_was_sent() -> None:
    async with serving(
        streamed([*spoken(KEPT)[:-1], data({"error": {"message": "gone"}})]), aligner(), **POLICY
    ) as service:
        events = await service.stream()
    assert events[-1]["error"]["message"] == "gone"


async def test_shadow_for_one_request_is_no_contradiction() -> None:
    async with serving(streamed([]), aligner(), **POLICY) as service:
        body = {"question": "q", "answer": RUDE, "mode": "shadow"}
        answered = (await service.ask(body, "/v1/correct", headers={"content-type": "application/json"})).json()
    assert (answered["corrected"], answered["would_change"]) == (RUDE, True)


def test_shadow_mode_and_by_sentence_are_refused_together() -> None:
    with pytest.raises(ValidationError, match="no meaning in mode shadow"):
        PolicySettings(mode="shadow", by_sentence=True)
