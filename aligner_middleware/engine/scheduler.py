"""One thread that runs every call's sequences, so that concurrent calls share passes.

Callers submit a generation and wait for its future: a thread blocks on it, a task awaits it. Sequences are taken in the
order in which they came, as rows become free. Cancelling the future frees the row after the current pass.

Python must not exit while the thread is in a pass: native code that returns to an interpreter that no longer exists aborts
the process. So when Python exits, all schedulers are closed and waited for; closing one stops its current pass.
"""

from __future__ import annotations

import _thread
import atexit
import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from queue import Empty, SimpleQueue

from aligner_middleware.engine.decode import Decoder
from aligner_middleware.engine.generation import Generation, Prefill
from aligner_middleware.engine.model import Model
from aligner_middleware.errors import AlignerError, ClosedError
from aligner_middleware.forks import Lock

_Call = tuple[Generation, "Future[Generation]", Callable[[], None]]

_IDLE = 10.0  # seconds without work after which the memory for keys and values is freed


class Scheduler:
    """Runs generations in a thread of its own, which starts with the first of them.

    Args:
        model: The network that predicts tokens.
        stop: Tokens that end a sequence.
    """

    def __init__(self, model: Model, stop: frozenset[int]) -> None:
        self._model = model
        self._stop = stop
        self._closed = False
        self._lock = Lock()
        self._begin_anew()

    def _begin_anew(self) -> None:
        """Set the state before the first call: no thread, nothing queued. Also for a forked process, which has no threads."""
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()  # functions that other threads want called
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()
        # Used by the scheduler's thread only:
        self._decoder = Decoder(self._model, self._stop)
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

    def close(self, *, wait: bool = True) -> None:
        """End all waiting and running calls with `ClosedError`, and end the thread.

        Args:
            wait: Whether to wait until it has ended. The current pass is stopped, so this takes no longer than one operator
                of the network.
        """
        with self._lock:
            self._closed = True
            self._inbox.put(lambda: None)
        self._decoder.stop()
        thread = self._thread
        if wait and thread is not None and thread.is_alive() and thread is not threading.current_thread():
            self._ended.wait()  # not `join`: after an interrupt Python 3.11 takes the thread for ended

    def _tell(self, message: Callable[[], None]) -> None:
        with self._lock:
            if self._closed:
                raise ClosedError("this aligner was closed")
            if self._thread is None or not self._thread.is_alive():
                self._ended.clear()
                self._decoder = Decoder(self._model, self._stop)
                self._thread = threading.Thread(target=self._work, name="aligner", daemon=True)
                _start(self, self._thread)
            self._inbox.put(message)

    def _work(self) -> None:
        try:
            self._serve()
        finally:
            self._decoder.release()
            _running.discard(self)
            self._ended.set()

    def _serve(self) -> None:
        while not self._closed:
            try:
                self._listen()
                self._leave()
                self._admit()
                self._step()
            except Exception as exc:  # the model failed outside its passes: no call may wait for ever
                self._fail(list(self._calls.values()), exc)
                self._decoder = Decoder(self._model, self._stop)
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
                    _settle(future, exc)
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
            _settle(future, generation.error or generation)
        on_step()

    def _fail(self, calls: list[_Call], error: Exception) -> None:
        for generation, future, on_step in calls:
            self._calls.pop(generation, None)
            _settle(future, error)
            on_step()


def _settle(future: Future[Generation], outcome: Generation | Exception) -> None:
    with contextlib.suppress(InvalidStateError):  # it was cancelled meanwhile
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)


# --- the threads of this process ------------------------------------------------------------------------

_running: set[Scheduler] = set()
_starting = Lock()
_ending = False


def refuse_green_threads() -> None:
    """Refuse to run where green threads have replaced real ones: a pass would stop all of them.

    Raises:
        AlignerError: If gevent or eventlet has patched them.
    """
    library = (getattr(_thread.start_new_thread, "__module__", None) or "").partition(".")[0]
    if library in ("gevent", "eventlet"):
        raise AlignerError(
            f"{library} has replaced threads by green ones, all of which an aligner's passes would stop: leave threads out "
            "of its patch (monkey.patch_all(thread=False) in gevent, monkey_patch(thread=False) in eventlet), or use workers "
            "with real threads (gunicorn --worker-class gthread)"
        )


def _start(scheduler: Scheduler, thread: threading.Thread) -> None:
    refuse_green_threads()
    with _starting:
        if _ending:
            raise ClosedError("Python is ending: all aligners were closed")
        _running.add(scheduler)
        thread.start()


@atexit.register
def _end() -> None:
    """Close every scheduler, and wait until none is in a pass."""
    global _ending
    with _starting:
        _ending = True
    ending = list(_running)
    for scheduler in ending:
        scheduler.close(wait=False)
    for scheduler in ending:
        while not scheduler._ended.is_set() and scheduler._thread is not None and scheduler._thread.is_alive():
            with contextlib.suppress(BaseException):  # an interrupt now must not make the process abort
                scheduler._ended.wait()


def _forget_threads() -> None:
    """Reset all schedulers in a forked process, which has no threads."""
    for scheduler in list(_running):
        scheduler._begin_anew()
    _running.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)
