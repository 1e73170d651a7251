"""The chat models that a job asks: named on the command line, and asked about many prompts at once."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from langchain_core.messages import AIMessage
from langchain_core.runnables import Runnable
from langchain_core.runnables.config import ContextThreadPoolExecutor
from tenacity import RetryError, Retrying, stop_after_attempt, wait_random_exponential

from aligner_middleware.data.prompts import Prompt
from aligner_middleware.errors import AlignerError, InputError, MissingExtraError

_LONGEST = 500  # characters of a provider's message
_NO_UPSTREAM = (
    "a prompt has no answer, and there is no model to ask: give one by --upstream, or rows with question and answer"
)


def chat_model(name: str) -> Runnable[Any, AIMessage]:
    """Find a chat model by its name.

    Args:
        name: `module:attribute` or `path/to/file.py:attribute`, a chat model or a function that makes one; or what
            LangChain's `init_chat_model` takes, such as `openai:gpt-5`.

    Raises:
        InputError: If there is none of this name, or it cannot be made, for example because a key is missing.
        MissingExtraError: If it needs `init_chat_model` and langchain is not installed.
    """
    place, _, attribute = name.rpartition(":")
    module = _module(place) if place else None
    if hasattr(module, attribute):
        found = getattr(module, attribute)
        with _had(f"chat model {name!r}"):
            model = found if isinstance(found, Runnable) or not callable(found) else found()
        if not isinstance(model, Runnable):
            raise InputError(f"{name} is a {type(model).__name__}, expected a LangChain chat model")
        return model
    if place.endswith(".py") or "." in place:
        raise InputError(f"{place} has no {attribute!r}: expected a chat model, or a function that makes one")
    try:
        from langchain.chat_models import init_chat_model
    except ImportError as exc:
        raise MissingExtraError(f"chat model {name!r}", "agents") from exc
    with _had(f"chat model {name!r}"):
        return init_chat_model(name)


@contextlib.contextmanager
def _had(what: str, file: Path | None = None) -> Iterator[None]:
    """Raise an `InputError` for whatever a provider's code, or the user's own in `file`, fails with."""
    try:
        yield
    except AlignerError:
        raise
    except Exception as exc:
        lines = [frame.lineno for frame in traceback.extract_tb(exc.__traceback__) if frame.filename == str(file)]
        at = f" (line {lines[-1]})" if lines else ""
        raise InputError(f"{what} cannot be had: {brief(exc)}{at}") from exc


def brief(error: BaseException) -> str:
    """Say in one line, of at most a few hundred characters, what went wrong: providers send whole pages."""
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said if len(said) <= _LONGEST else said[:_LONGEST] + '…'}".removesuffix(": ")


@dataclass(frozen=True)
class Answered:
    """What a model answered, and how many seconds it took."""

    text: str
    seconds: float


def answers(model: Runnable[Any, Any], prompts: Sequence[Any], concurrency: int) -> list[Answered | Exception]:
    """Ask a model about prompts, some at a time; one that fails gives its exception, and the others are not held up."""

    def ask(prompt: Any) -> Answered | Exception:
        start = time.perf_counter()
        try:
            said = model.invoke(prompt)
        except Exception as exc:
            return exc
        text = said if isinstance(said, str) else str(said.text)
        return Answered(text, time.perf_counter() - start) if text.strip() else InputError("the model answered nothing")

    pool = ContextThreadPoolExecutor(max_workers=concurrency)
    try:
        return list(pool.map(ask, prompts))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # who interrupts it does not wait for answers under way


def ask_again(
    model: Runnable[Any, Any], prompts: Sequence[Any], concurrency: int, attempts: int = 3
) -> list[Answered | Exception]:
    """Do the same, and ask again what failed, up to so many times, ever longer apart."""
    said: list[Answered | Exception] = [InputError("not asked yet")] * len(prompts)
    with contextlib.suppress(RetryError):
        wait = wait_random_exponential(multiplier=0.5, max=20)
        for attempt in Retrying(stop=stop_after_attempt(attempts), wait=wait):
            with attempt:
                unsaid = [at for at, one in enumerate(said) if isinstance(one, Exception)]
                again = answers(model, [prompts[at] for at in unsaid], concurrency)
                for at, one in zip(unsaid, again, strict=True):
                    said[at] = one
                for one in again:
                    if isinstance(one, Exception):
                        raise one
    return said


def ask(
    prompts: Sequence[Prompt], upstream: Runnable[Any, Any] | None, concurrency: int, attempts: int = 3
) -> list[Answered | Exception]:
    """Give each prompt's answer: its own, or the model's, or what went wrong."""
    missing = [prompt.question for prompt in prompts if prompt.answer is None]
    if upstream is None:
        said: list[Answered | Exception] = [InputError(_NO_UPSTREAM)] * len(missing)
    else:
        said = ask_again(upstream, missing, concurrency, attempts)
    found = iter(said)
    return [next(found) if prompt.answer is None else Answered(prompt.answer, 0.0) for prompt in prompts]


def why(prompt: Prompt, error: Exception) -> str:
    """Say which prompt failed, and why."""
    return f"{prompt.question[:60]!r}: {brief(error)}"


def name_of(model: Any) -> str:
    """Say what a model is called, for provenance."""
    inner = getattr(model, "bound", model)
    return str(getattr(inner, "model_name", None) or getattr(inner, "model", None) or type(inner).__name__)


def _module(place: str) -> Any:
    """Import a module or a file; `None` where there is no module of this name, as for a provider's."""
    if not place.endswith(".py"):
        try:
            with _had(place):
                return importlib.import_module(place)
        except InputError as exc:
            missing = exc.__cause__
            if isinstance(missing, ModuleNotFoundError) and f"{place}.".startswith(f"{missing.name}."):
                return None
            raise
    path = Path(place).resolve()
    if not path.is_file():
        raise InputError(f"{place} is not a file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)  # where Pydantic looks annotations up
    sys.path.insert(0, str(path.parent))  # as for a script, so that it can import its neighbours
    try:
        with _had(place, path):
            spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module
