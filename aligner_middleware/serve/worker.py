"""Settings on their way to the processes of a service that has several."""

from __future__ import annotations

import json
import os

from fastapi import FastAPI

from aligner_middleware.serve.app import create_app
from aligner_middleware.serve.settings import ServeSettings

FACTORY = "aligner_middleware.serve.worker:create_worker"
_VARIABLE = "_ALIGNER_SERVE_SETTINGS"


def hand_over(settings: ServeSettings) -> None:
    """Put the settings into the environment of the processes that are started next."""
    content = settings.model_dump(mode="json")
    if settings.upstream_key is not None:  # which JSON would hide
        content["upstream_key"] = settings.upstream_key.get_secret_value()
    os.environ[_VARIABLE] = json.dumps(content)


def create_worker() -> FastAPI:
    """Make the application of one process, from the settings in its environment."""
    return create_app(ServeSettings.model_validate_json(os.environ[_VARIABLE]))
