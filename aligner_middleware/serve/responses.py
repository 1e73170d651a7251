"""`/v1/responses` of OpenAI's API, without streams."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from aligner_middleware.serve.access import TheClient, TheService, TheUpstream
from aligner_middleware.serve.answers import align_response, parse_response
from aligner_middleware.serve.bodies import is_structured, read_object, response_question, wants_stream
from aligner_middleware.serve.chat import OBJECT
from aligner_middleware.serve.chat import ROUTE as CHAT
from aligner_middleware.serve.exchange import Exchange, unless_gone
from aligner_middleware.serve.problems import Problem
from aligner_middleware.serve.upstream import Upstream, handed_on

ROUTE = "/v1/responses"

router = APIRouter(tags=["openai"])


@router.post(ROUTE, openapi_extra=OBJECT)
async def respond(request: Request, service: TheService, client: TheClient, upstream: TheUpstream) -> Response:
    """Respond by the upstream, and correct the messages of its output, with `aligner` in each."""
    raw, body = await read_object(request)
    for field in ("stream", "background"):
        if wants_stream(body) if field == "stream" else body.get(field):
            reason = f"{field} is not served on {ROUTE}, since the text would leave uncorrected: stream from {CHAT}"
            raise Problem(400, reason, code="unsupported_value", param=field)
    exchange = Exchange(service, client, ROUTE, response_question(body), is_structured(body))
    return await unless_gone(request, _respond(request, raw, exchange, upstream))


async def _respond(request: Request, raw: bytes, exchange: Exchange, upstream: Upstream) -> Response:
    response = await upstream.read(request, "/responses", raw)
    if not response.is_success:
        return handed_on(response, response.content)
    return await align_response(exchange, parse_response(response.content), response)
