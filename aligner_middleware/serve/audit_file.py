"""The file of the audit log: one SQLite database, which several processes may write, and only its owner may read."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from aligner_middleware.errors import AlignerError, JobError

Mark = Literal["right", "wrong"]
MARKS: tuple[Mark, ...] = get_args(Mark)

_APPLICATION = 0x414C474E  # tells our files from those of others
_VERSION = 3  # 1 had digests without a key, and was in no release
_FORMER = 2  # without instructions: it is read as it is, and gets their columns when it is written
_PATIENCE = 30  # seconds that a process waits for another one's transaction
_STEPS = 10_000  # of SQLite's machine, between two looks at the clock
_COLUMNS = (
    "id", "at", "client", "route", "model", "mode", "strength", "threshold", "verdict", "score", "changed", "doubts",
    "seconds", "error", "question_digest", "answer_digest", "text_digest", "question", "answer", "text",
    "instruction_digest", "instruction",
)  # fmt: skip
_SCHEMA = """
CREATE TABLE decisions (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE, at TEXT NOT NULL, client TEXT NOT NULL, route TEXT NOT NULL,
    model TEXT NOT NULL, mode TEXT NOT NULL, strength TEXT NOT NULL, threshold REAL,
    verdict TEXT NOT NULL, score REAL, changed INTEGER NOT NULL, doubts TEXT NOT NULL, seconds REAL NOT NULL, error TEXT,
    question_digest TEXT NOT NULL, answer_digest TEXT NOT NULL, text_digest TEXT NOT NULL,
    question TEXT, answer TEXT, text TEXT,
    mark TEXT CHECK (mark IN ('right', 'wrong'))
);
CREATE INDEX decisions_of_clients ON decisions (client, number);
"""
_INSTRUCTIONS = """
ALTER TABLE decisions ADD COLUMN instruction_digest TEXT;
ALTER TABLE decisions ADD COLUMN instruction TEXT;
"""
_INSERT = " ".join(("INSERT INTO decisions (", ", ".join(_COLUMNS), ") VALUES (", ", ".join("?" * len(_COLUMNS)), ")"))
_SEARCH = r"""
SELECT * FROM decisions WHERE client = :client AND (
    :pattern = '%%' OR question LIKE :pattern ESCAPE '\' OR answer LIKE :pattern ESCAPE '\' OR text LIKE :pattern ESCAPE '\'
    OR verdict LIKE :pattern ESCAPE '\' OR route LIKE :pattern ESCAPE '\' OR mark LIKE :pattern ESCAPE '\'
) ORDER BY number DESC LIMIT :limit
"""

Row = dict[str, Any]


class SearchTimeoutError(AlignerError):
    """A search that was given up."""


class AuditFile:
    """An open audit log. Use it from one thread at a time.

    Args:
        path: The file.
        create: Whether to make it where it is missing, and to write; else it is only read.

    Raises:
        JobError: If it is missing, cannot be opened, or is no audit log.
    """

    def __init__(self, path: Path, *, create: bool = False) -> None:
        self.path = path
        if not create and not path.is_file():
            raise JobError(path, "there is no such file: expected the audit log that `aligner serve --audit` writes")
        try:
            if create:
                path.parent.mkdir(parents=True, exist_ok=True)
                os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
            self._database = sqlite3.connect(path, timeout=_PATIENCE, isolation_level=None, check_same_thread=False)
        except (OSError, sqlite3.Error) as exc:
            raise JobError(path, f"cannot be opened: {getattr(exc, 'strerror', None) or exc}") from exc
        self._database.row_factory = sqlite3.Row
        try:
            self._prepare(create)
        except sqlite3.Error as exc:
            self.close()
            raise JobError(path, f"is no audit log of `aligner serve`: {exc}") from exc
        except JobError:
            self.close()
            raise

    def close(self) -> None:
        """Close it."""
        self._database.close()

    def add(self, rows: Sequence[Sequence[Any]], keep: int) -> None:
        """Add rows in one transaction, and delete the oldest above a number.

        Args:
            rows: Their values, in the order of the columns.
            keep: Rows that stay.

        Raises:
            sqlite3.Error: If the file cannot be written.
        """
        with self._transaction():
            self._database.executemany(_INSERT, rows)
            newest = self._database.execute("SELECT max(number) FROM decisions").fetchone()[0]
            self._database.execute("DELETE FROM decisions WHERE number <= ?", (newest - keep,))

    def mark(self, id: str, client: str, mark: Mark | None) -> bool:
        """Mark a decision as right or wrong, or take its mark off; say whether the client has such a decision."""
        change = "UPDATE decisions SET mark = ? WHERE id = ? AND client = ?"
        return self._database.execute(change, (mark, id, client)).rowcount == 1

    def search(self, client: str, words: str, limit: int, seconds: float = 2.0) -> list[Row]:
        """Find the last decisions of a client that have a text in question, answer, verdict, route or mark.

        Args:
            client: Its name.
            words: The text; empty for all decisions.
            limit: Decisions to give, the newest first.
            seconds: After which the search is given up.

        Raises:
            SearchTimeoutError: If it took longer.
        """
        escaped = words.replace("\\", r"\\").replace("%", r"\%").replace("_", r"\_")
        values = {"client": client, "pattern": f"%{escaped}%", "limit": limit}
        end = time.monotonic() + seconds
        self._database.set_progress_handler(lambda: time.monotonic() > end, _STEPS)
        try:
            return [dict(row) for row in self._database.execute(_SEARCH, values)]
        except sqlite3.OperationalError as exc:
            if time.monotonic() <= end:
                raise
            raise SearchTimeoutError(f"the search took longer than {seconds:g} seconds: look for less") from exc
        finally:
            self._database.set_progress_handler(None, 0)

    def rows(self, since: str = "") -> Iterator[Row]:
        """Give all decisions from a time on, the oldest first.

        Args:
            since: The time, as of ISO 8601 in UTC.
        """
        query = "SELECT * FROM decisions WHERE at >= ? ORDER BY number"
        return (dict(row) for row in self._database.execute(query, (since,)))

    def _prepare(self, create: bool) -> None:
        """Check that the file is ours, before anything of it is changed; make its table where it is empty."""
        if not (create and self._value("PRAGMA schema_version") == 0):
            self._check()
        if not create:
            self._database.execute("PRAGMA query_only = ON")
            return
        self.path.chmod(0o600)  # SQLite gives the files beside it the same mode
        self._when_free("PRAGMA journal_mode = WAL")
        self._database.execute("PRAGMA synchronous = NORMAL")
        self._database.execute("PRAGMA secure_delete = ON")  # deleted texts leave the file, too
        with self._transaction():
            if self._value("PRAGMA schema_version") == 0:  # still: another process may have made it
                self._execute(_SCHEMA)
                self._database.execute(f"PRAGMA application_id = {_APPLICATION}")
                self._database.execute(f"PRAGMA user_version = {_FORMER}")
            self._check()
            if self._value("PRAGMA user_version") == _FORMER:
                self._execute(_INSTRUCTIONS)
                self._database.execute(f"PRAGMA user_version = {_VERSION}")

    def _check(self) -> None:
        if self._value("PRAGMA application_id") != _APPLICATION:
            raise JobError(self.path, "is no audit log of `aligner serve`: give the file of its setting `audit`")
        if self._value("PRAGMA user_version") not in (_FORMER, _VERSION):
            raise JobError(self.path, "was written by another version of aligner-middleware: use that, or a new file")

    def _execute(self, statements: str) -> None:
        for statement in filter(str.strip, statements.split(";")):
            self._database.execute(statement)

    def _when_free(self, statement: str) -> None:
        """Execute a statement for which SQLite itself does not wait while others write."""
        end = time.monotonic() + _PATIENCE
        while True:
            try:
                self._database.execute(statement)
                return
            except sqlite3.OperationalError as exc:
                if "locked" not in str(exc) or time.monotonic() > end:
                    raise
                time.sleep(0.02)

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._database.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._database.execute("ROLLBACK")
            raise
        self._database.execute("COMMIT")

    def _value(self, statement: str) -> Any:
        return self._database.execute(statement).fetchone()[0]


@contextlib.contextmanager
def opened(path: Path, *, create: bool = False) -> Iterator[AuditFile]:
    """Open an audit log, and close it at the end.

    Raises:
        JobError: As `AuditFile`, and if SQLite cannot do what it is asked, such as where another program holds the file.
    """
    file = AuditFile(path, create=create)
    try:
        yield file
    except sqlite3.Error as exc:
        raise JobError(path, f"cannot be used: {exc}") from exc
    finally:
        file.close()


def values_of(row: dict[str, Any]) -> list[Any]:
    """Put the values of a row into the order of the columns; lone surrogates, which SQLite has no form for, become `?`."""
    return [_storable(row[name]) for name in _COLUMNS]


def _storable(value: Any) -> Any:
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


def labelled(rows: Iterable[Row], *, marked: bool) -> Iterator[Row | str]:
    """Turn decisions into labelled answers, which `aligner calibrate` and `aligner train` read.

    A decision that was right says that the answer is bad where it changed it, with the new text as the better one, and else
    that it is good; one that was wrong says the opposite.

    Args:
        rows: The decisions.
        marked: Whether to leave out decisions without a mark; else these count as right.

    Yields:
        A row with question, answer, kind, source, maybe better and instruction; or the reason why there is none.
    """
    seen = set()
    for row in rows:
        reason = _unusable(row, marked)
        if reason:
            yield reason
            continue
        bad = bool(row["changed"]) == (row["mark"] != "wrong")
        made = {"question": row["question"], "answer": row["answer"], "kind": "bad" if bad else "keep"}
        if bad and row["changed"]:
            made["better"] = row["text"]
        if row.get("instruction"):  # files of the former version have none
            made["instruction"] = row["instruction"]
        key = tuple(made.items())
        if key in seen:
            yield "are repeated"
            continue
        seen.add(key)
        yield made | {"source": row["client"]}


def _unusable(row: Row, marked: bool) -> str | None:
    if row["verdict"] == "error":
        return "have failed"
    if row["question"] is None:
        return "have no texts (`keep_texts` was off)"
    if marked and row["mark"] is None:
        return "have no mark"
    if not row["question"].strip() or not row["answer"].strip():
        return "have no question or no answer"
    if row["verdict"] == "none" and row["mark"] is None:
        return "were not looked at by the aligner, and have no mark"
    return None
