"""Requests over HTTP: JSON and streams of it. Everything that may go wrong with them becomes a `RemoteError`."""

from __future__ import annotations

import json
import math
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any, Self

import httpx2

from aligner_middleware.closing import aclosing
from aligner_middleware.errors import RemoteError
from aligner_middleware.remote.sse import DONE, read_events

_CONNECT = 5.0  # seconds
_LATER = (429, 502, 503, 504)  # statuses of what may succeed later
_LONGEST = 500  # characters of a server's message
_ADDRESS = "expected the address of OpenAI's API, which mostly ends in /v1, such as http://localhost:8000/v1"


class Client:
    """A pool of connections, for one event loop. Use it as `async with`.

    Args:
        key: API key; `None` for none.
        silence: Seconds that a server may take for a reply, or be silent in a stream.
    """

    def __init__(self, key: str | None, silence: float) -> None:
        self._silence = silence
        self._http = httpx2.AsyncClient(
            timeout=httpx2.Timeout(silence, connect=min(_CONNECT, silence), pool=None),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=256),
            headers={"authorization": f"Bearer {key}"} if key else {},
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.aclose()

    async def get(self, url: str) -> Any:
        """Read JSON.

        Raises:
            RemoteError: If that fails.
        """
        with self._errors(url):
            response = await self._http.get(url)
        return _json(response, response.content)

    async def post(self, url: str, body: dict[str, Any]) -> Any:
        """Send JSON, and read JSON.

        Raises:
            RemoteError: If that fails.
        """
        with self._errors(url):
            response = await self._http.post(url, json=body)
        return _json(response, response.content)

    async def stream(self, url: str, body: dict[str, Any]) -> AsyncGenerator[Any, None]:
        """Send JSON, and give the JSON of each event of the reply. Closing it ends the request.

        Raises:
            RemoteError: If that fails, or the server says in the stream that it failed.
        """
        with self._errors(url):
            async with self._http.stream("POST", url, json=body) as response:
                if response.status_code != 200 or "event-stream" not in response.headers.get("content-type", ""):
                    _json(response, await response.aread())
                    raise RemoteError(f"{url} gives no stream of events, though one was asked for")
                async with aclosing(read_events(response.aiter_bytes())) as events:
                    async for data in events:
                        if data == DONE:
                            return
                        content = json.loads(data)
                        if isinstance(content, dict) and "error" in content:
                            raise RemoteError(f"{url} failed: {_message(content)}", status=_status(content))
                        yield content

    @contextmanager
    def _errors(self, url: str) -> Iterator[None]:
        try:
            yield
        except httpx2.ConnectError as exc:
            message = f"{url} cannot be reached ({exc}): is a server running there?"
            raise RemoteError(message, temporary=True) from exc
        except httpx2.TimeoutException as exc:
            seconds = _CONNECT if isinstance(exc, httpx2.ConnectTimeout) else self._silence
            raise RemoteError(f"{url} did not answer within {seconds:g} seconds", temporary=True) from exc
        except httpx2.TransportError as exc:
            message = f"{url} broke off ({type(exc).__name__}{f': {exc}' if str(exc) else ''})"
            raise RemoteError(message, temporary=True) from exc
        except (httpx2.HTTPError, httpx2.InvalidURL, UnicodeError) as exc:
            raise RemoteError(f"{url} cannot be asked ({type(exc).__name__}: {exc}): {_ADDRESS}") from exc
        except ValueError as exc:
            raise RemoteError(f"{url} sends a stream that is not JSON ({exc})") from exc


def _json(response: httpx2.Response, raw: bytes) -> Any:
    """Read the JSON of a response.

    Raises:
        RemoteError: If it has a status of an error, or is no JSON; the message says what the server said.
    """
    url, status = response.url, response.status_code
    try:
        content = json.loads(raw)
    except ValueError:
        content = None
    if status == 200 and content is not None:
        return content
    page = "html" in response.headers.get("content-type", "") or raw[:200].lstrip()[:1] == b"<"
    said = "a page of HTML" if page else _message(content) or "nothing that explains it"
    if status == 200:
        reason = f"{url} answers with {'a page of HTML' if page else 'something else than JSON'}: {_ADDRESS}"
    elif status in (401, 403):
        reason = f"{url} refuses the key (status {status}: {said}): give one by api_key= or in ALIGNER_API_KEY"
    elif status in (404, 405):
        reason = f"{url} answers with status {status} ({said}): {_ADDRESS}"
    elif 300 <= status < 400:
        reason = f"{url} redirects to {response.headers.get('location', 'nowhere')!r:.200}: give that address"
    elif status in _LATER:
        reason = f"{url} cannot serve now (status {status}: {said})"
    else:
        reason = f"{url} refuses the request (status {status}): {said}"
    raise RemoteError(reason, status=status, temporary=status in _LATER, retry_after=_retry_after(response))


def _message(content: Any) -> str:
    """Find the message of an error: OpenAI's form, or one of those that other servers use."""
    for name in ("error", "message", "detail"):
        if isinstance(content, dict) and content.get(name):
            content = content[name]
    text = content if isinstance(content, str) else "" if content is None else json.dumps(content)
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "…"


def _status(content: dict[str, Any]) -> int | None:
    code = content["error"].get("code") if isinstance(content["error"], dict) else None
    return code if isinstance(code, int) else None


def _retry_after(response: httpx2.Response) -> float | None:
    """Read the seconds that a server asks to wait."""
    value = response.headers.get("retry-after")
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None
