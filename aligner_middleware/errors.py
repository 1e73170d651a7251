"""Every error this package raises on purpose.

AlignerError
├── InputError               a question or an answer that cannot be corrected
│   └── PromptTooLongError   … because it does not fit into the aligner's context
├── CorrectionTimeoutError   a correction that took longer than its `timeout`
├── DoubtError               a correction that a safeguard objects to
├── MissingQuestionError     it is not known which question an answer belongs to
├── ArtifactError            an aligner folder that is missing, incomplete or altered
├── BuildError               a checkpoint that cannot be found, exported or trusted, or a folder that cannot be written
├── DataError                a row that cannot be read (carries file and line)
├── JobError                 a file or a folder that a job cannot use (carries its path)
├── ConfigError              settings that do not fit together, or that a run was not begun with
├── UpstreamError            a chat model that failed on some prompts
├── RemoteError              a server that runs an aligner, and cannot be reached or used
├── ClosedError              an aligner that was closed
└── MissingExtraError        an optional part of the package is not installed
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any


class AlignerError(Exception):
    """Base of every error raised on purpose by this package."""

    def __reduce__(self) -> Any:
        """Let it reach another process with its message and attributes."""
        return _again, (type(self), self.args, self.__dict__)


class InputError(AlignerError, ValueError):
    """A question or an answer that cannot be corrected; the message names which and why."""


class PromptTooLongError(InputError):
    """Question and answer leave no room for a correction in the aligner's context.

    Attributes:
        tokens: Length of what is too long, in tokens; at least, where it has so many characters that it was not counted.
        limit: Context of the aligner, in tokens.
    """

    def __init__(
        self, tokens: int, limit: int, *, what: str = "question and answer are", characters: int | None = None
    ) -> None:
        self.tokens = tokens
        self.limit = limit
        length = f"{tokens} tokens" if characters is None else f"{characters} characters"
        room = "a correction of the same length" if what.endswith("are") else "an answer and its correction"
        super().__init__(
            f"{what} {length} long, and the aligner reads {limit} tokens with room for {room}: shorten "
            f"{'them' if what.endswith('are') else 'it'}, or choose an aligner with a longer context"
        )


class CorrectionTimeoutError(AlignerError, TimeoutError):
    """A correction that took longer than it was given.

    Attributes:
        seconds: The time limit.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        super().__init__(
            f"the correction was given up after timeout={seconds:g} seconds: allow more, or let answers that take longer "
            "through uncorrected by on_error='passthrough'"
        )


class DoubtError(AlignerError):
    """A correction that safeguards object to, where `on_doubt="raise"`.

    Attributes:
        doubts: Names of the safeguards.
    """

    def __init__(self, doubts: tuple[str, ...]) -> None:
        self.doubts = doubts
        super().__init__(
            f"the correction is doubtful ({', '.join(doubts)}): on_doubt='passthrough' lets the original answer through, "
            "on_doubt='keep' the correction"
        )


class MissingQuestionError(AlignerError):
    """It is not known which question an answer belongs to.

    Attributes:
        cause: Why it is not known.
    """

    def __init__(self, cause: str) -> None:
        self.cause = cause
        super().__init__(
            f"cannot tell which question this answer belongs to: {cause}. Give it as question='…' or as a callable, "
            "question=lambda …: …; AlignerRunnable() also takes {'question': …, 'answer': …}; "
            "on_missing_question='passthrough' lets such answers through uncorrected"
        )


class ArtifactError(AlignerError):
    """An aligner folder that is missing, incomplete or altered."""


class BuildError(AlignerError):
    """A checkpoint that cannot be found, exported, or trusted after export; a folder that cannot be written."""


class DataError(AlignerError):
    """A row that cannot be read.

    Attributes:
        path: The file it stands in.
        line: Its line, counted from 1.
    """

    def __init__(self, path: str, line: int, reason: str) -> None:
        self.path = path
        self.line = line
        super().__init__(f"{path}:{line}: {reason}")


class JobError(AlignerError):
    """A file or a folder that a job cannot use.

    Attributes:
        path: The file or the folder.
    """

    def __init__(self, path: Path | str, reason: str) -> None:
        self.path = str(path)
        super().__init__(f"{path}: {reason}")


class ConfigError(AlignerError, ValueError):
    """Settings that do not fit together, or that differ from those that a run was begun with; the message names them."""


class UpstreamError(AlignerError):
    """A chat model that failed on some prompts of a job; the others are done.

    Attributes:
        count: How many failed.
    """

    def __init__(self, count: int, first: str) -> None:
        self.count = count
        super().__init__(f"{count} prompts failed, the first being {first}; repeat the command to ask them again")


class RemoteError(AlignerError):
    """A server that runs an aligner, and cannot be reached, refuses a request, or gives what cannot be used.

    Attributes:
        status: The HTTP status; `None` where there was none.
        temporary: Whether the same request may succeed later, as while the server starts or has too much to do.
        retry_after: Seconds that the server asks to wait, where it does.
    """

    def __init__(
        self, message: str, *, status: int | None = None, temporary: bool = False, retry_after: float | None = None
    ) -> None:
        self.status = status
        self.temporary = temporary
        self.retry_after = retry_after
        super().__init__(message)


class ClosedError(AlignerError):
    """The aligner was closed, before or while it was asked."""


class MissingExtraError(AlignerError, ImportError):
    """An optional part of the package is not installed; the message holds the command that installs it."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f"{what} needs packages that are not installed: pip install 'aligner-middleware[{extra}]'")


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """Ask, as the end of a message, whether the nearest of the known words was meant; empty where none is like it."""
    near = get_close_matches(str(word), list(known), 1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _again(kind: type[AlignerError], args: tuple[Any, ...], attributes: dict[str, Any]) -> AlignerError:
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(attributes)
    return error
