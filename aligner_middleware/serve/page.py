"""The page at `/`: an answer and what the aligner makes of it, the last decisions, and the audit log."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import FileResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from aligner_middleware import __version__
from aligner_middleware.diff import Diff
from aligner_middleware.serve.access import TheClient, TheService
from aligner_middleware.serve.audit_file import AuditFile, Mark, SearchTimeoutError, opened
from aligner_middleware.serve.correct import OptionsBody, PairBody, with_options
from aligner_middleware.serve.facts import aligner_text, changes, threshold
from aligner_middleware.serve.feed import Feed
from aligner_middleware.serve.problems import Problem
from aligner_middleware.serve.service import Service
from aligner_middleware.strength import Strength

_FILES = Path(__file__).with_name("page")
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_COMPARED = 20_000  # characters of two texts that are compared word by word; the time grows with their square
_FOUND = 50  # rows of a search

T = TypeVar("T")


def _guard(request: Request) -> None:
    """Refuse what the page of another site sends."""
    if request.headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
        raise Problem(403, "the page's own routes are for the page alone: use /v1/correct", code="cross_site")


router = APIRouter(include_in_schema=False, dependencies=[Depends(_guard)])
files = APIRouter(include_in_schema=False)


class PageHeaders:
    """Gives the page and its routes strict headers, errors among them; as of ASGI.

    Args:
        app: The application.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] != "http" or not (scope["path"] == "/" or scope["path"].startswith("/page/")):
            await self._app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        await self._app(scope, receive, with_headers)


class _Asked(PairBody):
    strength: Strength | None = None


class _Compared(BaseModel):
    model_config = ConfigDict(extra="forbid")

    old: str
    new: str


class _Marked(BaseModel):
    model_config = ConfigDict(extra="forbid")

    id: str = Field(min_length=1, max_length=64)
    mark: Mark | Literal["none"]


@files.get("/")
async def index() -> FileResponse:
    """Give the page."""
    return FileResponse(_FILES / "index.html")


@files.get("/page/app.js")
async def script() -> FileResponse:
    """Give the page's script."""
    return FileResponse(_FILES / "app.js", media_type="text/javascript")


@files.get("/page/style.css")
async def style() -> FileResponse:
    """Give the page's style."""
    return FileResponse(_FILES / "style.css", media_type="text/css")


@files.get("/page/icon.svg")
async def icon() -> FileResponse:
    """Give the page's icon."""
    return FileResponse(_FILES / "icon.svg", media_type="image/svg+xml")


@router.get("/page/about")
async def about(service: TheService, client: TheClient) -> dict[str, Any]:
    """Tell the aligner, and the client's policy."""
    aligner, policy = service.aligner, client.policy
    return {
        "version": __version__,
        "aligner": aligner.name,
        "client": client.name,
        "keys": bool(service.settings.keys),
        "levels": aligner.calibration.levels if aligner.has_verdicts else None,
        "threshold": threshold(client),
        "mode": policy.mode,
        "overrides": policy.overrides,
        "keep_texts": policy.keep_texts,
        "audit": service.settings.audit is not None,
    }


@router.post("/page/correct")
async def correct(asked: _Asked, service: TheService, client: TheClient) -> dict[str, Any]:
    """Correct an answer by the client's policy, or with another strength where that allows it, and compare the two."""
    chosen = with_options(client, OptionsBody(strength=asked.strength))
    start = time.perf_counter()
    aligned = await service.align(chosen, "/page/correct", asked.question, asked.answer)
    seconds = time.perf_counter() - start
    metadata = aligned.metadata
    text = aligner_text(aligned.text, metadata)
    return {
        "parts": await _parts(asked.answer, text),
        "text": text,
        "changed": changes(metadata),
        "mode": chosen.policy.mode,
        "verdict": metadata.get("verdict"),
        "score": metadata.get("score"),
        "threshold": threshold(chosen),
        "doubts": metadata.get("doubts", []),
        "reason": metadata.get("reason"),
        "seconds": seconds,
    }


@router.post("/page/compare")
async def compare(asked: _Compared, client: TheClient) -> dict[str, Any]:
    """Compare two texts word by word."""
    return {"parts": await _parts(asked.old, asked.new)}


@router.get("/page/events")
async def events(request: Request, client: TheClient) -> StreamingResponse:
    """Stream the client's last decisions, and those to come."""
    feed: Feed = request.app.state.feed
    return StreamingResponse(feed.watch(client.name), media_type="text/event-stream")


@router.get("/page/log")
async def log(
    service: TheService, client: TheClient, search: Annotated[str, Query(max_length=200)] = ""
) -> dict[str, Any]:
    """Search the client's rows of the audit log."""
    try:
        rows = await _with_file(service, lambda file: file.search(client.name, search, _FOUND))
    except SearchTimeoutError as exc:
        raise Problem(503, str(exc), kind="server_error", code="search_timeout") from exc
    for row in rows:
        row["doubts"] = row["doubts"].split()
    return {"rows": rows, "most": _FOUND}


@router.post("/page/mark")
async def mark(asked: _Marked, service: TheService, client: TheClient) -> dict[str, Any]:
    """Mark a decision of the client as right or wrong."""
    wanted = None if asked.mark == "none" else asked.mark
    if not await _with_file(service, lambda file: file.mark(asked.id, client.name, wanted), write=True):
        raise Problem(404, "the audit log has no such decision of this client", code="no_such_decision")
    return {"id": asked.id, "mark": wanted}


async def _with_file(service: Service, use: Callable[[AuditFile], T], *, write: bool = False) -> T:
    path = service.settings.audit
    if path is None:
        raise Problem(404, "this service keeps no audit log: set `audit`", code="no_audit_log")

    def used() -> T:
        with opened(path, create=write) as file:
            return use(file)

    return await asyncio.to_thread(used)


async def _parts(old: str, new: str) -> list[dict[str, str]]:
    if old == new:
        return [{"kind": "same", "text": old}]
    if max(len(old), len(new)) > _COMPARED:
        return [{"kind": "removed", "text": old}, {"kind": "added", "text": new}]
    diff = await asyncio.to_thread(Diff.between, old, new)
    return [{"kind": change.kind, "text": change.text} for change in diff.changes]
