"""How many answers wait for the aligner, and how long one that comes now would wait."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_LATEST = 64  # decisions that tell the pace
_TOGETHER = 16  # answers that share the aligner's passes, and do not wait for each other


class Backlog:
    """Counts the answers that wait for their decision, and measures the pace of decisions. Use it in one thread.

    Args:
        clock: Gives the time, in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._waiting = 0
        self._busy = 0.0  # seconds until `_since` in which an answer waited
        self._since = 0.0
        self._ends: deque[float] = deque([0.0], _LATEST + 1)  # of the latest decisions, in busy seconds

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count an answer, from here to its decision. One that fails or is given up says nothing about the pace."""
        self._advance()
        self._waiting += 1
        try:
            yield
            self._advance()
            self._ends.append(self._busy)
        finally:
            self._advance()
            self._waiting -= 1

    @property
    def seconds(self) -> float:
        """Seconds that an answer would wait for those before it; at first the least that they can be."""
        self._advance()
        if self._waiting < _TOGETHER:
            return 0.0
        decided = max(_TOGETHER, len(self._ends) - 1)  # the first to be decided are decided together
        return self._waiting * (self._busy - self._ends[0]) / decided

    def _advance(self) -> None:
        now = self._clock()
        if self._waiting:
            self._busy += now - self._since
        self._since = now
