"""A time limit for one call, the same for threads and for tasks. It knows nothing of what is waited for."""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from numbers import Real
from typing import TypeVar

from aligner_middleware.errors import CorrectionTimeoutError, InputError

T = TypeVar("T")


class Deadline:
    """The moment at which a call times out.

    Args:
        seconds: Time from now; `None` for no limit.

    Raises:
        InputError: As `check_timeout` does.
    """

    def __init__(self, seconds: float | None) -> None:
        check_timeout(seconds)
        self._seconds = seconds
        self._end = None if seconds is None else time.monotonic() + seconds

    @property
    def left(self) -> float | None:
        """Seconds until then, at least 0; `None` for no limit."""
        return None if self._end is None else min(max(0.0, self._end - time.monotonic()), threading.TIMEOUT_MAX)

    @property
    def error(self) -> CorrectionTimeoutError:
        """The error of a call that timed out."""
        return CorrectionTimeoutError(self._seconds or 0.0)

    def result(self, future: Future[T]) -> T:
        """Block until a future is done, and give its result.

        Raises:
            CorrectionTimeoutError: If the deadline comes first.
            Exception: The future's own.
        """
        if not wait_for([future], self.left).done:
            raise self.error
        return future.result()

    @contextlib.asynccontextmanager
    async def limit(self) -> AsyncIterator[None]:
        """Cancel the block at the deadline, and raise `CorrectionTimeoutError`."""
        limit = asyncio.timeout(self.left)
        try:
            async with limit:
                yield
        except TimeoutError:
            if not limit.expired():
                raise
            raise self.error from None


def check_timeout(seconds: float | None) -> None:
    """Refuse what is no time limit.

    Raises:
        InputError: If it is neither a finite number above 0 nor `None`.
    """
    if seconds is None:
        return
    if isinstance(seconds, bool) or not isinstance(seconds, Real) or not 0 < seconds < math.inf:
        raise InputError(f"timeout is {seconds!r}, expected a finite number above 0, in seconds, or None")
