"""One thread that runs every call's sequences, so that concurrent calls share passes.

Callers submit a generation and wait for its future: a thread blocks on it, a task awaits it. Sequences are taken in the
order in which they came, as rows become free. Cancelling the future frees the row after the current pass.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from queue import Empty, SimpleQueue

from aligner_middleware.engine.decode import Decoder
from aligner_middleware.engine.generation import Generation, Prefill
from aligner_middleware.engine.likelihood import log_likelihoods
from aligner_middleware.engine.model import Model
from aligner_middleware.engine.threads import BackgroundThread
from aligner_middleware.errors import ClosedError

_Call = tuple[Generation, "Future[Generation]", Callable[[], None]]

_IDLE = 10.0  # seconds without work after which the memory for keys and values is freed


class Scheduler(BackgroundThread):
    """Runs generations in a thread of its own, which starts with the first of them. It is a `Runner`.

    Args:
        model: The network that predicts tokens.
        stop: Tokens that end a sequence.
    """

    def __init__(self, model: Model, stop: frozenset[int]) -> None:
        self._model = model
        self._stop_tokens = stop
        super().__init__()

    def _begin_anew(self) -> None:
        super()._begin_anew()
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()  # functions that other threads want called
        # Used by the scheduler's thread only:
        self._decoder = Decoder(self._model, self._stop_tokens)
        self._waiting: deque[_Call] = deque()
        self._calls: dict[Generation, _Call] = {}
        self._prefills: list[Prefill] = []

    def submit(self, generation: Generation, on_step: Callable[[], None] = lambda: None) -> Future[Generation]:
        """Queue a generation. It does not block.

        Args:
            generation: The sequence; it is filled in place.
            on_step: Called in the scheduler's thread after each step in which the generation had a pass, and when it ends.

        Returns:
            The generation when it is done, or the error that ended it. May be cancelled at any time.

        Raises:
            ClosedError: If `close` was called, or Python is ending.
        """
        call: _Call = (generation, Future(), on_step)
        self._tell(lambda: self._waiting.append(call))
        return call[1]

    def prefill(self, prefill: Prefill) -> None:
        """Prefill the known part of a prompt, if a row is free. Call it again when more of the prompt is known."""
        self._tell(lambda: self._note(prefill))

    def abandon(self, prefill: Prefill) -> None:
        """Free the row of a prompt that no generation will follow."""
        if self._thread is not None and not self._closed:
            self._inbox.put(lambda: self._forget(prefill))

    def log_likelihoods(self, prompt: Sequence[int], targets: Sequence[Sequence[int]]) -> list[tuple[float, bool]]:
        """See `likelihood.log_likelihoods`; it runs in the calling thread."""
        return log_likelihoods(self._model, prompt, targets)

    def _stop(self) -> None:
        """Stop the current pass, so that the thread ends after one operator of the network."""
        self._inbox.put(lambda: None)
        self._decoder.stop()

    def _tell(self, message: Callable[[], None]) -> None:
        with self._lock:
            if self._closed:
                raise ClosedError("this aligner was closed")
            if self._idle:
                self._decoder = Decoder(self._model, self._stop_tokens)
                self._start()
            self._inbox.put(message)

    def _work(self) -> None:
        try:
            self._serve()
        finally:
            self._decoder.release()

    def _serve(self) -> None:
        while not self._closed:
            try:
                self._listen()
                self._leave()
                self._admit()
                self._step()
            except Exception as exc:  # the model failed outside its passes: no call may wait for ever
                self._fail(list(self._calls.values()), exc)
                self._decoder = Decoder(self._model, self._stop_tokens)
        while not self._inbox.empty():
            self._inbox.get()()
        error = ClosedError("this aligner was closed while a correction was under way")
        self._fail([*self._calls.values(), *self._waiting], error)

    def _step(self) -> None:
        for generation in self._decoder.step():
            if not (self._closed and generation.error):  # `_serve` reports it as closed
                self._report(generation)

    def _listen(self) -> None:
        """Call the functions in the inbox; wait for one if there is nothing else to do."""
        if not self._waiting and not self._decoder.busy:
            try:
                message = self._inbox.get(timeout=_IDLE)
            except Empty:
                if not self._decoder.running:
                    self._decoder.release()
                message = self._inbox.get()
            message()
        with contextlib.suppress(Empty):
            while True:
                self._inbox.get_nowait()()

    def _note(self, prefill: Prefill) -> None:
        if prefill not in self._prefills:
            self._prefills.append(prefill)

    def _forget(self, prefill: Prefill) -> None:
        prefill.abandoned = True
        self._decoder.drop(prefill)
        if prefill in self._prefills:
            self._prefills.remove(prefill)

    def _leave(self) -> None:
        """Free the rows of cancelled calls."""
        for generation, _, _ in [call for call in self._calls.values() if call[1].cancelled()]:
            self._decoder.drop(generation)
            del self._calls[generation]

    def _admit(self) -> None:
        """Give waiting calls rows, in order, then unfinished prompts."""
        while self._waiting:
            call = generation, future, on_step = self._waiting[0]
            if not future.cancelled():
                try:
                    if not self._decoder.admit(generation, generation.longest):
                        break
                    self._calls[generation] = call
                except Exception as exc:  # such as no memory on the device
                    settle(future, exc)
                    on_step()
            self._waiting.popleft()
            if generation.prefill in self._prefills:
                self._prefills.remove(generation.prefill)
        if not self._waiting:  # unfinished prompts come after whole ones
            for prefill in [one for one in self._prefills if one not in self._decoder.running]:
                with contextlib.suppress(Exception):  # its generation will fail in the same way, and be reported
                    self._decoder.admit(prefill, len(prefill.prompt))

    def _report(self, generation: Generation) -> None:
        call = self._calls.get(generation)
        if call is None:
            return
        _, future, on_step = call
        if generation.done:
            del self._calls[generation]
            settle(future, generation.error or generation)
        on_step()

    def _fail(self, calls: list[_Call], error: Exception) -> None:
        for generation, future, on_step in calls:
            self._calls.pop(generation, None)
            settle(future, error)
            on_step()


def settle(future: Future[Generation], outcome: Generation | Exception) -> None:
    """Give a call its outcome, unless it was cancelled."""
    with contextlib.suppress(InvalidStateError):  # it was cancelled meanwhile
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
