"""The application: its routes, its life, and its errors."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from aligner_middleware import __version__
from aligner_middleware.aligner import Aligner
from aligner_middleware.serve import chat, correct, health, litellm, models, observing, responses
from aligner_middleware.serve.connections import PATIENCE, STOPPING
from aligner_middleware.serve.limits import Limits
from aligner_middleware.serve.problems import Problem
from aligner_middleware.serve.service import Service, load_aligner, logger
from aligner_middleware.serve.settings import ServeSettings
from aligner_middleware.serve.upstream import Upstream


def create_app(
    settings: ServeSettings,
    aligner: Aligner | None = None,
    transport: httpx2.AsyncBaseTransport | None = None,
    folder: Path | None = None,
) -> FastAPI:
    """Make the application.

    Args:
        settings: Of the service.
        aligner: The aligner; `None` loads the one that the settings name, when the application starts.
        transport: Stands for the network to the upstream; `None` for the real one.
        folder: The folder that the processes of one service share; `None` where there is one process.
    """

    @contextlib.asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
        own = await asyncio.to_thread(load_aligner, settings) if aligner is None else aligner
        try:
            app.state.service = Service(settings, own)
            async with Upstream(settings, transport) as app.state.upstream, observing.observed(app, folder):
                yield {PATIENCE: settings.body_timeout, STOPPING: app.state.feed.close}
        finally:
            app.state.service = None
            if aligner is None:
                own.close()

    app = FastAPI(
        title="aligner-middleware", version=__version__, lifespan=life, redoc_url=None, redirect_slashes=False
    )
    app.state.service = None
    for module in (health, chat, responses, models, correct):
        app.include_router(module.router)
    app.include_router(litellm.new_router())
    app.add_exception_handler(Problem, _problem)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unexpected)
    app.add_middleware(
        Limits,
        max_body=settings.max_body,
        body_timeout=settings.body_timeout,
        concurrency=settings.concurrency,
        longest_wait=settings.longest_wait,
        wait=lambda: app.state.service.backlog.seconds if app.state.service else 0.0,
    )
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.cors_origins, allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    observing.install(app, settings)  # last, so that it sees the requests that are refused, too
    return app


async def _problem(request: Request, error: Exception) -> JSONResponse:
    return Problem.of(error).response()


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"] if part != "body")
    return Problem(400, f"{place or 'body'}: {first['msg']}", code="invalid_value", param=place or None).response()


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return Problem(
        error.status_code, str(error.detail), code="not_found" if error.status_code == 404 else None
    ).response()


async def _unexpected(request: Request, error: Exception) -> JSONResponse:
    logger.error("a request failed", exc_info=error)
    return Problem.of(error).response()
