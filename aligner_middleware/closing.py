"""Async iterators that are closed as soon as their reader stops, not when the garbage collector comes to them."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterable, AsyncIterator
from typing import Any, TypeVar

T = TypeVar("T")


def aclosing(source: AsyncIterable[T]) -> contextlib.AbstractAsyncContextManager[AsyncIterator[T]]:
    """Do as `contextlib.aclosing` does, also with an iterator that cannot be closed, which is most often a user's.

    Args:
        source: What is to be iterated.

    Returns:
        For `async with`: gives the iterator, and closes it at the end.
    """
    iterator: Any = aiter(source)
    return contextlib.aclosing(iterator) if hasattr(iterator, "aclose") else contextlib.nullcontext(iterator)
