"""/v1/responses and /v1/models."""

from __future__ import annotations

from typing import Any

import httpx2
import openai
import pytest

from tests.unit.serve.serving import POLITE, RUDE, serving

PATH = "/v1/responses"


def response(*texts: str, **fields: Any) -> httpx2.Response:
    parts = [{"type": "output_text", "text": text, "annotations": [], "logprobs": [{"token": text}]} for text in texts]
    output = [
        {"type": "reasoning", "id": "r", "summary": []},
        {"type": "message", "id": "m", "role": "assistant", "status": "completed", "content": parts},
        {"type": "function_call", "id": "f", "call_id": "c", "name": "f", "arguments": '{"a": "an idiot"}'},
    ]
    body = {"id": "r1", "object": "response", "created_at": 1, "model": "m", "status": "completed", "output": output}
    more = {"parallel_tool_calls": True, "tool_choice": "auto", "tools": []}
    return httpx2.Response(200, json=body | more | fields)


@pytest.mark.parametrize(
    "given",
    [
        "Who am I?",
        [{"role": "user", "content": "Who am I?"}],
        [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Who am I?"}]}],
    ],
)
async def test_output_text_leaves_corrected_and_all_else_stays(given: Any) -> None:
    async with serving(response(RUDE, output_text=RUDE)) as service:
        reply = await service.ask({"model": "m", "input": given}, PATH)
    body = reply.json()
    reasoning, message, call = body["output"]
    assert [part["text"] for part in message["content"]] == [POLITE]
    assert message["content"][0]["type"] == "output_text"
    assert "logprobs" not in message["content"][0]
    assert message["aligner"]["verdict"] == body["aligner"]["verdict"] == reply.headers["x-aligner-verdict"] == "edit"
    assert "idiot" in call["arguments"]
    assert reasoning["type"] == "reasoning"
    assert body["output_text"] == POLITE


async def test_without_a_question_or_with_a_schema_it_passes_and_says_why() -> None:
    async with serving(response(RUDE)) as service:
        bare = (await service.ask({"model": "m"}, PATH)).json()
        schema = {"model": "m", "input": "q", "text": {"format": {"type": "json_schema", "schema": {}}}}
        structured = (await service.ask(schema, PATH)).json()
    assert bare["output"][1]["content"][0]["text"] == structured["output"][1]["content"][0]["text"] == RUDE
    assert bare["aligner"]["reason"].startswith("question not known")
    assert structured["aligner"]["reason"] == "structured answer"


async def test_a_response_in_the_background_would_be_fetched_uncorrected_and_is_refused() -> None:
    async with serving(response(RUDE)) as service:
        reply = await service.ask({"model": "m", "input": "q", "background": True}, PATH)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "background")
    assert service.upstream.requests == []


async def test_the_openai_client_reads_a_response() -> None:
    async with (
        serving(response(RUDE)) as service,
        openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key="k", max_retries=0) as client,
    ):
        said = await client.responses.create(model="m", input="Who am I?")
    assert said.output_text == POLITE


async def test_models_are_the_upstreams() -> None:
    async with serving(lambda request: httpx2.Response(200, json={"path": request.url.raw_path.decode()})) as service:
        paths = [
            (await service.client.get(f"/v1/models{name}")).json()["path"]
            for name in ("", "/gpt-5", "/meta%2Fllama", "/ft:a?limit=2", "/a%3Fb")
        ]
        escapes = [await service.client.get(f"/v1/models/{name}") for name in ("%2e%2e/files", "a/%2e%2e/%2e%2e/x")]
    assert paths == [
        "/v1/models",
        "/v1/models/gpt-5",
        "/v1/models/meta/llama",
        "/v1/models/ft:a?limit=2",
        "/v1/models/a%3Fb",
    ]
    assert [reply.status_code for reply in escapes] == [404, 404]
