"""Steps that take time, which a thread runs and a task awaits: work on texts, waiting for the engine.

A flow (`streaming.py`) is a generator that gives steps, so that it is written once for threads and for tasks. `run` and
`arun` do them; an error of a step is raised in the flow, where it waits for that step.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Generator, Iterable
from concurrent.futures import Future, InvalidStateError
from typing import Any, Generic, Protocol, TypeVar, cast, overload

from aligner_middleware.deadline import Deadline
from aligner_middleware.text import worker

T = TypeVar("T")


class Step(Protocol):
    """A part of a flow that takes time: it is either run, or awaited."""

    def run(self) -> None:
        """Do it, and block until it is done."""

    async def arun(self) -> None:
        """Do it, and leave the event loop free."""


@overload
def run(steps: Generator[Step, None, T]) -> T: ...
@overload
def run(steps: Generator[str | Step, None, T]) -> str | T: ...
def run(steps: Generator[str | Step, None, T]) -> str | T:
    """Run steps up to the next text, and give that; at their end, give their result."""
    try:
        step = next(steps)
        while not isinstance(step, str):
            try:
                step.run()
            except Exception as exc:
                step = steps.throw(exc)
            else:
                step = next(steps)
        return step
    except StopIteration as end:
        return cast(T, end.value)


@overload
async def arun(steps: Generator[Step, None, T]) -> T: ...
@overload
async def arun(steps: Generator[str | Step, None, T]) -> str | T: ...
async def arun(steps: Generator[str | Step, None, T]) -> str | T:
    """Do the same as `run`, and leave the event loop free."""
    try:
        step = next(steps)
        while not isinstance(step, str):
            try:
                await step.arun()
            except Exception as exc:
                step = steps.throw(exc)
            else:
                step = next(steps)
        return step
    except StopIteration as end:
        return cast(T, end.value)


class EngineProgress:
    """Tells one reader that the engine has made a step."""

    def __init__(self) -> None:
        self.next: Future[None] = Future()
        """Done after the next step. To be read before the state that it tells of."""

    def notify(self) -> None:
        """Say that a step was made; called in the engine's thread."""
        latest, self.next = self.next, Future()
        with contextlib.suppress(InvalidStateError):  # its reader was cancelled
            latest.set_result(None)


class Work(Generic[T]):
    """Work on texts, which a task leaves to another thread."""

    result: T

    def __init__(self, work: Callable[[], T], deadline: Deadline) -> None:
        self._work = work
        self._deadline = deadline

    def run(self) -> None:
        """See `Step`."""
        self.result = self._work()

    async def arun(self) -> None:
        """See `Step`."""
        async with self._deadline.limit():
            self.result = await worker.run(self._work)


def beside(work: Callable[[], T], deadline: Deadline) -> Generator[Step, None, T]:
    """Do work as a step, and give its result."""
    step = Work(work, deadline)
    yield step
    return step.result


class Wait:
    """Waits for a future; its error is raised."""

    def __init__(self, future: Future[Any], deadline: Deadline) -> None:
        self._future = future
        self._deadline = deadline

    def run(self) -> None:
        """See `Step`."""
        self._deadline.result(self._future)

    async def arun(self) -> None:
        """See `Step`."""
        async with self._deadline.limit():
            await asyncio.wrap_future(self._future)


async def together(calls: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Await calls at the same time, and give their results in order; after an error the others are cancelled."""
    tasks: list[asyncio.Task[T]] = []
    try:
        for call in calls:  # one by one: making the next may fail
            tasks.append(asyncio.create_task(call))
        return list(await asyncio.gather(*tasks))
    finally:  # after an error nobody waits for the others
        for task in tasks:
            task.cancel()
