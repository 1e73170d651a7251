"""The thread that texts are encoded and compared in, so that no event loop waits for that. A process has one."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def submit(work: Callable[[], object]) -> None:
    """Do something in the thread, and wait neither for its end nor its result."""
    _thread.submit(work)


async def run(work: Callable[[], T]) -> T:
    """Do something in the thread, and await its result."""
    return await asyncio.get_running_loop().run_in_executor(_thread, work)


def _start() -> None:
    """Make the thread, also in a forked process, which has none of its parent's."""
    global _thread
    _thread = ThreadPoolExecutor(1, "aligner-texts")


_thread: ThreadPoolExecutor
_start()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start)
