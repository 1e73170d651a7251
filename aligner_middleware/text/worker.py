"""The thread that encodes and compares the texts of tasks, so that no event loop waits for that. A process has one."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def submit(work: Callable[[], object]) -> None:
    """Run a function in the thread, without waiting for it."""
    _thread.submit(work)


async def run(work: Callable[[], T]) -> T:
    """Run a function in the thread, and await its result."""
    return await asyncio.get_running_loop().run_in_executor(_thread, work)


def _start() -> None:
    """Make the thread; also called in a forked process, which has no threads of its parent."""
    global _thread
    _thread = ThreadPoolExecutor(1, "aligner-texts")


_thread: ThreadPoolExecutor
_start()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start)
