"""A small real server, which runs a model of `tests/fakes.py` behind vLLM's or SGLang's API, token by token.

It keeps to what these servers do: token ids in and out, log probabilities, streams, ends of requests whose client has gone.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from aligner_middleware.text.tokenizer import Tokenizer
from tests.fakes import FakeModel

Kind = Literal["vllm", "sglang"]
Answer = Callable[[Request], Response | None]


class ModelServer:
    """The model behind both APIs; a test may change any attribute while it runs.

    Attributes:
        model, tokenizer, kind: As given.
        name: Of the model.
        key: API key that it wants; `None` for none.
        delay: Seconds that each token takes.
        requests: Bodies of the requests for tokens, in order.
        headers: Of the same requests.
        running: How many are running.
        most: How many ran at once at most.
        ended_early: How many were ended because the client had gone.
        answers: Called before anything else, in turn; each is used up once it gives a response.
        break_after: Tokens after which the next streams break off, one number for each.
        deaf: Field names that it does not know, as older servers.
    """

    def __init__(self, model: FakeModel, tokenizer: Tokenizer, kind: Kind = "vllm") -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.kind: Kind = kind
        self.name = "the-aligner"
        self.key: str | None = None
        self.delay = 0.0
        self.requests: list[dict[str, Any]] = []
        self.headers: list[Any] = []
        self.running = self.most = self.ended_early = 0
        self.answers: list[Answer] = []
        self.break_after: list[int] = []
        self.deaf: set[str] = set()
        self.max_model_len = model.max_positions
        self.has_tokenize = True

    # --- the model --------------------------------------------------------------------------------------

    def logs(self, ids: Sequence[int]) -> np.ndarray[Any, Any]:
        """Log probabilities `[V]` of the token after these."""
        logits = np.zeros(self.model.vocabulary)
        said = self.model.rule(list(ids))
        for token, logit in said.items() if not isinstance(said, int) else [(said, self.model.sure)]:
            logits[token] = logit
        peak = logits.max()
        logs: np.ndarray[Any, Any] = logits - peak - np.log(np.exp(logits - peak).sum())
        return logs

    def best(self, logs: np.ndarray[Any, Any], count: int) -> list[int]:
        return [int(token) for token in np.argsort(-logs, kind="stable")[:count]]

    async def steps(self, ids: list[int], most: int, stop: set[int]) -> AsyncIterator[tuple[int, Any, str | None]]:
        """Token, log probabilities, and why it ended, for each step of greedy decoding."""
        ids = list(ids)
        for number in range(most):
            await asyncio.sleep(self.delay)
            logs = self.logs(ids)
            token = self.best(logs, 1)[0]
            ids.append(token)
            ended = "stop" if token in stop else "length" if number == most - 1 else None
            yield token, logs, ended
            if ended:
                return

    # --- the APIs ---------------------------------------------------------------------------------------

    def app(self) -> FastAPI:
        app = FastAPI()
        app.add_middleware(_First, server=self)
        app.get("/v1/models")(self.models)
        app.post("/tokenize")(self.tokenize)
        if self.kind == "vllm":
            app.get("/version")(self.version)
            app.post("/v1/completions")(self.completions)
        else:
            app.get("/server_info")(self.server_info)
            app.post("/generate")(self.generate)
        return app

    def first(self, request: Request) -> Response | None:
        """Give the response of a request that goes no further."""
        for answer in list(self.answers):
            if (response := answer(request)) is not None:
                self.answers.remove(answer)
                return response
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            return JSONResponse({"error": "Unauthorized"}, 401)
        return None

    async def models(self) -> Any:
        card = {"id": self.name, "owned_by": self.kind, "max_model_len": self.max_model_len}
        return {"object": "list", "data": [card]}

    async def version(self) -> Any:
        return {"version": "0.99"}

    @property
    def longest_prompt(self) -> int:
        """SGLang refuses a prompt of this length, and none below."""
        return self.max_model_len - 6

    async def server_info(self) -> Any:
        return {"version": "0.99", "max_req_input_len": self.longest_prompt}

    async def tokenize(self, request: Request) -> Any:
        if not self.has_tokenize:
            return JSONResponse({"detail": "Not Found"}, 404)
        text = (await request.json())["prompt"]
        special = self.tokenizer.special
        return {"tokens": [special[text]] if text in special else self.tokenizer.encode(text)}

    async def _body(self, request: Request) -> dict[str, Any]:
        body = {name: value for name, value in (await request.json()).items() if name not in self.deaf}
        self.requests.append(body)
        self.headers.append(request.headers)
        return body

    @contextmanager
    def _runs(self) -> Iterator[None]:
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            yield
        except (asyncio.CancelledError, GeneratorExit):
            self.ended_early += 1
            raise
        finally:
            self.running -= 1

    async def _alone(self, request: Request, work: Any) -> Any:
        """Run work that ends when the client goes away."""

        async def gone() -> None:
            while not await request.is_disconnected():
                await asyncio.sleep(0.005)

        with self._runs():
            tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if not tasks[0].done():
                tasks[0].cancel()
                self.ended_early += 1
                return Response(status_code=499)
            tasks[1].cancel()
            return tasks[0].result()

    async def completions(self, request: Request) -> Any:
        body = await self._body(request)
        if body["model"] != self.name:
            message = f"The model `{body['model']}` does not exist."
            return JSONResponse({"error": {"message": message, "type": "NotFoundError", "code": 404}}, 404)
        ids: list[int] = body["prompt"]
        if len(ids) + body["max_tokens"] > self.max_model_len:
            return JSONResponse({"error": {"message": "This model's maximum context length is reached."}}, 400)
        if body.get("stream"):
            return StreamingResponse(self._vllm_stream(body), media_type="text/event-stream")

        async def whole() -> Any:
            choice: dict[str, Any] = {"index": 0, "text": "", "finish_reason": "length", "token_ids": []}
            if body.get("prompt_logprobs"):
                choice["prompt_logprobs"] = [None, *(self._given(ids, at) for at in range(1, len(ids)))]
            await asyncio.sleep(self.delay)
            logs = self.logs(ids)
            choice["token_ids"] = self.best(logs, 1)
            if "logprobs" in body:
                wanted = body.get("logprob_token_ids") or self.best(logs, body["logprobs"])
                choice["logprobs"] = self._named([*choice["token_ids"], *wanted], logs)
            return {"choices": [choice], "usage": {}}

        return await self._alone(request, whole())

    def _given(self, ids: list[int], at: int) -> dict[str, Any]:
        logs = self.logs(ids[:at])
        tokens = {ids[at], *self.best(logs, 1)}
        return {str(token): {"logprob": max(float(logs[token]), -9999.0), "rank": 1} for token in tokens}

    def _named(self, tokens: list[int], logs: Any) -> dict[str, Any]:
        top = {f"token_id:{token}": max(float(logs[token]), -9999.0) for token in tokens}
        return {"tokens": [f"token_id:{tokens[0]}"], "top_logprobs": [top]}

    async def _vllm_stream(self, body: dict[str, Any]) -> AsyncIterator[bytes]:
        cut, count = (self.break_after.pop(0) if self.break_after else None), 0
        together: list[tuple[int, Any]] = []
        with self._runs():
            async for token, logs, ended in self.steps(body["prompt"], body["max_tokens"], set(body["stop_token_ids"])):
                if count == cut:
                    return
                count += 1
                together.append((token, logs))
                if ended is None and count > 1 and len(together) < body.get("stream_interval", 1):
                    continue
                tokens = [one for one, _ in together]
                # A line separator is no line's end in a stream of events.
                choice: dict[str, Any] = {"index": 0, "text": "\u2028", "finish_reason": ended}
                if body.get("return_token_ids"):
                    choice["token_ids"] = tokens
                if top := body.get("logprobs"):
                    named = [self._named([one, *self.best(its, top)], its) for one, its in together]
                    choice["logprobs"] = {name: [one[name][0] for one in named] for name in ("tokens", "top_logprobs")}
                together.clear()
                yield f"data: {json.dumps({'choices': [choice]}, ensure_ascii=False)}\n\n".encode()
            yield b"data: [DONE]\n\n"

    async def generate(self, request: Request) -> Any:
        body = await self._body(request)
        settings, ids = body["sampling_params"], body["input_ids"]
        if len(ids) + settings["max_new_tokens"] > self.max_model_len or (
            len(ids) >= self.longest_prompt and not body.get("stream")
        ):
            return JSONResponse({"error": {"message": "Requested token count exceeds the maximum."}}, 400)
        if body.get("stream"):
            return StreamingResponse(self._sglang_stream(body), media_type="text/event-stream")

        async def whole() -> Any:
            logs = self.logs(ids)
            best = self.best(logs, 1)[0]
            meta: dict[str, Any] = {"completion_tokens": 1, "finish_reason": {"type": "length", "length": 1}}
            meta["output_top_logprobs"] = [[[float(logs[best]), best, None]]]
            if tokens := body.get("token_ids_logprob"):
                meta["output_token_ids_logprobs"] = [[[float(logs[token]), token, None] for token in tokens]]
            start = body["logprob_start_len"]
            if 0 <= start < len(ids):
                given = [(at, self.logs(ids[:at])) for at in range(start + 1, len(ids))]
                meta["input_token_logprobs"] = [[None, ids[start], None]]
                meta["input_token_logprobs"] += [[float(logs[ids[at]]), ids[at], None] for at, logs in given]
                tops = [(self.best(logs, 1)[0], logs) for _, logs in given]
                meta["input_top_logprobs"] = [None, *([[float(logs[top]), top, None]] for top, logs in tops)]
            return {"text": "", "output_ids": [best], "meta_info": meta}

        assert settings["max_new_tokens"] == 1
        return await self._alone(request, whole())

    async def _sglang_stream(self, body: dict[str, Any]) -> AsyncIterator[bytes]:
        cut, written = (self.break_after.pop(0) if self.break_after else None), list[int]()
        settings, tops = body["sampling_params"], list[Any]()
        if len(body["input_ids"]) >= self.longest_prompt:
            yield sglang_abort("Input length exceeds the maximum allowed length.", 400)
            return
        sent, interval = 0, settings.get("stream_interval") or 1
        with self._runs():
            steps = self.steps(body["input_ids"], settings["max_new_tokens"], set(settings["stop_token_ids"]))
            async for token, logs, ended in steps:
                if len(written) == cut:
                    return
                written.append(token)
                meta: dict[str, Any] = {"completion_tokens": len(written)}
                meta["finish_reason"] = {"type": ended} if ended else None
                if body.get("return_logprob"):
                    best = self.best(logs, body["top_logprobs_num"])
                    tops.append([[float(logs[one]), one, None] for one in best])
                    meta["output_top_logprobs"] = tops
                if ended is None and sent and len(written) - sent < interval:
                    continue
                sent = len(written)
                yield f"data: {json.dumps({'text': '', 'output_ids': written, 'meta_info': meta})}\n\n".encode()
            yield b"data: [DONE]\n\n"


def sglang_abort(message: str, status: int | None) -> bytes:
    """Give the only event of a stream that SGLang gives up; a token that the model never wrote is in it."""
    reason = {"type": "abort", "message": message, "status_code": status}
    meta = {"completion_tokens": 1, "finish_reason": reason}
    return f"data: {json.dumps({'text': '_', 'output_ids': [79], 'meta_info': meta})}\n\n".encode()


class _First:
    def __init__(self, app: ASGIApp, server: ModelServer) -> None:
        self.app = app
        self.server = server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = self.server.first(Request(scope)) if scope["type"] == "http" else None
        await (response or self.app)(scope, receive, send)


class _Uvicorn(uvicorn.Server):
    def install_signal_handlers(self) -> None:
        pass


class Running:
    """A server that listens on a port of its own; `stop` and `start` again, on the same port."""

    def __init__(self, server: ModelServer) -> None:
        self.server = server
        self.port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> None:
        config = uvicorn.Config(self.server.app(), port=self.port, log_level="critical", timeout_graceful_shutdown=0)
        self._uvicorn = _Uvicorn(config)
        self._thread = threading.Thread(target=self._uvicorn.run, daemon=True)
        self._thread.start()
        while not self._uvicorn.started:
            assert self._thread.is_alive()
            time.sleep(0.005)
        self.port = self._uvicorn.servers[0].sockets[0].getsockname()[1]

    def stop(self) -> None:
        self._uvicorn.should_exit = self._uvicorn.force_exit = True
        self._thread.join()


@contextmanager
def running(server: ModelServer) -> Iterator[Running]:
    """Run a server."""
    one = Running(server)
    try:
        yield one
    finally:
        one.stop()
