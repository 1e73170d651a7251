"""The interface between a generation and a server's API: how the next tokens are asked for, and how the reply is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

from aligner_middleware.engine import Sampler
from aligner_middleware.errors import RemoteError

Logs = dict[int, float]
"""Log probabilities of some tokens at one position, in nats; the best token's is among them."""

UNLIKELY = -9999.0  # nats; servers give this, or nothing, for a log probability that JSON cannot hold


@dataclass(frozen=True)
class Piece:
    """A part of a stream.

    Attributes:
        tokens: The tokens that were written, perhaps with the end token.
        logs: For each of them the log probabilities at its position, where they were asked for.
        finish: Why the stream ended: `stop` after an end token, `length` at the most tokens; `None` while it goes on.
    """

    tokens: Sequence[int]
    logs: Sequence[Logs] = ()
    finish: Literal["stop", "length"] | None = None


@dataclass
class Written:
    """The state of a stream's reader.

    Attributes:
        context: All tokens before the stream.
        tokens: How many have been read.
        held: Where a server sends text: half a character, whose other half is still to come.
        latest: Where a server sends text: the end of what has been read.
    """

    context: Sequence[int] = ()
    tokens: int = 0
    held: str = ""
    latest: str = ""


class Dialect(Protocol):
    """The API of one kind of server. Content is JSON.

    Attributes:
        by_tokens: Whether it goes on from given tokens. Only such a server can read a prompt ahead, give log probabilities
            of given tokens, and take up a stream that broke off.
        without: Fields that requests leave out, because the server refuses them.
    """

    by_tokens: ClassVar[bool] = True
    without: frozenset[str] = frozenset()

    def verify(self, ids: Sequence[int], count: int, tokens: Sequence[int]) -> tuple[str, dict[str, Any]]:
        """Ask for the log probabilities of given tokens, and of the next one.

        Args:
            ids: Token ids, at least one.
            count: How many of the last of them are looked at; 0 needs no prompt log probabilities.
            tokens: Tokens whose log probabilities after all of `ids` are needed.

        Returns:
            The path of the request, and its body.
        """

    def verified(self, content: Any, ids: Sequence[int], count: int) -> list[Logs]:
        """Read the reply: the log probabilities at each of the `count` tokens, and after the last, `count + 1` in all."""

    def write(
        self, ids: Sequence[int], most: int, stop: Iterable[int], sampler: Sampler, top: int
    ) -> tuple[str, dict[str, Any]]:
        """Ask for a stream of the next tokens.

        Args:
            ids: Token ids, at least one.
            most: Most tokens to write.
            stop: Tokens that end it.
            sampler: How tokens are chosen.
            top: Log probabilities that are needed of each position's best tokens.

        Returns:
            The path of the request, and its body.
        """

    def written(self, content: Any, so_far: Written) -> Piece:
        """Read one event of the stream; the state is brought up to it."""

    def adapt(self, error: RemoteError) -> None:
        """Leave out from now on what the server has refused by this error, where requests can do without."""
        return  # by default they need all that they hold


def unusable(reason: str) -> RemoteError:
    """Make the error of a reply that lacks what is needed."""
    return RemoteError(f"the server's reply cannot be used: {reason}")


def finish_of(reason: object) -> Literal["stop", "length"] | None:
    """Read why a stream ended.

    Raises:
        RemoteError: If the server gave it up; it may be asked again, unless a filter took offence at the text.
    """
    if reason in (None, ""):
        return None
    if reason == "stop" or reason == "length":
        return reason
    message = f"the server gave up a generation (finish reason {str(reason)[:100]!r})"
    raise RemoteError(message, temporary=reason != "content_filter")


def some_of(logs: Mapping[int, float], tokens: Sequence[int]) -> Logs:
    """Give the log probabilities of tokens; of one that is not among them the least that is, which its own is not above.

    Raises:
        RemoteError: If it has none of them.
    """
    if not any(token in logs for token in tokens):
        raise unusable(
            f"it has no log probabilities of the verdicts, tokens {list(tokens)}; it must take `logprobs`, and best "
            "`logprob_token_ids` (as vLLM 0.32 does), and serve this aligner's own model"
        )
    least = min(logs.values())
    return {token: logs.get(token, least) for token in tokens}
