"""What a route asks of its request: the service, and the client whose key it has."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from aligner_middleware.serve.problems import Problem
from aligner_middleware.serve.service import Client, Service
from aligner_middleware.serve.upstream import Upstream


# None blocks, so they are coroutines: FastAPI calls plain functions in threads, which costs more than they do.
async def _service(request: Request) -> Service:
    service: Service | None = request.app.state.service
    if service is None:
        raise Problem(503, "the aligner is being loaded", kind="server_error", code="loading", retry_after=5)
    return service


async def _client(request: Request, service: Annotated[Service, Depends(_service)]) -> Client:
    key = request.headers.get("x-api-key")  # LiteLLM's guardrail sends its key so
    return service.client(request.headers.get("authorization") or (f"Bearer {key}" if key else None))


async def _upstream(request: Request, service: Annotated[Service, Depends(_service)]) -> Upstream:
    upstream: Upstream = request.app.state.upstream  # as long as there is a service
    return upstream


TheService = Annotated[Service, Depends(_service)]
TheClient = Annotated[Client, Depends(_client)]
TheUpstream = Annotated[Upstream, Depends(_upstream)]
