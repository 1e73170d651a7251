"""`/metrics`, for Prometheus: requests, verdicts, scores, seconds, doubts; of all processes of a service.

Several processes keep their values in files of one folder, which `SHARED` names: prometheus-client's multiprocess mode.
"""

from __future__ import annotations

import os
from pathlib import Path

from fastapi import APIRouter, Request, Response
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from aligner_middleware.serve.service import Decision

SHARED = "PROMETHEUS_MULTIPROC_DIR"  # an environment variable; to be set before this module is imported

_SCORES = tuple(step / 20 for step in range(1, 21))
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_UNKNOWN_ROUTE = "other"  # paths that no route has, and requests that were refused before they were routed
_NO_ANSWER = "499"  # the client left before it had one
_FAILED = "500"

router = APIRouter(tags=["health"])


class Metrics:
    """The metrics of one application, in a registry of its own.

    Their labels have few values: the names of clients are those of the keys, and routes are templates, never paths.

    Attributes:
        registry: Of these metrics.
        requests, running, verdicts, score, seconds, doubts, lost: The metrics.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own = self.registry
        self.requests = Counter("aligner_requests", "Requests, by their outcome.", ["route", "status"], registry=own)
        self.running = Gauge(
            "aligner_running_requests", "Requests that are being served.", registry=own, multiprocess_mode="livesum"
        )
        self.verdicts = Counter("aligner_verdicts", "Answers, by their verdict.", ["client", "verdict"], registry=own)
        self.score = Histogram("aligner_score", "P(not keep) of answers.", buckets=_SCORES, registry=own)
        self.seconds = Histogram(
            "aligner_correction_seconds", "From the whole answer to its decision.", buckets=_SECONDS, registry=own
        )
        self.doubts = Counter("aligner_doubts", "Objections of safeguards.", ["doubt"], registry=own)
        self.lost = Counter("aligner_audit_lost", "Decisions that the audit log could not take.", registry=own)

    def text(self) -> bytes:
        """Give the metrics in Prometheus' text format: of this process, or of all that share them."""
        registry = self.registry
        if SHARED in os.environ:
            registry = CollectorRegistry()
            MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry)

    def __call__(self, decision: Decision) -> None:
        """Count a decision."""
        seen = decision.facts
        self.verdicts.labels(seen.client, seen.verdict).inc()
        self.seconds.observe(seen.seconds)
        if seen.score is not None:
            self.score.observe(seen.score)
        for doubt in seen.doubts:
            self.doubts.labels(doubt).inc()


class CountRequests:
    """Counts requests by route and status, as of ASGI.

    Args:
        app: The application.
        metrics: Where they are counted.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = _NO_ANSWER

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        with self._metrics.running.track_inprogress():
            try:
                await self._app(scope, receive, watched)
            except Exception:
                status = _FAILED
                raise
            finally:
                route = getattr(scope.get("route"), "path", _UNKNOWN_ROUTE)
                self._metrics.requests.labels(route, status).inc()


@router.get("/metrics", response_class=Response)
async def metrics(request: Request) -> Response:
    """Give all metrics in Prometheus' text format."""
    own: Metrics = request.app.state.metrics
    return Response(own.text(), media_type=CONTENT_TYPE_PLAIN_0_0_4)


def forget_ended(folder: Path) -> None:
    """Take the requests that a killed process was serving out of the metrics that it shared.

    Args:
        folder: That `SHARED` names.
    """
    for file in folder.glob("gauge_live*_*.db"):
        number = int(file.stem.rpartition("_")[2])
        try:
            os.kill(number, 0)
        except ProcessLookupError:
            mark_process_dead(number, str(folder))  # type: ignore[no-untyped-call]
        except PermissionError:  # another user's, who got the number again
            continue
