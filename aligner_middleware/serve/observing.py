"""Who is told of decisions: metrics, spans, the audit log, and the page's live log."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from fastapi import FastAPI

from aligner_middleware.serve import metrics, page
from aligner_middleware.serve.audit import AuditLog
from aligner_middleware.serve.feed import Feed
from aligner_middleware.serve.metrics import CountRequests, Metrics
from aligner_middleware.serve.service import Service
from aligner_middleware.serve.settings import ServeSettings
from aligner_middleware.serve.tracing import Spans


def install(app: FastAPI, settings: ServeSettings) -> None:
    """Add `/metrics`, the page, and the counting of requests to an application."""
    app.state.metrics = Metrics()
    app.include_router(metrics.router)
    if settings.page:
        app.include_router(page.files)
        app.include_router(page.router)
        app.add_middleware(page.PageHeaders)
    app.add_middleware(CountRequests, metrics=app.state.metrics)


@contextlib.asynccontextmanager
async def observed(app: FastAPI, folder: Path | None) -> AsyncIterator[None]:
    """Have the decisions of an application's service told, as long as it lives; the audit log is whole at the end.

    Args:
        app: The application.
        folder: The folder that the processes of one service share; `None` where there is one process.

    Raises:
        JobError: If the audit log cannot be written.
    """
    service: Service = app.state.service
    own: Metrics = app.state.metrics
    service.listeners += [own, Spans()]
    feed = app.state.feed = Feed(service.settings.keep_alive, folder)
    if service.settings.page:
        service.listeners.append(feed)
    path, log = service.settings.audit, None
    if path is not None:
        secret = service.settings.audit_key
        key = None if secret is None else secret.get_secret_value().encode()
        log = await asyncio.to_thread(AuditLog, path, service.settings.audit_rows, own.lost.inc, key=key)
        service.listeners.append(log)
    try:
        yield
    finally:
        feed.close()
        if log is not None:
            await asyncio.to_thread(log.close)
