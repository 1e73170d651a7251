"""/v1/chat/completions without a stream: the answer leaves corrected, all else as it came."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx2
import openai
import pytest
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI

from aligner_middleware.serve.keys import new_key
from tests.fakes import judging_aligner
from tests.unit.serve.serving import ASKED, POLITE, RUDE, completion, serving, without_insult


async def test_an_answer_leaves_corrected_with_its_decision() -> None:
    async with serving(completion(RUDE)) as service:
        response = await service.ask()
    body = response.json()
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": POLITE}
    assert choice["finish_reason"] == "stop"
    assert choice["aligner"]["verdict"] == "edit"
    assert choice["aligner"]["changed"] is True
    assert choice["aligner"]["model"] == "fake"
    assert choice["aligner"]["score"] > 0.9
    assert choice["aligner"]["usage"]["passes"] > 0
    assert body["aligner"] == choice["aligner"]
    assert {"id", "created", "model", "usage", "object"} <= body.keys()
    assert response.headers["x-aligner-verdict"] == "edit"
    assert int(response.headers["x-aligner-duration-ms"]) >= 0


async def test_the_request_reaches_the_upstream_byte_for_byte() -> None:
    raw = b'{ "model":"m","unknown":{"a":[1]},\n"messages":[{"role":"user","content":"\\u00e9","name":"x"}]}'
    async with serving(completion("Fine.")) as service:
        response = await service.ask(raw, path="/v1/chat/completions?api-version=2")
    (request,) = service.upstream.requests
    assert response.json()["choices"][0]["aligner"]["verdict"] == "keep"
    assert request.content == raw
    assert str(request.url) == "http://upstream/v1/chat/completions?api-version=2"


async def test_choices_are_aligned_together_and_tool_calls_and_reasoning_stay() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"who": "an idiot"}'}}
    other = {"content": None, "tool_calls": [call], "reasoning_content": "an idiot"}
    parts = {"content": [{"type": "text", "text": RUDE}, {"type": "image", "url": "u"}], "annotations": [{"a": 1}]}
    async with serving(completion(RUDE, other, parts)) as service:
        choices = (await service.ask()).json()["choices"]
    assert choices[0]["message"]["content"] == POLITE
    assert choices[1]["message"] == {"role": "assistant", **other}
    assert choices[1]["aligner"]["reason"] == "no text"
    assert choices[2]["message"]["content"] == [{"type": "text", "text": POLITE}, {"type": "image", "url": "u"}]
    assert "annotations" not in choices[2]["message"]


async def test_logprobs_stay_with_a_kept_answer_and_go_with_a_changed_one() -> None:
    def reply(request: httpx2.Request) -> httpx2.Response:
        said = RUDE if b"rude" in request.content else "Fine."
        body = completion(said).json()
        body["choices"][0]["logprobs"] = {"content": [{"token": "x", "logprob": -1}]}
        return httpx2.Response(200, json=body)

    async with serving(reply) as service:
        kept = (await service.ask()).json()["choices"][0]
        changed = (await service.ask({**ASKED, "user": "rude"})).json()["choices"][0]
    assert kept["logprobs"]
    assert changed["logprobs"] is None


async def test_a_structured_answer_passes_and_says_why() -> None:
    async with serving(completion(RUDE)) as service:
        choice = (await service.ask(ASKED | {"response_format": {"type": "json_object"}})).json()["choices"][0]
    assert choice["message"]["content"] == RUDE
    assert choice["aligner"]["reason"] == "structured answer"
    assert choice["aligner"]["aligned"] is False


async def test_shadow_mode_tells_and_changes_nothing() -> None:
    async with serving(completion(RUDE), policy={"mode": "shadow"}) as service:
        choice = (await service.ask()).json()["choices"][0]
    assert choice["message"]["content"] == RUDE
    assert choice["aligner"]["would_change"] is True
    assert choice["aligner"]["proposed"] == POLITE
    assert choice["aligner"]["mode"] == "shadow"


@pytest.mark.parametrize(
    ("messages", "changed"),
    [
        ([{"role": "system", "content": "s"}], False),
        ([{"role": "user", "content": None}], False),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}}]}], False),
        ([{"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "image_url", "image_url": {}}]}], True),
        (
            [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function"}]},
                {"role": "tool", "content": "r", "tool_call_id": "1"},
            ],
            True,
        ),
        ([{"role": ("user", "assistant")[n % 2], "content": "q"} for n in range(2000)], True),
    ],
)
async def test_the_question_is_the_last_user_text_and_without_one_the_answer_passes(
    messages: Any, changed: bool
) -> None:
    async with serving(completion(RUDE)) as service:
        choice = (await service.ask({"model": "m", "messages": messages})).json()["choices"][0]
    assert choice["message"]["content"] == (POLITE if changed else RUDE)
    assert changed or choice["aligner"]["reason"].startswith("question not known")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"{", None),
        (b"\xff\xfe\xfd", None),
        (b"", None),
        (b"[" * 100_000, None),
        (b"[]", None),
        (b'"text"', None),
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"messages": [{"content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "wizard"}]}, "messages[1].role"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages"),
        (ASKED | {"stream": "yes"}, "stream"),
    ],
)
async def test_a_bad_body_gets_400_of_openais_shape_and_goes_no_further(body: Any, param: str | None) -> None:
    async with serving(completion("Fine.")) as service:
        response = await service.ask(body)
    error = response.json()["error"]
    assert response.status_code == 400
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    assert error["param"] == param
    assert service.upstream.requests == []


async def test_ten_megabytes_are_refused() -> None:
    async with serving(completion("Fine.")) as service:
        response = await service.ask(b'{"a": "' + b"x" * 10 * 2**20 + b'"}')
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "body_too_large"


# --- the upstream fails


async def test_an_error_of_the_upstream_is_handed_on_with_status_body_and_retry() -> None:
    error = {"error": {"message": "slow down", "type": "requests", "param": None, "code": "rate_limit_exceeded"}}
    headers = {"retry-after": "7", "x-request-id": "r1", "x-ratelimit-remaining-requests": "0", "set-cookie": "s=1"}
    async with serving(lambda request: httpx2.Response(429, json=error, headers=headers)) as service:
        responses = [await service.ask(), await service.ask(ASKED | {"stream": True})]
    for response in responses:
        assert response.status_code == 429
        assert response.json() == error
        assert response.headers["retry-after"] == "7"
        assert response.headers["x-request-id"] == "r1"
        assert response.headers["x-ratelimit-remaining-requests"] == "0"
        assert "set-cookie" not in response.headers


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (httpx2.ConnectError("refused"), 502, "upstream_failed"),
        (httpx2.ReadTimeout("slow"), 504, "upstream_timeout"),
        (httpx2.ConnectTimeout("slow"), 504, "upstream_timeout"),
        (httpx2.Response(200, text="<html>"), 502, "bad_upstream"),
        (httpx2.Response(200, json=[]), 502, "bad_upstream"),
        (httpx2.Response(200, json={"choices": "x"}), 502, "bad_upstream"),
        (httpx2.Response(200, json={"choices": [{"text": RUDE}]}), 502, "bad_upstream"),
        (httpx2.Response(200, json={"choices": [{"message": {"content": {"text": RUDE}}}]}), 502, "bad_upstream"),
        (httpx2.Response(302, headers={"location": "http://elsewhere"}), 502, "bad_upstream"),
    ],
)
async def test_an_upstream_that_cannot_be_used_is_502_or_504(error: Any, status: int, code: str, stream: bool) -> None:
    async with serving(error) as service:
        response = await service.ask(ASKED | {"stream": stream})
    assert response.status_code == status
    assert response.json()["error"]["code"] == code
    assert RUDE not in response.text


async def test_an_upstream_that_takes_too_long_is_given_up() -> None:
    async def reply(request: httpx2.Request) -> httpx2.Response:
        await asyncio.sleep(60)
        raise AssertionError

    async with serving(reply, upstream_timeout=0.05) as service:
        response = await service.ask()
    assert response.status_code == 504
    assert "0.05 seconds" in response.json()["error"]["message"]


async def test_a_failed_correction_is_an_error_or_passes_by_the_policy() -> None:
    def broken(question: str, answer: str) -> str:
        raise RuntimeError("broken")

    for on_error, status in (("raise", 500), ("passthrough", 200)):
        async with serving(completion(RUDE), judging_aligner(broken), policy={"on_error": on_error}) as service:
            response = await service.ask()
        assert response.status_code == status
        if status == 200:
            assert response.json()["choices"][0]["message"]["content"] == RUDE
            assert "broken" in response.json()["aligner"]["reason"]
        else:
            assert "idiot" not in response.text
            assert "broken" not in response.text


async def test_half_of_a_surrogate_pair_is_refused_or_passes_but_breaks_nothing() -> None:
    raw = json.dumps(completion("x").json()).replace('"x"', '"\\ud83d"').encode()
    reply = httpx2.Response(200, content=raw, headers={"content-type": "application/json"})
    async with serving(reply) as service:
        assert (await service.ask()).status_code == 422
    async with serving(reply, policy={"on_error": "passthrough"}) as service:
        assert b'"\\ud83d"' in (await service.ask()).content


# --- keys


async def test_keys_choose_the_policy_and_others_are_refused() -> None:
    (low, low_hash), (high, high_hash) = new_key(), new_key()
    keys = [
        {"name": "low", "sha256": low_hash, "strength": 0.99},
        {"name": "high", "sha256": high_hash, "strength": 0.01},
    ]
    aligner = judging_aligner(without_insult, lambda question, answer: 0.0)
    async with serving(completion(RUDE), aligner, keys=keys) as service:
        said = [
            await service.ask(headers={"Authorization": f"Bearer {key}".encode()})
            for key in (low, high, "alk-unknown", "é")
        ]
        bare = await service.ask()
    assert [response.status_code for response in (*said, bare)] == [200, 200, 401, 401, 401]
    assert [response.json()["choices"][0]["message"]["content"] for response in said[:2]] == [RUDE, POLITE]
    assert bare.json()["error"]["code"] == "missing_api_key"
    assert all("authorization" not in request.headers for request in service.upstream.requests)


async def test_the_upstreams_key_or_the_clients_own_goes_to_the_upstream() -> None:
    headers = {"Authorization": "Bearer own", "Cookie": "c=1", "OpenAI-Organization": "o", "traceparent": "t"}
    async with serving(completion("Fine.")) as service:
        await service.ask(headers=headers)
    (request,) = service.upstream.requests
    assert request.headers["authorization"] == "Bearer own"
    assert request.headers["openai-organization"] == "o"
    assert request.headers["traceparent"] == "t"
    assert "cookie" not in request.headers
    async with serving(completion("Fine."), upstream_key="secret") as service:
        await service.ask(headers=headers)
    assert service.upstream.requests[0].headers["authorization"] == "Bearer secret"


async def test_more_requests_than_may_run_get_429_with_retry_after() -> None:
    waiting, go = asyncio.Event(), asyncio.Event()

    async def reply(request: httpx2.Request) -> httpx2.Response:
        waiting.set()
        await go.wait()
        return completion("Fine.")

    async with serving(reply, concurrency=1) as service:
        first = asyncio.create_task(service.ask())
        await waiting.wait()
        second = await service.ask()
        go.set()
        assert (await first).status_code == 200
    assert second.status_code == 429
    assert second.headers["retry-after"] == "1"


async def test_a_client_that_goes_away_ends_the_request_of_the_upstream() -> None:
    waiting, cancelled = asyncio.Event(), asyncio.Event()

    async def reply(request: httpx2.Request) -> httpx2.Response:
        waiting.set()
        try:
            await asyncio.sleep(60)
        finally:
            cancelled.set()
        raise AssertionError

    async with serving(reply, concurrency=1) as service:
        asking = asyncio.create_task(service.ask())
        await waiting.wait()
        asking.cancel()
        await asyncio.wait_for(cancelled.wait(), 10)
        service.upstream.reply = completion("Fine.")
        await asyncio.sleep(0.05)
        assert (await service.ask()).status_code == 200


# --- real clients


async def test_the_openai_client_reads_the_answer_and_its_decision() -> None:
    async with (
        serving(lambda request: completion(RUDE, "Fine.")) as service,
        openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key="k", max_retries=0) as client,
    ):
        said: Any = await client.chat.completions.create(model="m", messages=ASKED["messages"], n=2)  # type: ignore[arg-type]
    assert [choice.message.content for choice in said.choices] == [POLITE, "Fine."]
    assert [choice.aligner["verdict"] for choice in said.choices] == ["edit", "keep"]
    assert service.upstream.sent["n"] == 2


async def test_the_openai_client_raises_what_the_upstream_says() -> None:
    reply = httpx2.Response(404, json={"error": {"message": "no model m", "type": "invalid_request_error"}})
    async with (
        serving(reply) as service,
        openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key="k", max_retries=0) as client,
    ):
        with pytest.raises(openai.NotFoundError, match="no model m"):
            await client.chat.completions.create(model="m", messages=ASKED["messages"])  # type: ignore[arg-type]


async def test_langchains_chat_openai_invokes_binds_tools_and_batches() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}

    def reply(request: httpx2.Request) -> httpx2.Response:
        return completion({"content": None, "tool_calls": [call]} if b'"tools"' in request.content else RUDE)

    async with serving(reply) as service:
        llm = ChatOpenAI(base_url=f"{service.url}/v1", api_key="k", model="m", max_retries=0)
        said = await llm.abatch([[HumanMessage("Who?")], [HumanMessage("What?")]])
        tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
        called: Any = await llm.bind_tools([tool]).ainvoke("Who am I?")
    assert [message.content for message in said] == [POLITE, POLITE]
    assert called.tool_calls[0]["name"] == "f"
