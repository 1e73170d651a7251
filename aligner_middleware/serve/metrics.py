"""`/metrics`, for Prometheus: requests, verdicts, scores, seconds, doubts."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from aligner_middleware.serve.facts import facts
from aligner_middleware.serve.service import Decision

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
        self.running = Gauge("aligner_running_requests", "Requests that are being served.", registry=own)
        self.verdicts = Counter("aligner_verdicts", "Answers, by their verdict.", ["client", "verdict"], registry=own)
        self.score = Histogram("aligner_score", "P(not keep) of answers.", buckets=_SCORES, registry=own)
        self.seconds = Histogram(
            "aligner_correction_seconds", "From the whole answer to its decision.", buckets=_SECONDS, registry=own
        )
        self.doubts = Counter("aligner_doubts", "Objections of safeguards.", ["doubt"], registry=own)
        self.lost = Counter("aligner_audit_lost", "Decisions that the audit log could not take.", registry=own)

    def __call__(self, decision: Decision) -> None:
        """Count a decision."""
        seen = facts(decision)
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
    return Response(generate_latest(own.registry), media_type=CONTENT_TYPE_PLAIN_0_0_4)
