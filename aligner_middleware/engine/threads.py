"""Threads that work for callers: one for each engine, started with its first work, ended with it or with Python.

Python must not exit while a thread is in a pass: native code that returns to an interpreter that no longer exists aborts the
process. So when Python exits, all of them are closed and waited for. A forked process has none of them, and starts its own.
"""

from __future__ import annotations

import _thread
import atexit
import contextlib
import os
import threading

from aligner_middleware.errors import AlignerError, ClosedError
from aligner_middleware.forks import Lock


class BackgroundThread:
    """A daemon thread that a subclass gives work to."""

    def __init__(self) -> None:
        self._closed = False
        self._lock = Lock()
        self._begin_anew()

    def _begin_anew(self) -> None:
        """Set the state before the first work. Also for a forked process, which has no threads."""
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()

    def _work(self) -> None:
        """Work in the thread until `_stop` is called."""
        raise NotImplementedError

    def _stop(self) -> None:
        """Make the thread end as soon as possible. For any thread; the lock is not held."""
        raise NotImplementedError

    def close(self, *, wait: bool = True) -> None:
        """End all waiting and running calls with `ClosedError`, and end the thread.

        Args:
            wait: Whether to wait until it has ended. What it is doing is stopped, so this does not take long.
        """
        with self._lock:
            self._closed = True
        self._stop()
        thread = self._thread
        if wait and thread is not None and thread.is_alive() and thread is not threading.current_thread():
            self._ended.wait()  # not `join`: after an interrupt Python 3.11 takes the thread for ended

    @property
    def _idle(self) -> bool:
        """Whether there is no thread, so that the next work has to start one. The lock is held."""
        return self._thread is None or not self._thread.is_alive()

    def _start(self) -> None:
        """Start the thread. The lock is held.

        Raises:
            ClosedError: If Python is ending.
            AlignerError: If threads are green.
        """
        refuse_green_threads()
        self._ended.clear()
        self._thread = threading.Thread(target=self._run, name="aligner", daemon=True)
        with _starting:
            if _ending:
                raise ClosedError("Python is ending: all aligners were closed")
            _running.add(self)
            self._thread.start()

    def _run(self) -> None:
        try:
            self._work()
        finally:
            _running.discard(self)
            self._ended.set()


_running: set[BackgroundThread] = set()
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


@atexit.register
def _end() -> None:
    """Close every thread, and wait until none is at work."""
    global _ending
    with _starting:
        _ending = True
    ending = list(_running)
    for one in ending:
        one.close(wait=False)
    for one in ending:
        while not one._ended.is_set() and one._thread is not None and one._thread.is_alive():
            with contextlib.suppress(BaseException):  # an interrupt now must not make the process abort
                one._ended.wait()


def _forget_threads() -> None:
    """Reset all of them in a forked process, which has no threads."""
    for one in list(_running):
        one._begin_anew()
    _running.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)
