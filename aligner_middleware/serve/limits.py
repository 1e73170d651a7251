"""Limits of requests: the size of a body, the time that it may take to arrive, and how many are served at once."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from aligner_middleware.serve.problems import Problem

_FREE = ("/healthz", "/readyz", "/metrics")  # they answer when the service is full, which is when they are needed


class Limits:
    """Refuses requests that are too large, too slow, or too many: 413, 408, 429.

    Args:
        app: The application.
        max_body: Bytes of a body.
        body_timeout: Seconds in which a body has to arrive.
        concurrency: Requests that are served at once.
        longest_wait: Seconds that an answer may wait for the aligner.
        wait: Tells how long one that comes now would wait.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        max_body: int,
        body_timeout: float,
        concurrency: int,
        longest_wait: float,
        wait: Callable[[], float],
    ) -> None:
        self._app = app
        self._max_body = max_body
        self._body_timeout = body_timeout
        self._concurrency = concurrency
        self._longest_wait = longest_wait
        self._wait = wait
        self._running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, as of ASGI."""
        if scope["type"] != "http" or scope["path"] in _FREE:
            await self._app(scope, receive, send)
            return
        if (problem := self._full(scope["method"])) is not None:
            await problem.response()(scope, receive, send)
            return
        self._running += 1
        try:
            await self._serve(scope, receive, send)
        finally:
            self._running -= 1

    def _full(self, method: str) -> Problem | None:
        """Say why a request is refused now, before its body is read, and before the upstream is asked."""
        if self._running >= self._concurrency:
            return self._too_many(f"{self._concurrency} requests are being served", 1)
        if method == "POST" and (wait := self._wait()) > self._longest_wait:
            reason = (
                f"an answer would wait {wait:.0f} seconds for the aligner, and longest_wait is {self._longest_wait:g}"
            )
            return self._too_many(reason, math.ceil(wait - self._longest_wait))
        return None

    def _too_many(self, reason: str, seconds: int) -> Problem:
        message = f"{reason}: try again later"
        return Problem(429, message, kind="rate_limit_error", code="too_many_requests", retry_after=seconds)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await self._body(scope, receive)
        except Problem as problem:
            await problem.response()(scope, receive, send)
            return
        if body is None:  # the client is gone
            return
        whole = False

        async def replay() -> Message:
            nonlocal whole
            if whole:
                return await receive()  # the client's disconnection
            whole = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, replay, send)

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """Read the body, as far as it is allowed."""
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._max_body:
            raise self._too_large(int(length))
        parts, size = [], 0
        try:
            async with asyncio.timeout(self._body_timeout):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > self._max_body:
                        raise self._too_large(size)
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            message_ = f"the body did not arrive within {self._body_timeout:g} seconds"
            raise Problem(408, message_, kind="timeout_error", code="body_timeout") from None

    def _too_large(self, size: int) -> Problem:
        limit = f"the request has {size} bytes or more, and {self._max_body} are allowed: send less, or raise max_body"
        return Problem(413, limit, code="body_too_large")
