"""`/v1/models` of OpenAI's API: the upstream's."""

from __future__ import annotations

from urllib.parse import quote

from fastapi import APIRouter, Request, Response

from aligner_middleware.serve.access import TheClient, TheUpstream
from aligner_middleware.serve.problems import Problem
from aligner_middleware.serve.upstream import handed_on

router = APIRouter(tags=["openai"])


@router.get("/v1/models")
async def list_models(request: Request, client: TheClient, upstream: TheUpstream) -> Response:
    """List the upstream's models."""
    response = await upstream.read(request, "/models")
    return handed_on(response, response.content)


@router.get("/v1/models/{name:path}")
async def get_model(request: Request, name: str, client: TheClient, upstream: TheUpstream) -> Response:
    """Give one of the upstream's models."""
    if {"", ".", ".."} & set(name.split("/")):  # another path of the upstream
        raise Problem(404, f"there is no model {name!r:.80}", code="not_found", param="model")
    response = await upstream.read(request, f"/models/{quote(name, safe='/:')}")
    return handed_on(response, response.content)
