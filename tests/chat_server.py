"""A small real server of OpenAI's chat completions, whose chat model follows a rule."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from tests.fakes import FakeModel, byte_tokenizer
from tests.model_server import ModelServer

_PART = r"(?s)<{0}-([0-9a-f]{{16}})>\n(.*)\n</{0}-\1>"


def part(body: Mapping[str, Any], name: str) -> str:
    """The text between the tags of a part of a request's prompt."""
    found = re.search(_PART.format(name), body["messages"][1]["content"])
    assert found
    return found[2]


def asked_for(body: Mapping[str, Any]) -> str:
    """What a request asks to be written."""
    return str(body["messages"][1]["content"]).rpartition("\n\n")[2]


class ChatServer(ModelServer):
    """A chat model; a test may change any attribute while it runs.

    Attributes:
        correct: Gives the correction of a question and an answer; where it is another text, the verdict is to change.
        names: Of its models.
        words: Tokens of the verdict in place of its own, each with the probabilities of some tokens, the written one first.
        logprobs: Whether it gives log probabilities.
        refuses: Status and message by which it refuses each of some fields.
        size: Characters of an event, as UTF-16 counts them.
        finish: Why its streams end.
    """

    def __init__(self, correct: Callable[[str, str], str]) -> None:
        super().__init__(FakeModel(lambda ids: 0), byte_tokenizer())
        self.correct = correct
        self.names = ["small-chat"]
        self.words: list[dict[str, float]] | None = None
        self.logprobs = True
        self.refuses: dict[str, tuple[int, str]] = {}
        self.size = 3
        self.finish = "stop"

    def app(self) -> FastAPI:
        app = super().app()
        app.post("/v1/chat/completions")(self.chat)
        return app

    async def models(self) -> Any:
        return {"object": "list", "data": [{"id": name, "owned_by": "somebody"} for name in self.names]}

    async def chat(self, request: Request) -> Any:
        body = await self._body(request)
        for name, (status, message) in self.refuses.items():
            if name in body:
                return JSONResponse({"error": {"message": message, "type": "invalid_request_error"}}, status)
        question, answer = part(body, "question"), part(body, "answer")
        text = self.correct(question, answer)
        if body.get("stream"):
            return StreamingResponse(self._events(text), media_type="text/event-stream")
        return await self._alone(request, self._verdict(body, changed=text != answer))

    async def _verdict(self, body: Mapping[str, Any], *, changed: bool) -> Any:
        await asyncio.sleep(self.delay)
        words = self.words or [{"change": 0.97, "keep": 0.02} if changed else {"keep": 0.97, "change": 0.02}]
        message = {"role": "assistant", "content": "".join(next(iter(word)) for word in words)}
        choice: dict[str, Any] = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
        if self.logprobs and body.get("logprobs"):
            choice["logprobs"] = {"content": [_position(word, body.get("top_logprobs", 0)) for word in words]}
        return {"object": "chat.completion", "choices": [choice], "usage": {}}

    async def _events(self, text: str) -> AsyncIterator[bytes]:
        cut = self.break_after.pop(0) if self.break_after else None
        units, step = text.encode("utf-16-le"), 2 * self.size
        pieces = [units[at : at + step].decode("utf-16-le", "surrogatepass") for at in range(0, len(units), step)]
        deltas: list[Any] = [{"role": "assistant", "content": ""}, *({"content": piece} for piece in pieces)]
        with self._runs():
            for number, delta in enumerate(deltas):
                if number == cut:
                    return
                await asyncio.sleep(self.delay)
                yield _event([{"index": 0, "delta": delta, "finish_reason": None}])
            yield _event([{"index": 0, "delta": {}, "finish_reason": self.finish}])
            yield _event([])
            yield b"data: [DONE]\n\n"


def _position(word: Mapping[str, float], top: int) -> Any:
    found = [{"token": token, "logprob": math.log(share), "bytes": None} for token, share in word.items()]
    return found[0] | {"top_logprobs": found[:top]}


def _event(choices: list[Any]) -> bytes:
    return f"data: {json.dumps({'object': 'chat.completion.chunk', 'choices': choices})}\n\n".encode()
