"""`/v1/chat/completions` of OpenAI's API, before any upstream that has it: answers leave corrected."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from aligner_middleware.serve.access import TheClient, TheService, TheUpstream
from aligner_middleware.serve.answers import align_completion
from aligner_middleware.serve.bodies import chat_question, is_structured, read_object, wants_stream
from aligner_middleware.serve.chunks import AlignedChunks
from aligner_middleware.serve.exchange import Exchange
from aligner_middleware.serve.forward import Endpoint, forward

ROUTE = "/v1/chat/completions"
_ENDPOINT = Endpoint("/chat/completions", align_completion, AlignedChunks)
# The body is read as it is; this only documents it.
OBJECT: dict[str, Any] = {
    "requestBody": {"required": True, "content": {"application/json": {"schema": {"type": "object"}}}}
}

router = APIRouter(tags=["openai"])


@router.post(ROUTE, openapi_extra=OBJECT)
async def complete_chat(request: Request, service: TheService, client: TheClient, upstream: TheUpstream) -> Response:
    """Answer by the upstream, and correct the answer: OpenAI's API, with `aligner` beside each choice."""
    raw, body = await read_object(request)
    exchange = Exchange(service, client, ROUTE, chat_question(body), is_structured(body))
    return await forward(request, raw, exchange, upstream, _ENDPOINT, stream=wants_stream(body))
