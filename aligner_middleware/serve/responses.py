"""`/v1/responses` of OpenAI's API, before any upstream that has it: messages leave corrected."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from aligner_middleware.serve.access import TheClient, TheService, TheUpstream
from aligner_middleware.serve.answers import align_response
from aligner_middleware.serve.bodies import is_structured, read_object, response_question, wants_stream
from aligner_middleware.serve.chat import OBJECT
from aligner_middleware.serve.events import AlignedEvents
from aligner_middleware.serve.exchange import Exchange
from aligner_middleware.serve.forward import Endpoint, forward
from aligner_middleware.serve.problems import Problem

ROUTE = "/v1/responses"
_ENDPOINT = Endpoint("/responses", align_response, AlignedEvents)

router = APIRouter(tags=["openai"])


@router.post(ROUTE, openapi_extra=OBJECT)
async def respond(request: Request, service: TheService, client: TheClient, upstream: TheUpstream) -> Response:
    """Respond by the upstream, and correct the messages of its output, with `aligner` in each."""
    raw, body = await read_object(request)
    if body.get("background"):
        reason = f"background is not served on {ROUTE}, since its text would be fetched uncorrected: leave it out"
        raise Problem(400, reason, code="unsupported_value", param="background")
    exchange = Exchange(service, client, ROUTE, response_question(body), is_structured(body))
    return await forward(request, raw, exchange, upstream, _ENDPOINT, stream=wants_stream(body))
