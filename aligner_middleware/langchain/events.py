"""The custom event `aligner_correction`, dispatched once for each answer; its data is the answer's metadata."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from langchain_core.callbacks import BaseRunManager, adispatch_custom_event, dispatch_custom_event
from langchain_core.callbacks.manager import ahandle_event, handle_event

EVENT = "aligner_correction"


def dispatch_event(run: BaseRunManager | None, metadata: dict[str, Any]) -> None:
    """Dispatch the event.

    Args:
        run: The run that it comes from. Where LangChain does not tell which that is, it comes from the chain around; where
            there is no chain either, nothing is dispatched.
        metadata: The answer's metadata.
    """
    if run is None:
        with suppress(RuntimeError):  # there is no chain
            dispatch_custom_event(EVENT, metadata)
    else:
        handle_event(run.handlers, "on_custom_event", "ignore_custom_event", EVENT, metadata, **_origin(run))


async def adispatch_event(run: BaseRunManager | None, metadata: dict[str, Any]) -> None:
    """Dispatch the event where callbacks are asynchronous."""
    if run is None:
        with suppress(RuntimeError):
            await adispatch_custom_event(EVENT, metadata)
    else:
        handlers = run.handlers
        await ahandle_event(handlers, "on_custom_event", "ignore_custom_event", EVENT, metadata, **_origin(run))


def _origin(run: BaseRunManager) -> dict[str, Any]:
    return {"run_id": run.run_id, "tags": run.inheritable_tags, "metadata": run.inheritable_metadata}
