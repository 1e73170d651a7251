"""A journal of a long job on disk, so that an interrupted job resumes.

A file of JSON lines: first the job's settings, then one line for each finished item, under its key. A kill in the middle of
a write leaves a last line without its end, which is dropped on reading.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Self, TypeVar

from aligner_middleware.data.locks import exclusive_lock
from aligner_middleware.data.progress import Progress, Report
from aligner_middleware.errors import ConfigError, DataError, JobError

T = TypeVar("T")
Row = dict[str, Any] | Exception  # what is recorded of an item, or the error that prevented it
Run = Callable[[Mapping[str, T]], Iterable[Mapping[str, Row]]]


def journal_of(out: Path) -> Path:
    """Give the place of the journal of a job that writes one file: a hidden file beside it."""
    return out.with_name(f".{out.name}.journal")


class Journal:
    """A job's journal; use it in a `with` block.

    Args:
        path: The file: a new one, or one that an interrupted job left.
        settings: The job's settings. A file with other settings is refused.

    Attributes:
        done: Finished items by key, in order.

    Raises:
        ConfigError: If the file was begun with other settings.
        DataError: If a line of it is no line of a journal.
        JobError: If another process uses it, or it cannot be read or written.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.done: dict[str, Any] = {}
        self._settings = json.loads(json.dumps(settings))
        self._mutex = threading.Lock()
        self._held = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(exclusive_lock(self.path))
            with self._naming_file():
                whole = self._read()
                if whole == 0:
                    self._write({"settings": self._settings}, fresh=True)
                elif whole < self.path.stat().st_size:
                    os.truncate(self.path, whole)
            self._held = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._held.close()

    def add(self, key: str, value: Any) -> None:
        """Record a finished item; it is on disk when this returns. May be called from any thread.

        Raises:
            JobError: If it cannot be written, for example because the disk is full. Earlier items stay.
        """
        self._add({key: value})

    def finish(self, items: Mapping[str, T], run: Run[T], stage: str, report: Report) -> dict[str, Exception]:
        """Do the items of a job that are not done yet, and record them batch by batch as they come.

        Args:
            items: All items of the job, by key.
            run: Given those that are not done, yields batches of their rows by key, in any order.
            stage: Name of what is done, for reports.
            report: Called after each batch.

        Returns:
            The items that failed, each with its error; they are not recorded, so that the same job does them again.

        Raises:
            JobError: If the journal cannot be written.
        """
        todo = {key: item for key, item in items.items() if key not in self.done}
        done, failed = len(items) - len(todo), dict[str, Exception]()
        for batch in run(todo):
            failed |= {key: row for key, row in batch.items() if isinstance(row, Exception)}
            rows = {key: row for key, row in batch.items() if key not in failed}
            self._add(rows)
            done += len(rows)
            report(Progress(stage, done, len(items)))
        return failed

    def remove(self) -> None:
        """Delete the file, when the job's result is written elsewhere.

        Raises:
            JobError: If it cannot be deleted.
        """
        with self._naming_file():
            self.path.unlink(missing_ok=True)

    def _read(self) -> int:
        """Read the items of an interrupted job, and count the bytes of whole lines."""
        if not self.path.exists():
            return 0
        whole = 0
        for number, line in enumerate(self.path.read_bytes().split(b"\n")[:-1], 1):
            try:
                row = json.loads(line)
                if number > 1:
                    self.done[row["key"]] = row["value"]
                settings = row["settings"] if number == 1 else self._settings
            except (ValueError, KeyError, TypeError, RecursionError) as exc:
                raise DataError(
                    str(self.path), number, f"is no journal of this job: {exc!r}; delete it to start again"
                ) from exc
            self._check(settings)
            whole += len(line) + 1
        return whole

    @contextmanager
    def _naming_file(self) -> Iterator[None]:
        """Turn errors of the file system into one that names the file."""
        try:
            yield
        except OSError as exc:
            raise JobError(self.path, f"cannot be read or written: {exc.strerror or exc}") from exc

    def _check(self, settings: Any) -> None:
        if settings == self._settings:
            return
        old = settings if isinstance(settings, dict) else {}
        names = sorted(name for name in {*old, *self._settings} if old.get(name) != self._settings.get(name))
        raise ConfigError(
            f"{self.path} holds the beginning of a job with other settings ({', '.join(names)}): "
            "repeat that one, or delete this file"
        )

    def _add(self, values: Mapping[str, Any]) -> None:
        """Record finished items in one write, which the disk confirms once."""
        with self._mutex:
            self._write(*({"key": key, "value": value} for key, value in values.items()))
            self.done |= values

    def _write(self, *rows: Mapping[str, Any], fresh: bool = False) -> None:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        lines = text.encode("utf-8", "surrogatepass")
        size = 0
        try:
            size = 0 if fresh or not self.path.exists() else self.path.stat().st_size
            with self.path.open("wb" if fresh else "ab") as file:
                file.write(lines)
                file.flush()
                os.fsync(file.fileno())
        except OSError as exc:
            with suppress(OSError):  # a last line without its end is dropped on reading, too
                os.truncate(self.path, size)
            raise JobError(self.path, f"cannot be written: {exc.strerror or exc}; finished items stay in it") from exc
