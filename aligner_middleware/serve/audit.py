"""The audit log: every decision in one SQLite file, written by a thread of its own."""

from __future__ import annotations

import hmac
import logging
import secrets
import sqlite3
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aligner_middleware.serve.audit_file import AuditFile, values_of
from aligner_middleware.serve.facts import texts

if TYPE_CHECKING:
    from aligner_middleware.serve.service import Decision

logger = logging.getLogger("aligner_middleware.serve")

_BATCH = 500  # rows of one transaction


class AuditLog:
    """Writes decisions to a file. It never holds up whoever tells it: where it cannot keep up, it loses decisions.

    Args:
        path: The file.
        keep: Rows that the file keeps.
        on_lost: Called with the number of decisions that were lost.
        key: By which the digests of texts are keyed; `None` for a new one.
        waiting: Decisions that may wait to be written.
        characters: Characters that may wait, in all.

    Raises:
        JobError: If the file cannot be written, or is no audit log.
    """

    def __init__(
        self,
        path: Path,
        keep: int,
        on_lost: Callable[[int], None] | None = None,
        *,
        key: bytes | None = None,
        waiting: int = 10_000,
        characters: int = 50_000_000,
    ) -> None:
        self.path = path
        self._file = AuditFile(path, create=True)
        self._keep = keep
        self._on_lost = on_lost
        self._key = secrets.token_bytes() if key is None else key
        self._limits = waiting, characters
        self._rows: deque[list[Any]] = deque()
        self._characters = 0
        self._losing = False
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._write, name="audit-log", daemon=True)
        self._thread.start()

    def __call__(self, decision: Decision) -> None:
        """Take a decision; it is written a little later."""
        row = row_of(decision, self._key)
        size = _size(row)
        with self._changed:
            full = len(self._rows) >= self._limits[0] or self._characters + size > self._limits[1]
            if not full and not self._closed:
                self._rows.append(row)
                self._characters += size
                self._losing = False
                self._changed.notify()
                return
            first, self._losing = not self._losing, True
        self._lost(1)
        if first:  # of a run of losses; more lines would say no more
            logger.error(
                "%s: the audit log cannot keep up and loses decisions; see aligner_audit_lost_total", self.path
            )

    def close(self) -> None:
        """Write what waits, and close the file."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _write(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._rows or self._closed)
                batch = [self._rows.popleft() for _ in range(min(_BATCH, len(self._rows)))]
                self._characters -= sum(map(_size, batch))
            if not batch:
                break
            try:
                self._file.add(batch, self._keep)
            except Exception as exc:  # a full disk: it may be mended, and the thread must live until then
                self._lost(len(batch))
                logger.error("%s: %d decisions could not be written: %s", self.path, len(batch), exc)
        try:
            self._file.close()
        except sqlite3.Error:
            logger.exception("%s: the audit log could not be closed", self.path)

    def _lost(self, count: int) -> None:
        if self._on_lost is not None:
            self._on_lost(count)


def row_of(decision: Decision, key: bytes) -> list[Any]:
    """Make the row of a decision; with its texts only where the client's policy keeps them, and with their digests.

    Args:
        decision: The decision.
        key: Of the digests: without it nobody can find a short text by trying all.
    """
    seen, said = decision.facts, texts(decision)
    kept = said._asdict() if decision.client.policy.keep_texts else dict.fromkeys(said._fields)
    digests = {f"{name}_digest": _digest(key, text) for name, text in said._asdict().items()}
    single = {"strength": str(seen.strength), "doubts": " ".join(seen.doubts)}
    return values_of(asdict(seen) | single | digests | kept)


def _digest(key: bytes, text: str | None) -> str | None:
    """Give the HMAC-SHA256 of a text, in hexadecimal; `None` where there is none."""
    if text is None:
        return None
    return hmac.digest(key, text.encode("utf-8", "surrogatepass"), "sha256").hex()


def _size(row: list[Any]) -> int:
    return sum(len(value) for value in row if isinstance(value, str))
