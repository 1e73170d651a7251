"""`/healthz` and `/readyz`, for whoever starts and watches the process."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from aligner_middleware import __version__
from aligner_middleware.serve.access import TheService

router = APIRouter(tags=["health"])


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """Say that the process answers."""
    return {"status": "ok", "version": __version__}


@router.get("/readyz")
async def readyz(service: TheService) -> dict[str, Any]:
    """Say that the aligner is loaded; status 503 until it is."""
    return {"status": "ready", "aligner": service.aligner.name, "device": service.aligner.device}
