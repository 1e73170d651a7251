"""Chat models that a job asks: loaded by a name of the command line, and asked many prompts at once."""

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
    """Load a chat model by its name.

    Args:
        name: `module:attribute` or `path/to/file.py:attribute`, a chat model or a function that makes one; or what
            LangChain's `init_chat_model` takes, such as `openai:gpt-5`.

    Raises:
        InputError: If no model has this name, or it cannot be made, for example because a key is missing.
        MissingExtraError: If it needs `init_chat_model` and langchain is not installed.
    """
    place, _, attribute = name.rpartition(":")
    module = _module(place) if place else None
    if hasattr(module, attribute):
        target = getattr(module, attribute)
        with _load_errors(f"chat model {name!r}"):
            model = target if isinstance(target, Runnable) or not callable(target) else target()
        if not isinstance(model, Runnable):
            raise InputError(f"{name} is a {type(model).__name__}, expected a LangChain chat model")
        return model
    if place.endswith(".py") or "." in place:
        raise InputError(f"{place} has no {attribute!r}: expected a chat model, or a function that makes one")
    try:
        from langchain.chat_models import init_chat_model
    except ImportError as exc:
        raise MissingExtraError(f"chat model {name!r}", "agents") from exc
    with _load_errors(f"chat model {name!r}"):
        return init_chat_model(name)


@contextlib.contextmanager
def _load_errors(what: str, file: Path | None = None) -> Iterator[None]:
    """Turn errors of a provider's code, or of the user's own code in `file`, into an `InputError`."""
    try:
        yield
    except AlignerError:
        raise
    except Exception as exc:
        lines = [frame.lineno for frame in traceback.extract_tb(exc.__traceback__) if frame.filename == str(file)]
        place = f" (line {lines[-1]})" if lines else ""
        raise InputError(f"{what} cannot be loaded: {brief(exc)}{place}") from exc


def brief(error: BaseException) -> str:
    """Describe an error in one line of at most a few hundred characters: some providers send whole pages."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= _LONGEST else text[:_LONGEST] + '…'}".removesuffix(": ")


@dataclass(frozen=True)
class Answered:
    """A model's answer, and how many seconds it took."""

    text: str
    seconds: float


def answers(model: Runnable[Any, Any], prompts: Sequence[Any], concurrency: int) -> list[Answered | Exception]:
    """Ask a model several prompts at a time; a prompt that fails gives its exception and does not delay the others."""

    def ask(prompt: Any) -> Answered | Exception:
        start = time.perf_counter()
        try:
            reply = model.invoke(prompt)
        except Exception as exc:
            return exc
        text = reply if isinstance(reply, str) else str(reply.text)
        return Answered(text, time.perf_counter() - start) if text.strip() else InputError("the model answered nothing")

    pool = ContextThreadPoolExecutor(max_workers=concurrency)
    try:
        return list(pool.map(ask, prompts))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # an interrupt does not wait for answers under way


def ask_with_retries(
    model: Runnable[Any, Any], prompts: Sequence[Any], concurrency: int, attempts: int = 3
) -> list[Answered | Exception]:
    """Ask as `answers` does, and repeat prompts that fail: `attempts` in all, with growing pauses between them."""
    results: list[Answered | Exception] = [InputError("not asked yet")] * len(prompts)
    with contextlib.suppress(RetryError):
        wait = wait_random_exponential(multiplier=0.5, max=20)
        for attempt in Retrying(stop=stop_after_attempt(attempts), wait=wait):
            with attempt:
                failed = [index for index, result in enumerate(results) if isinstance(result, Exception)]
                repeated = answers(model, [prompts[index] for index in failed], concurrency)
                for index, result in zip(failed, repeated, strict=True):
                    results[index] = result
                for result in repeated:
                    if isinstance(result, Exception):
                        raise result
    return results


def ask(
    prompts: Sequence[Prompt], upstream: Runnable[Any, Any] | None, concurrency: int, attempts: int = 3
) -> list[Answered | Exception]:
    """Give each prompt's own answer, or the model's, or the exception that prevented one."""
    missing = [prompt.question for prompt in prompts if prompt.answer is None]
    if upstream is None:
        replies: list[Answered | Exception] = [InputError(_NO_UPSTREAM)] * len(missing)
    else:
        replies = ask_with_retries(upstream, missing, concurrency, attempts)
    remaining = iter(replies)
    return [next(remaining) if prompt.answer is None else Answered(prompt.answer, 0.0) for prompt in prompts]


def describe_failure(prompt: Prompt, error: Exception) -> str:
    """Describe a failure: the beginning of the prompt, and the error."""
    return f"{prompt.question[:60]!r}: {brief(error)}"


def name_of(model: Any) -> str:
    """Give a model's name, for provenance."""
    inner = getattr(model, "bound", model)
    return str(getattr(inner, "model_name", None) or getattr(inner, "model", None) or type(inner).__name__)


def _module(place: str) -> Any:
    """Import a module or a file; `None` where no module has this name: it may be a provider's."""
    if not place.endswith(".py"):
        try:
            with _load_errors(place):
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
        with _load_errors(place, path):
            spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module
