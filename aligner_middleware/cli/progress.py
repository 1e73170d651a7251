"""Shows on standard error how far a job is: one bar in a terminal, a line now and then in a log."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from aligner_middleware.cli.output import console, note
from aligner_middleware.data.progress import Progress, Report

SECONDS_BETWEEN_LINES = 30.0  # in a log


def showing(title: str, unit: str = "") -> AbstractContextManager[Report]:
    """Show a job while the context lasts; the job calls what the context gives.

    Args:
        title: Name of the job, such as `export default`.
        unit: What is counted, such as `rows`.
    """
    return _bar(title) if in_terminal() else _log(title, unit)


def in_terminal() -> bool:
    """Whether standard error can draw bars. Rich alone would draw them into a log where FORCE_COLOR is set."""
    return console.is_terminal and console.file.isatty() and not console.is_dumb_terminal


@contextmanager
def resumable() -> Iterator[None]:
    """Tell the user, where the command is interrupted meanwhile, that the same command resumes it."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt("repeat the command to resume") from None


def _label(title: str, stage: str) -> str:
    return title if not stage or stage in title.split() else f"{title}: {stage}"


@contextmanager
def _bar(title: str) -> Iterator[Report]:
    """One bar, which begins anew with each stage."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[detail]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    # Standard output holds data, and is not to be drawn into the bar.
    with Bars(*columns, console=console, redirect_stdout=False) as bars:
        task = bars.add_task(title, total=None, detail="")
        stage = ""

        def report(at: Progress) -> None:
            nonlocal stage
            if at.stage != stage:
                stage = at.stage
                bars.reset(task, description=_label(title, stage), total=at.total)
            bars.update(task, completed=at.done, total=at.total, detail=at.detail)

        yield report


@contextmanager
def _log(title: str, unit: str) -> Iterator[Report]:
    log = _Log(title, unit)
    yield log.report
    log.end()


class _Log:
    """Lines of a log: when a stage begins, now and then, and when it is done.

    A stage whose size is not known may be over in no time: it has lines now and then only.
    """

    def __init__(self, title: str, unit: str) -> None:
        self._title = title
        self._unit = f" {unit}" if unit else ""
        self._start = self._began = self._latest = self._wrote = time.monotonic()
        self._first: tuple[Progress, float] | None = None  # report of the stage, and its time
        self._pending = ""  # line of the latest report, where it has not been written
        self._finished = True  # the stage; also one of unknown size

    def report(self, at: Progress) -> None:
        """Take a report, and write a line if one is due."""
        now = time.monotonic()
        is_new = self._first is None or self._first[0].stage != at.stage
        if is_new:
            self._write()
            self._began, self._first = self._latest, (at, now)
        self._latest, self._pending = now, self._line(at)
        self._finished = at.total is None or at.done >= at.total
        if at.done == at.total:
            self._write(f", in {now - self._began:.0f} s")
        elif (is_new and at.total is not None) or now - self._wrote >= SECONDS_BETWEEN_LINES:
            self._write(self._left(at, now))

    def end(self) -> None:
        """Tell of a job that ended before all of its last stage was done."""
        if not self._finished:
            self._write()
            note(f"{self._title}: ended after {time.monotonic() - self._start:.0f} s")

    def _line(self, at: Progress) -> str:
        label = _label(self._title, at.stage)
        count = f"{at.done}{'' if at.total is None else f' of {at.total}'}{self._unit}"
        line = f"{label}{':' if label == self._title else ','} {count}"
        return f"{line}, {at.detail}" if at.detail else line

    def _left(self, at: Progress, now: float) -> str:
        """Tell how long the rest of the stage takes, at its speed so far."""
        if self._first is None or at.total is None or at.done <= self._first[0].done:
            return ""
        first, seen = self._first
        return f", {(now - seen) / (at.done - first.done) * (at.total - at.done):.0f} s left"

    def _write(self, more: str = "") -> None:
        if self._pending:
            note(self._pending + more)
            self._wrote, self._pending = time.monotonic(), ""
