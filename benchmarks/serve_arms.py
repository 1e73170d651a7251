"""The processes of `serve_load.py`: a stub of an upstream, the service, and what stands in its place.

`python -m serve_arms PORT` (in this folder) is the stub: OpenAI's chat completions, whole and streamed, of held-out answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import psutil
import yaml

from aligner_middleware.locations import DEFAULT_FOLDER
from aligner_middleware.serve.keys import hash_key

HERE = Path(__file__).parent
MODEL = "stub"
KEY = "sk-serve-load"  # of every server that wants one; a real one is never needed here
_PATIENCE = 180  # seconds in which a process has to answer
_WORDS = re.compile(r"\S+\s*")


def held_out() -> list[tuple[str, str]]:
    """Read the held-out pairs of question and answer, one for each question, in an order that mixes their kinds."""
    lines = (DEFAULT_FOLDER / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
    pairs = list({row["question"]: row["answer"] for row in map(json.loads, lines)}.items())
    random.Random(0).shuffle(pairs)
    return pairs


# --- the stub ----------------------------------------------------------------------------------------------

Send = Callable[[dict[str, Any]], Awaitable[None]]


class Stub:
    """Answers a chat completion by the held-out answer to its question, at once, as of ASGI.

    A stream comes in words, over as many seconds as `metadata.seconds` of the request says.
    """

    def __init__(self) -> None:
        self._answers = dict(held_out())

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Send) -> None:
        """Serve a request."""
        if scope["type"] != "http":
            return
        parts, more = [], True
        while more:
            message = await receive()
            parts.append(message.get("body", b""))
            more = message.get("more_body", False)
        given = dict(scope["headers"]).get(b"x-client-request-id")
        headers = [(b"x-request-id", given)] if given else []
        if scope["method"] == "GET":
            models = {"object": "list", "data": [{"id": MODEL, "object": "model", "owned_by": "stub"}]}
            await _whole(send, models, headers)
            return
        body = json.loads(b"".join(parts))
        answer = self._answers[body["messages"][-1]["content"]]
        if body.get("stream"):
            await _streamed(send, answer, float((body.get("metadata") or {}).get("seconds", 0)))
            return
        message = {"role": "assistant", "content": answer}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        shared = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": MODEL}
        await _whole(send, shared | {"choices": [choice], "usage": usage}, headers)


async def _whole(send: Send, body: dict[str, Any], headers: list[tuple[bytes, bytes]]) -> None:
    content = json.dumps(body).encode()
    headers = [*headers, (b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": content})


async def _streamed(send: Send, answer: str, seconds: float) -> None:
    headers = [(b"content-type", b"text/event-stream")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    words = _WORDS.findall(answer)
    for place in range(len(words) + 1):
        end = place == len(words)
        delta = {} if end else {"content": words[place]}
        choice = {"index": 0, "delta": delta, "finish_reason": "stop" if end else None}
        shared = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": MODEL}
        await _event(send, json.dumps(shared | {"choices": [choice]}))
        if seconds and not end:
            await asyncio.sleep(seconds / len(words))
    await _event(send, "[DONE]")
    await send({"type": "http.response.body", "body": b""})


async def _event(send: Send, data: str) -> None:
    await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})


# --- processes ---------------------------------------------------------------------------------------------


@dataclass
class Server:
    """A process that answers at an address."""

    name: str
    url: str
    process: subprocess.Popen[bytes]

    def cpu(self) -> float:
        """Give the seconds of processor time that it and its children used."""
        return sum(sum(one.cpu_times()[:2]) for one in self._family())

    def megabytes(self) -> float:
        """Give the memory that it and its children hold (RSS)."""
        return float(sum(one.memory_info().rss for one in self._family()) / 1e6)

    def settle(self) -> None:
        """Wait until it is idle: requests that a load generator left behind are given up a little later."""
        before = -1.0
        while self.cpu() > before + 0.05:
            before = self.cpu()
            time.sleep(0.5)

    def _family(self) -> list[psutil.Process]:
        own = psutil.Process(self.process.pid)
        return [own, *own.children(recursive=True)]


@contextlib.contextmanager
def started(name: str, command: list[str], port: int, ready: str, folder: Path, **more: str) -> Iterator[Server]:
    """Start a server, wait until a path of it answers with status 200, and end it."""
    environment = os.environ | more
    log = folder / f"{name}.log"
    with log.open("w") as output:
        process = subprocess.Popen(command, env=environment, cwd=folder, stdout=output, stderr=output)
    server = Server(name, f"http://127.0.0.1:{port}", process)
    try:
        end = time.monotonic() + _PATIENCE
        while not _answers(server.url + ready):
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"{name} does not start; the end of its log:\n{log.read_text()[-3000:]}")
            time.sleep(0.2)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(40)
        except subprocess.TimeoutExpired:
            process.kill()


def stub(folder: Path) -> contextlib.AbstractContextManager[Server]:
    """Start the stub of an upstream."""
    port = free_port()
    paths = os.pathsep.join([str(HERE), str(HERE.parent)])
    return started(
        "stub", [sys.executable, "-m", "serve_arms", str(port)], port, "/v1/models", folder, PYTHONPATH=paths
    )


def service(folder: Path, upstream: Server, name: str = "aligner", **settings: Any) -> Any:
    """Start `aligner serve` as a user does: by a file of settings, with a key that corrects and one of shadow mode."""
    port, file = free_port(), folder / f"{name}.yaml"
    settings["keys"] = [{"name": mode, "mode": mode, "sha256": hash_key(KEY + mode)} for mode in ("correct", "shadow")]
    file.write_text(yaml.safe_dump({"port": port, "upstream": f"{upstream.url}/v1", **settings}))
    command = [sys.executable, "-m", "aligner_middleware", "serve", "--config", str(file)]
    return started(name, command, port, "/readyz", folder, PYTHONPATH=str(HERE.parent))


def litellm(folder: Path, upstream: Server, program: Path) -> Any:
    """Start LiteLLM's proxy alone: one model, no database, no guardrail."""
    port, file = free_port(), folder / "litellm.yaml"
    params = {"model": f"openai/{MODEL}", "api_base": f"{upstream.url}/v1", "api_key": "none"}
    config = {
        "model_list": [{"model_name": MODEL, "litellm_params": params}],
        "litellm_settings": {"telemetry": False, "num_retries": 0},
        "general_settings": {"master_key": KEY},
    }
    file.write_text(yaml.safe_dump(config))
    command = [str(program), "--config", str(file), "--host", "127.0.0.1", "--port", str(port)]
    alone = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_TELEMETRY": "False", "PYTHONPATH": ""}
    return started("litellm", command, port, "/health/liveliness", folder, **alone)


def nemo(folder: Path, upstream: Server, program: Path) -> Any:
    """Start NeMo Guardrails' server on a configuration without rails: it passes requests on to the upstream."""
    port, config = free_port(), folder / "nemo" / "passing"
    config.mkdir(parents=True, exist_ok=True)
    parameters = {"base_url": f"{upstream.url}/v1", "api_key": "none"}
    model = {"type": "main", "engine": "openai", "model": MODEL, "parameters": parameters}
    (config / "config.yml").write_text(yaml.safe_dump({"models": [model], "passthrough": True}))
    command = [str(program), "server", "--config", str(config.parent), "--port", str(port)]
    alone = {"OPENAI_API_KEY": "none", "OPENAI_BASE_URL": f"{upstream.url}/v1", "PYTHONPATH": ""}
    return started("nemo", command, port, "/v1/rails/configs", folder, **alone)


def free_port() -> int:
    """Find a free port of this machine."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def _answers(url: str) -> bool:
    with contextlib.suppress(httpx2.HTTPError):
        return httpx2.get(url, timeout=2).status_code == 200
    return False


if __name__ == "__main__":
    import uvicorn

    uvicorn.run(Stub(), host="127.0.0.1", port=int(sys.argv[1]), log_level="warning", access_log=False)
