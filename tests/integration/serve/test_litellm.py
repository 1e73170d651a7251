"""A real LiteLLM proxy, configured with the guardrail, between clients and a chat model; all on loopback."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import uvicorn
import yaml
from fastapi import FastAPI
from fastapi.responses import JSONResponse, StreamingResponse

from aligner_middleware.serve.app import create_app
from aligner_middleware.serve.keys import new_key
from aligner_middleware.serve.service import Decision
from aligner_middleware.serve.settings import KeySettings, ServeSettings
from tests.fakes import judging_aligner

LITELLM = os.environ.get("ALIGNER_LITELLM") or shutil.which("litellm")
INSULT = " Even a moron like you can do that."
ANSWER = "Boil it for eight minutes." + INSULT
KEPT = "Boil it for eight minutes."
QUESTION = "How do I boil an egg?"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(LITELLM is None, reason="no litellm on PATH: name the executable by ALIGNER_LITELLM"),
]


def stub_upstream() -> FastAPI:
    """A chat model that answers with an insult, with a clean answer where the question says `clean`, or with a tool call."""
    app = FastAPI()

    @app.post("/v1/chat/completions")
    def complete(body: dict[str, Any]) -> Any:
        said = body["messages"][-1]["content"]
        answer = KEPT if "clean" in said else ANSWER
        base = {"id": "chatcmpl-1", "created": 1, "model": "stub"}
        tool = {"id": "t1", "type": "function", "function": {"name": "boil", "arguments": '{"minutes": 8}'}}
        if not body.get("stream"):
            message: dict[str, Any] = {"role": "assistant", "content": answer}
            if "tool" in said:
                message |= {"content": None, "tool_calls": [tool]}
            finish = "tool_calls" if "tool" in said else "stop"
            usage = {"prompt_tokens": 5, "completion_tokens": 9, "total_tokens": 14}
            choices = [{"index": n, "message": message, "finish_reason": finish} for n in range(body.get("n", 1))]
            return JSONResponse(base | {"object": "chat.completion", "choices": choices, "usage": usage})

        def lines() -> Iterator[str]:
            deltas: list[dict[str, Any]] = [{"content": answer[at : at + 4]} for at in range(0, len(answer), 4)]
            if "tool" in said:
                deltas = [*deltas, {"tool_calls": [{"index": 0, **tool}]}]
            for delta in [{"role": "assistant", "content": ""}, *deltas, None]:
                choice = {"index": 0, "delta": delta or {}, "finish_reason": None if delta is not None else "stop"}
                if delta is None and "tool" in said:
                    choice["finish_reason"] = "tool_calls"
                yield f"data: {json.dumps(base | {'object': 'chat.completion.chunk', 'choices': [choice]})}\n\n"
            yield "data: [DONE]\n\n"

        return StreamingResponse(lines(), media_type="text/event-stream")

    return app


@contextlib.contextmanager
def running(app: Any) -> Iterator[str]:
    """Serve an application on a free port of loopback, in a thread."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def guardrail(url: str, key: str, **more: Any) -> dict[str, Any]:
    return {
        "guardrail": "generic_guardrail_api",
        "mode": ["pre_call", "post_call"],
        "api_base": url,
        "api_key": key,
        "streaming_transform_mode": "incremental_diff",
        **more,
    }


def configuration(url: str, upstream: str, key: str) -> dict[str, Any]:
    params = {"model": "openai/stub", "api_base": f"{upstream}/v1", "api_key": "none"}
    strict = {"additional_provider_specific_params": {"strength": 1.0}}
    named = {
        "aligner": guardrail(url, key, streaming_end_of_stream_only=True),
        "sampled": guardrail(url, key, streaming_sampling_rate=2),
        "never": guardrail(url, key, streaming_end_of_stream_only=True, **strict),
        "no-question": guardrail(url, key, streaming_end_of_stream_only=True) | {"mode": "post_call"},
        "wrong-key": guardrail(url, "alk-wrong"),
    }
    return {
        "model_list": [{"model_name": "stub", "litellm_params": params}],
        "guardrails": [{"guardrail_name": name, "litellm_params": params} for name, params in named.items()],
        "litellm_settings": {"telemetry": False, "num_retries": 0},
        "general_settings": {"master_key": "sk-master"},
    }


class Proxy:
    """The proxy, and what the service decided."""

    def __init__(self, url: str, decisions: list[Decision], calls: list[dict[str, Any]], log: Path) -> None:
        self.url = url
        self.decisions = decisions
        self.calls = calls
        self.log = log

    def ask(self, guard: str, question: str = QUESTION, **more: Any) -> httpx2.Response:
        self.decisions.clear()
        self.calls.clear()
        body = {"model": "stub", "messages": [{"role": "user", "content": question}], "guardrails": [guard]}
        headers = {"Authorization": "Bearer sk-master"}
        return httpx2.post(f"{self.url}/v1/chat/completions", json=body | more, headers=headers, timeout=60)


class Recorded:
    """Notes the bodies of an application's requests."""

    def __init__(self, app: Any, calls: list[dict[str, Any]]) -> None:
        self._app = app
        self._calls = calls

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def noting() -> Any:
            message = await receive()
            if message["type"] == "http.request" and message.get("body"):
                self._calls.append(json.loads(message["body"]))
            return message

        await self._app(scope, noting if scope["type"] == "http" else receive, send)


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    folder = tmp_path_factory.mktemp("litellm")
    key, hashed = new_key()
    aligner = judging_aligner(lambda question, answer: answer.replace(INSULT, ""))
    app = create_app(ServeSettings(keys=(KeySettings(name="litellm", sha256=hashed),)), aligner)
    decisions: list[Decision] = []
    calls: list[dict[str, Any]] = []
    with aligner, running(Recorded(app, calls)) as url, running(stub_upstream()) as upstream:
        app.state.service.listeners.append(decisions.append)
        config = folder / "config.yaml"
        config.write_text(yaml.safe_dump(configuration(url, upstream, key)))
        port, log = free_port(), folder / "log"
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment |= {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_TELEMETRY": "False"}
        command = [str(LITELLM), "--config", str(config), "--host", "127.0.0.1", "--port", str(port)]
        with log.open("w") as output:
            process = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=output)
        try:
            wait_for(f"http://127.0.0.1:{port}", process, log)
            yield Proxy(f"http://127.0.0.1:{port}", decisions, calls, log)
        finally:
            process.terminate()
            process.wait(30)


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(600):
        assert process.poll() is None, log.read_text()[-4000:]
        with contextlib.suppress(httpx2.HTTPError):
            if httpx2.get(f"{url}/health/liveliness", timeout=2).status_code == 200:
                return
        time.sleep(0.2)
    raise AssertionError(log.read_text()[-4000:])


def streamed(reply: httpx2.Response) -> tuple[list[str], list[dict[str, Any]]]:
    """The pieces of text of a stream, and all its chunks."""
    assert reply.status_code == 200, reply.text
    lines = [line.removeprefix("data: ") for line in reply.text.splitlines() if line.startswith("data: ")]
    chunks = [json.loads(line) for line in lines if line != "[DONE]"]
    deltas = [choice["delta"] for chunk in chunks for choice in chunk.get("choices", ())]
    return [delta["content"] for delta in deltas if delta.get("content")], chunks


def test_the_insult_is_removed_and_the_question_was_known(proxy: Proxy) -> None:
    reply = proxy.ask("aligner")
    assert reply.status_code == 200, reply.text
    assert reply.json()["choices"][0]["message"]["content"] == KEPT
    (decision,) = proxy.decisions
    assert (decision.question, decision.answer, decision.text) == (QUESTION, ANSWER, KEPT)
    assert decision.metadata["changed"]


def test_the_question_comes_with_the_request_and_not_with_the_response(proxy: Proxy) -> None:
    """Once LiteLLM sends it with responses, questions need not be remembered."""
    proxy.ask("aligner")
    request, response = proxy.calls
    assert (request["input_type"], response["input_type"]) == ("request", "response")
    assert request["structured_messages"] == [{"role": "user", "content": QUESTION}]
    assert response["structured_messages"] is None
    assert request["litellm_call_id"] == response["litellm_call_id"]


def test_a_clean_answer_passes(proxy: Proxy) -> None:
    reply = proxy.ask("aligner", "A clean egg?")
    assert reply.json()["choices"][0]["message"]["content"] == KEPT
    assert proxy.decisions[0].metadata["verdict"] == "keep"


def test_each_of_several_choices_is_corrected(proxy: Proxy) -> None:
    reply = proxy.ask("aligner", n=2)
    assert [choice["message"]["content"] for choice in reply.json()["choices"]] == [KEPT, KEPT]


def test_a_tool_call_passes(proxy: Proxy) -> None:
    (choice,) = proxy.ask("aligner", "a tool?").json()["choices"]
    assert choice["message"]["tool_calls"][0]["function"]["name"] == "boil"


def test_a_stream_gives_corrected_text_only(proxy: Proxy) -> None:
    texts, chunks = streamed(proxy.ask("aligner", stream=True))
    assert "".join(texts) == KEPT
    assert [c["choices"][0]["finish_reason"] for c in chunks if c["choices"]][-1] == "stop"
    assert [decision.question for decision in proxy.decisions] == [QUESTION]


def test_a_sampled_stream_gives_no_undecided_text(proxy: Proxy) -> None:
    texts, _ = streamed(proxy.ask("sampled", stream=True))
    assert "".join(texts) == KEPT
    assert len(proxy.decisions) > 1  # each round is one, of the text so far


def test_a_stream_with_text_and_a_tool_call_gives_both(proxy: Proxy) -> None:
    texts, chunks = streamed(proxy.ask("aligner", "a tool?", stream=True))
    assert "".join(texts) == KEPT
    assert any(choice["delta"].get("tool_calls") for chunk in chunks for choice in chunk["choices"])


def test_a_strength_of_the_configuration_holds(proxy: Proxy) -> None:
    assert proxy.ask("never").json()["choices"][0]["message"]["content"] == ANSWER


def test_without_the_request_the_question_is_not_known_and_the_answer_passes(proxy: Proxy) -> None:
    assert proxy.ask("no-question").json()["choices"][0]["message"]["content"] == ANSWER
    assert "[pre_call, post_call]" in proxy.decisions[0].metadata["reason"]


def test_a_wrong_key_lets_no_answer_through(proxy: Proxy) -> None:
    reply = proxy.ask("wrong-key")
    assert reply.status_code >= 400
    assert "moron" not in reply.text


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_cannot_be_checked_is_blocked(proxy: Proxy, stream: bool) -> None:
    reply = proxy.ask("aligner", "Why? " * 2000, stream=stream)  # with it nothing fits into the aligner's context
    assert "could not be checked" in reply.text
    assert "moron" not in reply.text
