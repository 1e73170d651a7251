"""A small server of the OpenAI chat protocol, so that `api_model.py` needs no key. It answers with whatever it is given."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[dict[str, Any]], dict[str, Any]]
"""A request's body in, a message out: `content`, and `tool_calls` if there are any."""


@contextmanager
def serve(answer: Answer) -> Iterator[str]:
    """Serve `answer` on a free port of this machine, and give its base URL."""

    class Handler(_Handler):
        respond = staticmethod(answer)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    respond: Answer

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        messages = [self.respond(request) for _ in range(request.get("n") or 1)]
        if request.get("stream"):
            self._send("text/event-stream", b"".join(_event(chunk) for chunk in _chunks(request, messages)))
        else:
            self._send("application/json", json.dumps(_completion(request, messages)).encode())

    def _send(self, kind: str, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        """Keep quiet."""


def _completion(request: dict[str, Any], messages: list[dict[str, Any]]) -> dict[str, Any]:
    choices = [
        {"index": at, "message": {"role": "assistant", **message}, "finish_reason": _reason(message), "logprobs": None}
        for at, message in enumerate(messages)
    ]
    return {**_head(request, "chat.completion"), "choices": choices, "usage": _usage(request, messages)}


def _chunks(request: dict[str, Any], messages: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    head = _head(request, "chat.completion.chunk")
    for at, message in enumerate(messages):
        words = (message.get("content") or "").split(" ")
        deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
        deltas += [{"content": word if first == 0 else " " + word} for first, word in enumerate(words)]
        deltas += [{"tool_calls": [{"index": n, **call}]} for n, call in enumerate(message.get("tool_calls") or [])]
        for delta in deltas:
            yield {**head, "choices": [{"index": at, "delta": delta, "finish_reason": None}]}
        yield {**head, "choices": [{"index": at, "delta": {}, "finish_reason": _reason(message)}]}
    yield {**head, "choices": [], "usage": _usage(request, messages)}


def _event(chunk: dict[str, Any]) -> bytes:
    done = b"data: [DONE]\n\n" if "usage" in chunk else b""
    return f"data: {json.dumps(chunk)}\n\n".encode() + done


def _head(request: dict[str, Any], kind: str) -> dict[str, Any]:
    return {"id": "chatcmpl-1", "object": kind, "created": 0, "model": request["model"]}


def _reason(message: dict[str, Any]) -> str:
    return "tool_calls" if message.get("tool_calls") else "stop"


def _usage(request: dict[str, Any], messages: list[dict[str, Any]]) -> dict[str, int]:
    """Count words, for want of a tokenizer."""
    asked = len(json.dumps(request["messages"]).split())
    said = len(json.dumps(messages).split())
    return {"prompt_tokens": asked, "completion_tokens": said, "total_tokens": asked + said}
