"""LiteLLM's Generic Guardrail API: questions of requests, answers of responses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from aligner_middleware.errors import MissingQuestionError
from aligner_middleware.serve.litellm import PATH, Call, Calls, question_of_rows
from aligner_middleware.serve.settings import PolicySettings
from tests.unit.serve.test_correct import INSULT, KEPT, Running, start

ANSWER = KEPT + INSULT
ROWS = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": None},
    {"role": "user", "content": [{"type": "text", "text": "How do I boil an egg?"}, {"type": "image_url"}]},
]


@pytest.fixture
def app() -> Iterator[Running]:
    yield from start()


def request(call: str = "c", **more: Any) -> dict[str, Any]:
    return {"input_type": "request", "texts": ["Hello"], "structured_messages": ROWS, "litellm_call_id": call} | more


def response(*texts: str, call: str = "c", **more: Any) -> dict[str, Any]:
    return {"input_type": "response", "texts": list(texts), "litellm_call_id": call, "structured_messages": None} | more


def test_a_request_passes_and_its_question_is_known_for_the_response(app: Running) -> None:
    assert app.post(PATH, request()).json() == {"action": "NONE", "texts": ["Hello"]}
    reply = app.post(PATH, response(ANSWER, KEPT)).json()
    holdback = [len(KEPT), len(KEPT)]  # all of both
    assert reply == {"action": "GUARDRAIL_INTERVENED", "texts": [KEPT, KEPT], "stream_holdback_chars": holdback}
    assert {decision.question for decision in app.decisions} == {"How do I boil an egg?"}
    assert app.post(PATH, response(KEPT)).json()["action"] == "NONE"


def test_several_processes_refuse_it_since_a_question_and_its_answer_might_not_meet() -> None:
    for app in start(workers=2):
        for body in (request(), response(ANSWER)):
            reply = app.post(PATH, body)
            assert (reply.status_code, reply.json()["error"]["code"]) == (501, "needs_one_worker")
            assert "set workers to 1" in reply.json()["error"]["message"]


def test_the_end_of_a_stream_that_is_sent_again_is_decided_once(app: Running) -> None:
    app.post(PATH, request())
    assert app.post(PATH, response(ANSWER)).json() == app.post(PATH, response(ANSWER)).json()
    assert len(app.decisions) == 1


def test_a_conversation_that_comes_with_the_response_counts(app: Running) -> None:
    assert app.post(PATH, response(ANSWER, structured_messages=ROWS)).json()["texts"] == [KEPT]


@pytest.mark.parametrize(
    "more", [{"call": "other"}, {"litellm_call_id": None}, {"request_data": {"user_api_key_hash": "someone else's"}}]
)
def test_another_calls_question_is_not_taken(app: Running, more: dict[str, Any]) -> None:
    app.post(PATH, request())
    assert app.post(PATH, response(ANSWER, **more)).json()["action"] == "NONE"
    assert "[pre_call, post_call]" in app.decisions[0].metadata["reason"]


def test_a_failed_correction_blocks_where_the_policy_raises() -> None:
    rows = [{"role": "user", "content": "Q" * 9000}]  # with it nothing fits into the context
    for app in start():
        app.post(PATH, request(structured_messages=rows))
        reply = app.post(PATH, response(ANSWER, KEPT)).json()
        assert (reply["action"], reply["texts"]) == ("BLOCKED", ["", ""])
        assert "could not be checked" in reply["blocked_reason"]
    for app in start(policy=PolicySettings(on_error="passthrough")):
        app.post(PATH, request(structured_messages=rows))
        assert app.post(PATH, response(ANSWER)).json()["texts"] == [ANSWER]


def test_parameters_of_the_guardrail_are_options_where_the_policy_allows_them() -> None:
    never: dict[str, Any] = {"additional_provider_specific_params": {"strength": 1}}
    for app in start():
        app.post(PATH, request())
        assert app.post(PATH, response(ANSWER, **never)).json()["action"] == "NONE"
        reply = app.post(PATH, response(ANSWER, additional_provider_specific_params={"strenght": 1}))
        assert (reply.status_code, "did you mean 'strength'?" in reply.text) == (400, True)
    for app in start(policy=PolicySettings(overrides=False)):
        assert app.post(PATH, response(ANSWER, **never)).status_code == 403


def test_a_response_without_texts_passes(app: Running) -> None:
    assert app.post(PATH, response(tool_calls=[{"id": "t"}])).json()["action"] == "NONE"
    assert app.decisions == []


@pytest.mark.parametrize(
    "rows", [[], [{"role": "system", "content": "S"}], [{"role": "user"}], [{"role": "user", "content": [5]}]]
)
def test_a_conversation_without_a_question_says_so(rows: list[dict[str, Any]]) -> None:
    assert isinstance(question_of_rows(rows), MissingQuestionError)


def test_the_oldest_calls_are_forgotten_by_number_and_by_size() -> None:
    calls = Calls()
    for number in range(10_001):
        calls.add((str(number),), Call("Q"))
    assert len(calls) == 10_000
    assert isinstance(calls.find(("0",)).question, MissingQuestionError)
    assert calls.find(("10000",)).question == "Q"
    for number in range(40):
        calls.add((f"large {number}",), Call("Q" * 2**20))
    assert len(calls) == 32
