"""A service of several processes: the settings on their way to them, and the folder that they share."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import multiprocessing
import os
import secrets
import signal
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from aligner_middleware.serve.settings import ServeSettings

if TYPE_CHECKING:
    from fastapi import FastAPI

logger = logging.getLogger("aligner_middleware.serve")

FACTORY = "aligner_middleware.serve.worker:create_worker"
_SETTINGS = "_ALIGNER_SERVE_SETTINGS"
_FOLDER = "_ALIGNER_SERVE_FOLDER"
_METRICS = "PROMETHEUS_MULTIPROC_DIR"  # prometheus-client reads it when it is imported


@contextlib.contextmanager
def handed_over(settings: ServeSettings) -> Iterator[None]:
    """Put the settings into the environment of processes that are started meanwhile, and a new folder that they share."""
    content = settings.model_dump(mode="json")
    for name, secret in (("upstream_key", settings.upstream_key), ("audit_key", settings.audit_key)):
        if secret is not None:  # which JSON would hide
            content[name] = secret.get_secret_value()
    if settings.audit is not None:
        content["audit_key"] = content["audit_key"] or secrets.token_hex()  # the same for all of them
    with tempfile.TemporaryDirectory(prefix="aligner-", ignore_cleanup_errors=True) as folder:
        given = {_SETTINGS: json.dumps(content), _FOLDER: folder, _METRICS: folder}
        before = {name: os.environ.get(name) for name in given}
        os.environ.update(given)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def create_worker() -> FastAPI:
    """Make the application of one process, from its environment; the process ends with the one that started it."""
    from aligner_middleware.serve.app import create_app
    from aligner_middleware.serve.metrics import forget_ended

    end_with_parent()
    folder = Path(os.environ[_FOLDER])
    forget_ended(folder)  # it may stand for one that was killed
    return create_app(ServeSettings.model_validate_json(os.environ[_SETTINGS]), folder=folder)


def end_with_parent() -> None:
    """Have this process end as by SIGTERM, after its running requests, when the one that started it is gone.

    Whoever is killed stops nobody: its processes would hold the port for good, and no new service could take it.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def wait() -> None:
        parent.join()
        logger.error("the process that started this one is gone: this one ends, too")
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="parent", daemon=True).start()


def try_worker() -> None:
    """Start the application once, and stop it: the aligner is built, and errors are told before anything is served.

    That is done in a process of its own, which takes its memory along when it ends.

    Raises:
        AlignerError: If the aligner cannot be loaded, the audit log not be written, or no socket be made.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        pool.submit(_start_and_stop).result()


def _start_and_stop() -> None:
    async def live() -> None:
        app = create_worker()
        async with app.router.lifespan_context(app):
            pass

    asyncio.run(live())
