"""The chat models that a job asks: named on the command line, and asked about many prompts at once."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from langchain_core.messages import AIMessage
from langchain_core.runnables import Runnable

from aligner_middleware.errors import InputError, MissingExtraError
from aligner_middleware.messages import text_of


def chat_model(name: str) -> Runnable[Any, AIMessage]:
    """Find a chat model by its name.

    Args:
        name: `module:attribute` or `path/to/file.py:attribute`, a chat model or a function that makes one; or what
            LangChain's `init_chat_model` takes, such as `openai:gpt-5`.

    Raises:
        InputError: If there is none of this name.
        MissingExtraError: If it needs `init_chat_model` and langchain is not installed.
    """
    place, _, attribute = name.rpartition(":")
    module = _module(place) if place else None
    if hasattr(module, attribute):
        found = getattr(module, attribute)
        model = found if isinstance(found, Runnable) else found()
        if not isinstance(model, Runnable):
            raise InputError(f"{name} is a {type(model).__name__}, expected a LangChain chat model")
        return model
    if place.endswith(".py") or "." in place:
        raise InputError(f"{place} has no {attribute!r}: expected a chat model, or a function that makes one")
    try:
        from langchain.chat_models import init_chat_model
    except ImportError as exc:
        raise MissingExtraError(f"chat model {name!r}", "agents") from exc
    try:
        return init_chat_model(name)
    except (ValueError, ImportError) as exc:
        raise InputError(f"chat model {name!r} cannot be had: {exc}") from exc


def answers(model: Runnable[Any, Any], prompts: Sequence[Any], concurrency: int) -> list[str | Exception]:
    """Ask a model about prompts, some at a time; one that fails gives its exception, and the others are not held up."""
    said = model.batch(list(prompts), {"max_concurrency": concurrency}, return_exceptions=True)
    return [one if isinstance(one, Exception) else _text(one) for one in said]


def _text(said: Any) -> str | Exception:
    text = said if isinstance(said, str) else text_of(said)
    return text if text.strip() else InputError("the model answered nothing")


def name_of(model: Any) -> str:
    """Say what a model is called, for provenance."""
    inner = getattr(model, "bound", model)
    return str(getattr(inner, "model_name", None) or getattr(inner, "model", None) or type(inner).__name__)


def _module(place: str) -> Any:
    """Import a module or a file; `None` where there is no module of this name, as for a provider's."""
    if not place.endswith(".py"):
        try:
            return importlib.import_module(place)
        except ModuleNotFoundError:
            return None
    path = Path(place).resolve()
    if not path.is_file():
        raise InputError(f"{place} is not a file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))  # as for a script, so that it can import its neighbours
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module
