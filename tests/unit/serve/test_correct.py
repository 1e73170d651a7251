"""`/v1/correct` and its batch: whole, as lines of JSON, with options, and with errors."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient

from aligner_middleware.serve.app import create_app
from aligner_middleware.serve.correct import MAX_ITEMS, PairBody, as_decided
from aligner_middleware.serve.keys import new_key
from aligner_middleware.serve.service import Decision, Service
from aligner_middleware.serve.settings import KeySettings, PolicySettings, ServeSettings
from aligner_middleware.streaming import CorrectionStream
from tests.fakes import InstantAligner, judging_aligner

INSULT = " Even a moron like you can do that."
KEPT = "Boil it for eight minutes."
PAIR = {"question": "How do I boil an egg?", "answer": KEPT + INSULT}


class Running:
    """An application and what it decided."""

    def __init__(self, client: TestClient) -> None:
        self.client = client
        self.decisions: list[Decision] = []
        client.app.state.service.listeners.append(self.decisions.append)  # type: ignore[attr-defined]

    def post(self, path: str, body: Any, **headers: str) -> Any:
        return self.client.post(path, json=body, headers=headers)


def start(**settings: Any) -> Iterator[Running]:
    aligner = judging_aligner(lambda question, answer: answer.replace(INSULT, ""))
    with aligner, TestClient(create_app(ServeSettings(**settings), aligner)) as client:
        yield Running(client)


@pytest.fixture
def app() -> Iterator[Running]:
    yield from start()


def test_an_answer_is_corrected_and_told_of(app: Running) -> None:
    reply = app.post("/v1/correct", PAIR).json()
    assert (reply["corrected"], reply["changed"], reply["aligned"]) == (KEPT, True, True)
    assert reply["verdict"] in ("edit", "rewrite")
    assert reply["score"] > 0.9
    assert (reply["model"], reply["finish_reason"], reply["doubts"]) == ("fake", "stop", [])
    assert reply["usage"]["passes"] > 0
    (decision,) = app.decisions
    assert (decision.route, decision.text, decision.client.name) == ("/v1/correct", KEPT, "anonymous")


def test_a_good_answer_comes_back_as_it_is(app: Running) -> None:
    reply = app.post("/v1/correct", PAIR | {"answer": KEPT}).json()
    assert (reply["corrected"], reply["changed"], reply["verdict"]) == (KEPT, False, "keep")


def test_shadow_mode_of_a_request_changes_nothing_and_says_what_it_would_do(app: Running) -> None:
    reply = app.post("/v1/correct", PAIR | {"mode": "shadow"}).json()
    assert (reply["corrected"], reply["would_change"], reply["proposed"]) == (PAIR["answer"], True, KEPT)
    assert app.decisions[0].client.policy.mode == "shadow"


def test_a_strength_of_a_request_holds(app: Running) -> None:
    assert not app.post("/v1/correct", PAIR | {"strength": 1}).json()["changed"]
    assert app.post("/v1/correct", PAIR | {"strength": "high"}).json()["changed"]


@pytest.mark.parametrize("field", ["strength", "mode"])
def test_a_policy_may_allow_no_options(field: str) -> None:
    for app in start(policy=PolicySettings(overrides=False)):
        reply = app.post("/v1/correct", PAIR | {field: "low" if field == "strength" else "shadow"})
        assert (reply.status_code, reply.json()["error"]["param"]) == (403, field)
        assert app.post("/v1/correct", PAIR).status_code == 200


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"question": "Q", "anser": "A"}, "unknown field 'anser'; did you mean 'answer'?"),
        ({"question": "Q", "answer": "A", "{x}": 1}, "unknown field '{x}'; there are"),
        ({"question": "Q"}, "answer: Field required"),
        ({"question": "Q", "answer": 5}, "answer: Input should be a valid string"),
        ({"question": "Q", "answer": "A", "strength": "hihg"}, "strength"),
        ({"question": "Q", "answer": "A", "strength": 2}, "strength is 2.0: expected a score from 0 to 1"),
        ({"question": "Q", "answer": "A", "mode": "correcting"}, "mode"),
        ({"question": "Q", "answer": "A" * 200_001}, "answer"),
        ([], "body"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_request_that_does_not_fit_is_refused_in_openais_shape(app: Running, body: Any, said: str) -> None:
    reply = app.post("/v1/correct", body)
    assert reply.status_code == 400
    assert said in reply.json()["error"]["message"]
    assert reply.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "content", [b'{"question": "Q", "answer": "\\ud800"}', b'{"question": "Q", "answer": "A"', b"\xff"]
)
def test_a_body_that_is_no_text_is_refused(app: Running, content: bytes) -> None:
    reply = app.client.post("/v1/correct", content=content, headers={"content-type": "application/json"})
    assert reply.status_code == 400
    assert reply.json()["error"]["message"]


def test_a_question_that_is_blank_cannot_be_corrected(app: Running) -> None:
    for body in (PAIR | {"question": " "}, PAIR | {"question": " ", "stream": True}):
        reply = app.post("/v1/correct", body)
        assert (reply.status_code, reply.json()["error"]["code"]) == (422, "cannot_be_corrected")
    assert {decision.error for decision in app.decisions} == {"InputError"}


def lines_of(reply: Any) -> list[dict[str, Any]]:
    assert reply.status_code == 200
    assert reply.headers["content-type"].startswith("application/x-ndjson")
    return [json.loads(line) for line in reply.text.splitlines()]


@pytest.mark.parametrize("more", [{}, {"mode": "shadow"}, {"answer": KEPT}, {"answer": ""}, {"answer": '{"a": 1}'}])
def test_the_pieces_of_a_stream_are_the_text_of_its_last_line(app: Running, more: dict[str, str]) -> None:
    whole = app.post("/v1/correct", PAIR | more).json()
    *pieces, last = lines_of(app.post("/v1/correct", PAIR | more | {"stream": True}))
    assert "".join(piece["text"] for piece in pieces) == last["corrected"] == whole["corrected"]
    assert [last[name] for name in ("verdict", "changed", "would_change")] == [
        whole[name] for name in ("verdict", "changed", "would_change")
    ]
    assert len(app.decisions) == 2


class BreakingFlow:
    """Gives a piece, and fails."""

    correction = None

    def steps(self) -> Iterator[str]:
        yield "Boil"
        raise RuntimeError("a secret of the engine")

    def free(self) -> None:
        pass


class BreakingAligner(InstantAligner):
    def stream(self, question: str, answer: Any, **options: Any) -> CorrectionStream:
        return CorrectionStream(BreakingFlow())  # type: ignore[arg-type]


def test_a_failure_after_the_first_piece_is_the_last_line() -> None:
    with (
        BreakingAligner(lambda question, answer: answer) as aligner,
        TestClient(create_app(ServeSettings(), aligner)) as client,
    ):
        first, last = lines_of(client.post("/v1/correct", json=PAIR | {"stream": True}))
    assert first == {"text": "Boil"}
    assert last["error"]["code"] == "aligner_failed"
    assert "secret" not in last["error"]["message"]


async def test_a_batch_whose_client_is_gone_is_given_up() -> None:
    started = 0

    class Slow(InstantAligner):
        async def acorrect_batch(self, pairs: Any, **options: Any) -> Any:
            nonlocal started
            started += 1
            await asyncio.sleep(60)

    with Slow(lambda question, answer: answer) as aligner:
        service = Service(ServeSettings(), aligner)
        pairs = [PairBody(**PAIR)] * 40
        results = as_decided(service, service.client(None), pairs)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(results), 0.2)
        await results.aclose()
        assert 0 < started <= 16  # and no more begin
        assert len(asyncio.all_tasks()) == 1


BATCH = {"items": [PAIR, {"question": "", "answer": "A"}, PAIR | {"answer": KEPT}]}


def test_a_batch_is_in_order_and_each_item_has_its_own_error(app: Running) -> None:
    reply = app.post("/v1/correct/batch", BATCH)
    first, second, third = reply.json()["results"]
    assert [item["index"] for item in (first, second, third)] == [0, 1, 2]
    assert (first["result"]["corrected"], third["result"]["verdict"]) == (KEPT, "keep")
    assert (second["error"]["code"], second["result"]) == ("cannot_be_corrected", None)
    assert len(app.decisions) == 3


def test_a_batch_as_lines_has_every_index_once(app: Running) -> None:
    lines = lines_of(app.post("/v1/correct/batch", BATCH, accept="application/x-ndjson"))
    assert sorted(line["index"] for line in lines) == [0, 1, 2]
    assert [line["index"] for line in lines if "error" in line] == [1]


def test_a_batch_has_bounds_and_its_items_too(app: Running) -> None:
    for items in ([], [PAIR] * (MAX_ITEMS + 1), [PAIR | {"anwser": "A"}]):
        assert app.post("/v1/correct/batch", {"items": items}).status_code == 400


def test_a_key_is_asked_for_before_the_body_is_looked_at() -> None:
    key, hashed = new_key()
    for app in start(keys=(KeySettings(name="shop", sha256=hashed, mode="shadow"),)):
        assert app.post("/v1/correct", {}).status_code == 401
        for headers in ({"authorization": f"Bearer {key}"}, {"x-api-key": key}):
            assert app.post("/v1/correct", PAIR, **headers).json()["mode"] == "shadow"
        assert app.post("/v1/correct", PAIR, **{"x-api-key": "alk-wrong"}).status_code == 401
        assert {decision.client.name for decision in app.decisions} == {"shop"}
