"""Errors of the file system, whatever library meets them, as one error that names a folder and what to do."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from aligner_middleware.errors import BuildError

_WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
# How torch and numpy report a write that was cut short; they do not give the cause.
_CUT_SHORT = re.compile(r"unexpected pos \d+|iostream error|write\(\): fd \d+ failed|\d+ requested and \d+ written")
_RUST_ERROR = re.compile(r"\(os error (\d+)\)")


@contextmanager
def disk_errors(folder: Path, advice: str) -> Iterator[None]:
    """Turn errors of the file system within into one that names the folder.

    Raises:
        BuildError: Instead of them, with `advice` at its end.
    """
    try:
        yield
    except Exception as exc:
        reason = _disk_reason(exc)
        if reason is None:
            raise
        raise BuildError(f"{folder} cannot be written: {reason}; {advice}") from exc


def reason_of(exc: BaseException) -> str:
    """Describe an error of the file system: its cause, and the file if it names one."""
    named = getattr(exc, "filename", None)
    return f"{getattr(exc, 'strerror', None) or exc}{f' ({named})' if named else ''}"


def _disk_reason(exc: Exception) -> str | None:
    """Find the error of the file system that caused an error, if one did."""
    cause: BaseException | None = exc
    while cause is not None:
        from_rust = _RUST_ERROR.search(str(cause))
        number = int(from_rust[1]) if from_rust else cause.errno if isinstance(cause, OSError) else None
        if number in _WRITE_ERRORS:
            return os.strerror(number)
        if _CUT_SHORT.search(str(cause)):
            return "a file could be written in part only, is the disk full?"
        cause = cause.__cause__ or cause.__context__
    network = isinstance(exc, ConnectionError | TimeoutError)
    return reason_of(exc) if isinstance(exc, OSError) and exc.errno and not network else None
