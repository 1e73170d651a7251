"""What a long job has done so far, on disk, so that one that was killed goes on where it stopped.

A file of JSON lines: first the job's settings, then a line for each thing done, under its key. A line is written whole or
not at all: a torn last line is what a kill in the middle of writing leaves, and is dropped.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Self

from aligner_middleware.data.files import alone
from aligner_middleware.errors import DataError


class Journal:
    """A job's journal; use it in a `with` block.

    Args:
        path: The file. It is made, or taken up again.
        settings: What the job depends on. A file of another job is not taken up.

    Attributes:
        done: What was done, by key, in order.

    Raises:
        DataError: If the file is another job's, is in use by another process, or cannot be read or written.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.done: dict[str, Any] = {}
        self._settings = json.loads(json.dumps(settings))
        self._mutex = threading.Lock()
        self._held = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(alone(self.path))
            with self._naming():
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
        """Note that something was done; it is on disk when this returns. May be called from any thread.

        Raises:
            DataError: If it cannot be written, for example because the disk is full. What was noted before stays.
        """
        with self._mutex:
            self._write({"key": key, "value": value})
            self.done[key] = value

    def remove(self) -> None:
        """Delete the file, when the job's result is elsewhere.

        Raises:
            DataError: If it cannot be deleted.
        """
        with self._naming():
            self.path.unlink(missing_ok=True)

    def _read(self) -> int:
        """Take up what is there, and say how many bytes of it are whole lines."""
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
                    str(self.path), number, f"is no journal of this job: {exc!r}; delete it to start anew"
                ) from exc
            self._check(settings)
            whole += len(line) + 1
        return whole

    @contextmanager
    def _naming(self) -> Iterator[None]:
        """Turn errors of the file system into one that names the file."""
        try:
            yield
        except OSError as exc:
            raise DataError(str(self.path), 1, f"cannot be read or written: {exc.strerror or exc}") from exc

    def _check(self, settings: Any) -> None:
        if settings == self._settings:
            return
        old = settings if isinstance(settings, dict) else {}
        names = sorted(name for name in {*old, *self._settings} if old.get(name) != self._settings.get(name))
        raise DataError(
            str(self.path),
            1,
            f"holds the beginning of a job with other settings ({', '.join(names)}): repeat that one, or delete this file",
        )

    def _write(self, row: Mapping[str, Any], *, fresh: bool = False) -> None:
        line = (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")
        size = 0
        try:
            size = 0 if fresh or not self.path.exists() else self.path.stat().st_size
            with self.path.open("wb" if fresh else "ab") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as exc:
            with suppress(OSError):  # a torn last line is dropped when it is read, too
                os.truncate(self.path, size)
            raise DataError(
                str(self.path), 1, f"cannot be written: {exc.strerror or exc}; what was done stays"
            ) from exc
