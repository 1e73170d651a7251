"""The chat model's API behind the service: requests to it, its errors, and what is handed on of its responses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

import httpx2
from fastapi import Request, Response

from aligner_middleware import __version__
from aligner_middleware.serve.problems import Problem, upstream_failed
from aligner_middleware.serve.service import logger
from aligner_middleware.serve.settings import ServeSettings

_CONNECT = 10.0  # seconds
# Headers of clients that the upstream gets beside the body; keys are decided on apart.
_REQUEST_HEADERS = (
    b"openai-organization",
    b"openai-project",
    b"openai-beta",
    b"idempotency-key",
    b"x-client-request-id",
    b"traceparent",
    b"tracestate",
)
_KEY_HEADERS = (b"authorization", b"api-key")
_RESPONSE_HEADERS = ("retry-after", "retry-after-ms", "x-should-retry", "x-request-id")
_RESPONSE_PREFIXES = ("openai-", "x-ratelimit-")


class Upstream:
    """The upstream, as a pool of connections. Use it as `async with`.

    Args:
        settings: Of the service.
        transport: Stands for the network; `None` for the real one, or, where the settings name no upstream, for a small
            local model.

    Raises:
        MissingExtraError: If the local model is needed and `[build]` is not installed.
    """

    def __init__(self, settings: ServeSettings, transport: httpx2.AsyncBaseTransport | None = None) -> None:
        if transport is None and settings.upstream is None:
            from aligner_middleware.serve.local import LocalTransport

            transport = LocalTransport()
        self._url = httpx2.URL(settings.upstream or "http://local/v1")
        self._key = settings.upstream_key
        self._hands_on_keys = not settings.keys
        self._timeout = settings.upstream_timeout
        self._client = httpx2.AsyncClient(
            transport=transport,
            timeout=httpx2.Timeout(self._timeout, connect=min(_CONNECT, self._timeout)),
            limits=httpx2.Limits(max_connections=settings.concurrency, max_keepalive_connections=64),
            headers={"user-agent": f"aligner-middleware/{__version__}"},
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.aclose()

    async def read(self, request: Request, path: str, body: bytes | None = None) -> httpx2.Response:
        """Send a client's request on, and read the response.

        Args:
            request: The client's request.
            path: Of the upstream, after its base URL.
            body: The body of a POST; `None` for a GET.

        Returns:
            The response, read; its status may be any.

        Raises:
            Problem: 502 if the upstream cannot be reached or breaks off, 504 if it takes longer than `upstream_timeout`, 400
                if the client's path or query makes no URL.
        """
        with self._problems():
            async with asyncio.timeout(self._timeout):
                response = await self._client.send(self._request(request, path, body), stream=True)
                try:
                    await response.aread()
                finally:
                    await response.aclose()
                return response

    async def open(self, request: Request, path: str, body: bytes) -> httpx2.Response:
        """Send a client's request on, and give the response as soon as it begins; the caller closes it.

        Raises:
            Problem: As of `read`; here the upstream may take `upstream_timeout` for its first byte.
        """
        with self._problems():
            return await self._client.send(self._request(request, path, body), stream=True)

    async def content(self, response: httpx2.Response) -> bytes:
        """Read the rest of an opened response, and close it.

        Raises:
            Problem: As of `read`.
        """
        with self._problems():
            try:
                async with asyncio.timeout(self._timeout):
                    return await response.aread()
            finally:
                await response.aclose()

    async def chunks(self, response: httpx2.Response) -> AsyncGenerator[bytes, None]:
        """Give the body of an opened response as it arrives.

        Raises:
            Problem: 502 if it breaks off, 504 if it is silent for longer than `upstream_timeout`.
        """
        with self._problems():
            async for chunk in response.aiter_bytes():
                yield chunk

    def _request(self, request: Request, path: str, body: bytes | None) -> httpx2.Request:
        handed_on = _REQUEST_HEADERS + (_KEY_HEADERS if self._key is None and self._hands_on_keys else ())
        headers = {name: value for name, value in request.headers.raw if name in handed_on}  # which may be no text
        if self._key is not None:
            headers[b"authorization"] = f"Bearer {self._key.get_secret_value()}".encode()
        url = self._url.copy_with(path=self._url.path.rstrip("/") + path)
        url = url.copy_merge_params(str(request.query_params)) if request.query_params else url
        if body is None:
            return self._client.build_request("GET", url, headers=headers)
        headers |= {b"content-type": b"application/json", b"accept-encoding": b"identity"}
        return self._client.build_request("POST", url, headers=headers, content=body)

    @contextmanager
    def _problems(self) -> Iterator[None]:
        try:
            yield
        except (TimeoutError, httpx2.TimeoutException) as exc:
            message = f"the upstream did not answer within {self._timeout:g} seconds"
            raise Problem(504, message, kind="timeout_error", code="upstream_timeout") from exc
        except httpx2.InvalidURL as exc:  # of the client's path or query, since the base URL was parsed before
            raise Problem(400, f"the upstream cannot be asked for that URL: {exc}", code="invalid_url") from exc
        except (httpx2.HTTPError, httpx2.StreamError) as exc:
            logger.warning("the upstream failed: %s: %s", type(exc).__name__, exc)
            message = f"the upstream cannot be reached, or broke off ({type(exc).__name__})"
            raise upstream_failed(message) from exc


def unreadable(reason: str) -> Problem:
    """Make the problem of a response that is not what OpenAI's API gives; nothing of it is handed on."""
    return Problem(502, f"the upstream's response is unreadable: {reason}", kind="upstream_error", code="bad_upstream")


def handed_on(response: httpx2.Response, content: bytes) -> Response:
    """Make the response that hands on the upstream's, with its status and body.

    Raises:
        Problem: 502, if it is a redirection: its body is no answer.
    """
    if 300 <= response.status_code < 400:
        raise unreadable(f"it redirects (status {response.status_code})")
    headers = headers_of(response) | {"content-type": response.headers.get("content-type", "application/json")}
    return Response(content, response.status_code, headers)


def headers_of(response: httpx2.Response) -> dict[str, str]:
    """Give the headers of a response that clients get: its id, and those of limits and retries."""
    return {
        name: value
        for name, value in response.headers.items()
        if name in _RESPONSE_HEADERS or name.startswith(_RESPONSE_PREFIXES)
    }
