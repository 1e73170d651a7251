"""A span of OpenTelemetry for every decision; whoever sets up an SDK gets them, and else they cost next to nothing."""

from __future__ import annotations

from opentelemetry import trace

from aligner_middleware import __version__
from aligner_middleware.serve.service import Decision

_NANOSECONDS = 10**9


class Spans:
    """Makes a span of each decision, below the span that is current where it is told. Texts are never in it.

    Args:
        provider: What makes the tracer; `None` for the process's own.
    """

    def __init__(self, provider: trace.TracerProvider | None = None) -> None:
        self._tracer = trace.get_tracer("aligner_middleware", __version__, provider)

    def __call__(self, decision: Decision) -> None:
        """Make the span of a decision."""
        seen = decision.facts
        end = int(decision.at.timestamp() * _NANOSECONDS)
        span = self._tracer.start_span("aligner.correct", start_time=end - int(seen.seconds * _NANOSECONDS))
        if span.is_recording():
            values = {
                "client": seen.client,
                "route": seen.route,
                "model": seen.model,
                "mode": seen.mode,
                "strength": str(seen.strength),
                "threshold": seen.threshold,
                "verdict": seen.verdict,
                "score": seen.score,
                "changed": seen.changed,
                "doubts": seen.doubts,
                "instructed": seen.instructed,
                "seconds": seen.seconds,
            }
            span.set_attributes({f"aligner.{name}": value for name, value in values.items() if value is not None})
        if seen.error:
            span.set_attribute("error.type", seen.error)
            span.set_status(trace.StatusCode.ERROR, seen.error)
        span.end(end)
