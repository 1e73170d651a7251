"""What long commands tell on standard error: bars in a terminal, and a line now and then in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from aligner_middleware.cli.output import console, note
from aligner_middleware.data.progress import Progress as JobProgress

SECONDS_BETWEEN_LINES = 30.0  # of one task in a log

Report = Callable[[int, int | None], None]


class Tasks(Protocol):
    """What is under way, by name."""

    def update(self, name: str, done: int, of: int | None, said: str = "") -> None:
        """Tell how much of a task is done, and of how much, if that is known; and what else there is to say."""


@contextmanager
def tasks(unit: str = "") -> Iterator[Tasks]:
    """Show tasks, each from its first update on.

    Args:
        unit: What is counted, such as `rows`.
    """
    if in_terminal():
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[said]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        # Standard output holds data, and is not to be drawn into the bars.
        with Progress(*columns, console=console, redirect_stdout=False) as progress:
            yield _Bars(progress)
    else:
        lines = _Lines(unit)
        yield lines
        lines.end()


@contextmanager
def bar(title: str, of: int | None, unit: str) -> Iterator[Report]:
    """Show one task, whose progress is reported as what is done and of how much.

    Args:
        title: Its name.
        of: How much there is to do; `None` where that is not known.
        unit: What is counted.
    """
    with tasks(unit) as shown:
        if in_terminal():
            shown.update(title, 0, of)
        elif of is not None:
            note(f"{title}: {of} {unit}")
        yield lambda done, of: shown.update(title, done, of)


@contextmanager
def steps(title: str, of: int) -> Iterator[Callable[[str], None]]:
    """Show a task of named steps; each is reported when it begins."""
    begun = 0
    with tasks() as shown:

        def report(step: str) -> None:
            nonlocal begun
            begun += 1
            if in_terminal():
                shown.update(title, begun - 1, of, step)
            else:
                note(f"{title}: {step} (step {begun} of {of})")

        start = time.monotonic()
        yield report
        if in_terminal():
            shown.update(title, of, of)
        else:
            note(f"{title}: done in {time.monotonic() - start:.0f} s")


@contextmanager
def job(unit: str = "") -> Iterator[Callable[[JobProgress], None]]:
    """Show the stages of a job that reports its progress.

    Args:
        unit: What is counted.
    """
    with tasks(unit) as shown:

        def report(at: JobProgress) -> None:
            if at.detail.startswith("resumes "):
                note(f"{at.stage}: {at.detail}")
            shown.update(at.stage, at.done, at.total, "" if at.detail.startswith("resumes ") else at.detail)

        yield report


def in_terminal() -> bool:
    """Whether standard error can draw bars. Rich alone would draw them into a log where FORCE_COLOR is set."""
    return console.is_terminal and console.file.isatty() and not console.is_dumb_terminal


class _Bars:
    """Tasks in a terminal."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._ids: dict[str, Any] = {}

    def update(self, name: str, done: int, of: int | None, said: str = "") -> None:
        if name not in self._ids:
            self._ids[name] = self._progress.add_task(name, total=of, completed=done, said=said)
        self._progress.update(self._ids[name], completed=done, total=of, said=said)


@dataclass
class _Task:
    """A task in a log.

    Attributes:
        began: When it began.
        seen, first: When it was first told of, and how much of it was done by then.
        told: When there was the latest line of it; `None` before the first.
        unsaid: What there is to say of it, and has not been said.
    """

    began: float
    seen: float
    first: int
    told: float | None = None
    unsaid: str = ""


class _Lines:
    """Tasks in a log: a line for each when it is first told of, now and then, and when it is done.

    One whose size is not known may be over in no time: it has lines now and then only.
    """

    def __init__(self, unit: str) -> None:
        self._unit = f" {unit}" if unit else ""
        self._tasks: dict[str, _Task] = {}
        self._free = time.monotonic()  # since when no task is under way

    def update(self, name: str, done: int, of: int | None, said: str = "") -> None:
        now = time.monotonic()
        task = self._tasks.setdefault(name, _Task(began=self._free, seen=now, first=done))
        task.unsaid = f"{name}: {done}{'' if of is None else f' of {of}'}{self._unit}{f', {said}' if said else ''}"
        if done == of:
            self._end(task, now)
        elif self._due(task, now, of):
            left = (now - task.seen) / (done - task.first) * (of - done) if of and done > task.first else None
            note(task.unsaid if left is None else f"{task.unsaid}, {left:.0f} s left")
            task.told, task.unsaid = now, ""

    def end(self) -> None:
        """Tell of tasks that ended before all of them was done."""
        for task in self._tasks.values():
            if task.unsaid and task.told is not None:
                self._end(task, time.monotonic())

    def _due(self, task: _Task, now: float, of: int | None) -> bool:
        if task.told is None and of is not None:
            return True
        return now - (task.began if task.told is None else task.told) >= SECONDS_BETWEEN_LINES

    def _end(self, task: _Task, now: float) -> None:
        note(f"{task.unsaid}, in {now - task.began:.0f} s")
        task.told, task.unsaid, self._free = now, "", now
