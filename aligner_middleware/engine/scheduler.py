"""One thread that runs every call's sequences, so that concurrent calls share passes.

Callers submit a generation and wait for its future: a thread blocks on it, a task awaits it. Sequences are taken in the
order in which they came, as rows become free. Cancelling the future frees the row after the pass that is under way.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError

from aligner_middleware.engine.decode import Decoder
from aligner_middleware.engine.generation import Generation, Prefill
from aligner_middleware.engine.model import Model
from aligner_middleware.errors import ClosedError

_Call = tuple[Generation, "Future[Generation]", Callable[[], None]]


class Scheduler:
    """Runs generations in a thread of its own, which starts with the first of them.

    Args:
        model: What predicts.
        stop: Tokens that end a sequence.
        queue_limit: Generations that may wait for a row; more make `submit` wait.
    """

    def __init__(self, model: Model, stop: frozenset[int], queue_limit: int = 1024) -> None:
        self._model = model
        self._stop = stop
        self._queue_limit = queue_limit
        self._waiting: deque[_Call] = deque()
        self._calls: dict[Generation, _Call] = {}
        self._prefills: list[Prefill] = []
        self._abandoned: list[Prefill] = []
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False

    def submit(
        self, generation: Generation, on_round: Callable[[], None] = lambda: None, *, timeout: float | None = None
    ) -> Future[Generation]:
        """Queue a generation.

        Args:
            generation: The sequence; it is filled in place.
            on_round: Called in the scheduler's thread after each round in which the generation moved.
            timeout: Seconds to wait while the queue is full, for a place in it; `None` waits for as long as it takes.

        Returns:
            The generation when it is done, or what made it fail. May be cancelled at any time.

        Raises:
            ClosedError: If `close` was called.
            BlockingIOError: If the queue was full all that time.
        """
        future: Future[Generation] = Future()
        with self._changed:
            if not self._changed.wait_for(lambda: len(self._waiting) < self._queue_limit or self._closed, timeout):
                raise BlockingIOError(f"{self._queue_limit} corrections are waiting already")
            self._start()
            self._waiting.append((generation, future, on_round))
            self._changed.notify_all()
        return future

    def prefill(self, prefill: Prefill) -> None:
        """Let what is known of a prompt through, as far as there are rows to spare; call it again when more is known."""
        with self._changed:
            self._start()
            if prefill not in self._prefills:
                self._prefills.append(prefill)
            self._changed.notify_all()

    def abandon(self, prefill: Prefill) -> None:
        """Free the row of a prompt that no generation will follow."""
        with self._changed:
            self._abandoned.append(prefill)
            self._changed.notify_all()

    def close(self) -> None:
        """Fail what waits and runs with `ClosedError`, and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _start(self) -> None:
        if self._closed:
            raise ClosedError("this aligner was closed")
        if self._thread is None or not self._thread.is_alive():  # it is not, in a forked process
            self._thread = threading.Thread(target=self._work, name="aligner", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        decoder = Decoder(self._model, self._stop)
        while True:
            with self._changed:
                self._leave(decoder)
                while not self._closed and not self._admit(decoder) and not decoder.busy:
                    self._changed.wait()
                    self._leave(decoder)
                if self._closed:
                    error = ClosedError("this aligner was closed while a correction was under way")
                    self._fail([*self._calls.values(), *self._waiting], error)
                    return
            try:
                moved = decoder.round()
            except Exception as exc:  # of a model that fails outside its passes: nobody may wait for ever
                self._fail(list(self._calls.values()), exc)
                decoder = Decoder(self._model, self._stop)
                continue
            for generation in moved:
                self._report(generation)

    def _leave(self, decoder: Decoder) -> None:
        """Free the rows of those whom nobody waits for any more."""
        for generation, _, _ in [call for call in self._calls.values() if call[1].cancelled()]:
            decoder.drop(generation)
            del self._calls[generation]
        for prefill in self._abandoned:
            decoder.drop(prefill)
            if prefill in self._prefills:
                self._prefills.remove(prefill)
        self._abandoned.clear()

    def _admit(self, decoder: Decoder) -> bool:
        """Move who waits into rows, in order, and say whether anybody was."""
        admitted = False
        while self._waiting:
            call = generation, future, _ = self._waiting[0]
            try:
                if not future.cancelled() and not decoder.admit(generation, generation.longest):
                    break
            except Exception as exc:  # no memory, on whatever device
                _settle(future, exc)
            else:
                if not future.cancelled():
                    self._calls[generation] = call
            self._waiting.popleft()
            self._changed.notify_all()
            if generation.prefill in self._prefills:
                self._prefills.remove(generation.prefill)
            admitted = True
        if not self._waiting:  # a prompt that is not whole yet comes after those that are
            for prefill in self._prefills:
                if prefill not in decoder.running:
                    decoder.admit(prefill, len(prefill.prompt))
        return admitted

    def _report(self, generation: Generation) -> None:
        call = self._calls.get(generation)
        if call is None:
            return
        _, future, on_round = call
        if generation.done:
            del self._calls[generation]
            _settle(future, generation.error or generation)
        on_round()

    def _fail(self, calls: list[_Call], error: Exception) -> None:
        for generation, future, on_round in calls:
            self._calls.pop(generation, None)
            _settle(future, error)
            on_round()


def _settle(future: Future[Generation], outcome: Generation | Exception) -> None:
    with contextlib.suppress(InvalidStateError):  # it was cancelled in this very moment
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
