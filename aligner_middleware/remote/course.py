"""The course of one generation on a server: its verdict, then its tokens, verified against the draft or streamed.

Verifying: one request gives the log probabilities of the draft's tokens after the prompt; those that the model would write
are kept, up to the first other one. From there it is streamed, until it has come back to the draft for long enough. Where a
server or a stream fails, it goes on from the tokens that are there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_before_delay, wait_random_exponential

from aligner_middleware.closing import aclosing
from aligner_middleware.engine import Generation
from aligner_middleware.errors import RemoteError
from aligner_middleware.remote.client import Client
from aligner_middleware.remote.detection import Served, at
from aligner_middleware.remote.dialect import Logs, Piece, Written, some_of
from aligner_middleware.remote.servers import Server, Servers

logger = logging.getLogger(__name__)

_TOP = 20  # log probabilities at each streamed position, where draft tokens may stay; vLLM's default allows no more
_WORTH = 16  # tokens of the draft that must be left for its verification to pay
_POOR = 8  # accepted tokens below which a verification did not pay
_LAST_WORDS = 1.0  # seconds after which a request with status 500 is repeated, once
_backoff = wait_random_exponential(multiplier=0.1, max=5)


class _UnsureError(Exception):
    """The stream does not tell whether a token of the draft may stay."""


class Course:
    """Brings a generation to its end.

    Args:
        generation: It is filled in place.
        client: Makes the requests.
        servers: Where they go.
        stop: Tokens that end a sequence.
        max_positions: Longest sequence, in tokens.
        on_step: Called after each step that brought it on.
        patience: Seconds for which a request is repeated that fails in passing.
    """

    def __init__(
        self,
        generation: Generation,
        client: Client,
        servers: Servers,
        *,
        stop: frozenset[int],
        max_positions: int,
        on_step: Callable[[], None],
        patience: float,
    ) -> None:
        self._generation = generation
        self._client = client
        self._servers = servers
        self._stop = stop
        self._max_positions = max_positions
        self._on_step = on_step
        self._patience = patience
        self._unsure = False
        self._failed = False  # with status 500, in the latest request
        self._wait = 0  # tokens to stream before the draft is verified again
        self._verified = 0  # tokens that there were after the last verification

    async def run(self) -> None:
        """Run it; cancelling this ends its request.

        Raises:
            RemoteError: If it fails for good, or for longer than `patience`.
        """
        server: Server | None = None
        try:
            while not self._generation.done:
                async for attempt in AsyncRetrying(
                    retry=retry_if_exception(lambda exc: isinstance(exc, RemoteError) and exc.temporary),
                    stop=stop_before_delay(self._patience),
                    wait=_pause,
                    reraise=True,
                ):
                    with attempt:
                        if server is None or server.down:
                            server = self._move(server)
                        await self._advance(server)
        finally:
            if server is not None:
                server.running -= 1

    def _move(self, server: Server | None) -> Server:
        """Choose a server, and leave the former one."""
        chosen = self._servers.choose(self._generation.prompt)
        chosen.running += 1
        if server is not None:
            server.running -= 1
        return chosen

    async def _advance(self, server: Server) -> None:
        """Make one request."""
        try:
            async with server.place() as served:
                await self._ask(server, served)
        except RemoteError as exc:
            if exc.status == 500 and not self._failed:  # so does a server fail that is about to end
                self._failed, exc.temporary, exc.retry_after = True, True, _LAST_WORDS
            if exc.temporary and exc.status != 429 and self._servers.failed(server):
                exc.retry_after = 0.0  # others are there
            raise
        self._failed = False
        self._on_step()

    async def _ask(self, server: Server, served: Served) -> None:
        """Make the next request, again without what the server refuses and can be done without."""
        while True:
            without = served.dialect.without
            try:
                if self._generation.undecided:
                    await self._decide(server, served)
                elif self._verifies():
                    await self._verify(server, served)
                else:
                    await self._write(server, served)
                return
            except RemoteError as exc:
                served.dialect.adapt(exc)
                if served.dialect.without == without:  # nor has another request found a field to leave out
                    raise

    @property
    def _context(self) -> list[int]:
        """All tokens so far."""
        generation = self._generation
        verdict = [] if generation.verdict is None else [generation.verdict]
        return [*generation.prompt, *verdict, *generation.tokens]

    async def _decide(self, server: Server, served: Served) -> None:
        rule = self._generation.rule
        assert rule is not None
        verdicts = [rule.keep, rule.edit, rule.rewrite]
        (logs,) = await self._look(server, served, self._context, 0, verdicts)
        self._generation.decide(some_of(logs, verdicts))

    def _verifies(self) -> bool:
        """Whether the rest of the draft is to be verified next."""
        generation = self._generation
        if generation.sampler.temperature > 0:
            return False
        if self._unsure:
            return True
        left = len(generation.rest)
        waited = len(generation.tokens) - self._verified >= self._wait
        return left > 0 and (not generation.tokens or (left >= _WORTH and waited))

    async def _verify(self, server: Server, served: Served) -> None:
        generation = self._generation
        context = self._context
        rest = generation.rest[: max(0, self._max_positions - 1 - len(context))]
        expected = generation.expected(len(rest))
        positions = await self._look(
            server, served, [*context, *rest], len(rest), [] if expected is None else [expected]
        )
        generation.proposal = rest
        best = [_best(logs) for logs in positions]
        chosen = generation.tolerate(best, lambda at, best, other: self._gap(positions[at], best, other, exact=True))
        before = generation.accepted
        generation.accept(chosen, self._stop)
        poor = generation.accepted - before < min(_POOR, len(rest))
        self._wait = max(_POOR, 2 * self._wait) if poor else 0
        self._verified, self._unsure = len(generation.tokens), False

    async def _look(
        self, server: Server, served: Served, ids: Sequence[int], count: int, tokens: Sequence[int]
    ) -> list[Logs]:
        path, body = served.dialect.verify(ids, count, tokens)
        return served.dialect.verified(await self._client.post(at(server.url, path), body), ids, count)

    async def _write(self, server: Server, served: Served) -> None:
        """Stream tokens, until the generation ends, a token of the draft takes the place of one, or the draft is found again.

        Raises:
            RemoteError: If the stream fails before the first token; later it only ends, where it can be taken up.
        """
        generation, so_far = self._generation, Written(self._context)
        most = generation.max_new_tokens - len(generation.tokens)
        top = _TOP if generation.tolerant else 0
        path, body = served.dialect.write(so_far.context, most, self._stop, generation.sampler, top)
        generation.proposal = []
        try:
            async with aclosing(self._client.stream(at(server.url, path), body)) as events:
                async for event in events:
                    piece = served.dialect.written(event, so_far)
                    begins = so_far.tokens == len(piece.tokens) > 0
                    generation.passes += begins or (piece.finish is not None and not so_far.tokens)
                    if not self._take(piece) or generation.done or (not self._unsure and self._verifies()):
                        return
                    self._on_step()
            raise RemoteError(f"{server.url} broke off a stream", temporary=True)
        except RemoteError as exc:
            if not served.dialect.by_tokens:
                generation.begin_again()
                raise
            if not exc.temporary or not so_far.tokens:
                raise
            logger.debug("a stream is taken up again after %d tokens: %s", so_far.tokens, exc)
            self._servers.failed(server)

    def _take(self, piece: Piece) -> bool:
        """Take a piece of a stream; tell whether the stream goes on as it should."""
        generation = self._generation
        for number, token in enumerate(piece.tokens):
            chosen = token
            if generation.tolerant:
                logs = piece.logs[number] if number < len(piece.logs) else {token: 0.0}
                try:
                    (chosen,) = generation.tolerate([token], lambda _, best, other: self._gap(logs, best, other))  # noqa: B023
                except _UnsureError:
                    self._unsure = True
                    return False
            generation.accept([chosen], self._stop, passes=0)
            if chosen != token and not generation.done:
                self._unsure = True  # a stream does not go on from another token, and the draft most likely does
                return False
            if generation.done:
                return True
        if piece.finish == "stop" and not generation.done:  # some servers leave the end token out
            generation.accept([min(self._stop)], self._stop, passes=0)
        elif piece.finish == "length" and not generation.done:
            generation.finish_reason = "length"
        return True

    def _gap(self, logs: Logs, best: int, other: int, *, exact: bool = False) -> float:
        """Give how far the log probability of `best` is above that of `other`, in nats.

        Args:
            logs: Log probabilities of some tokens, the best ones among them.
            best: The best token.
            other: Another one.
            exact: Whether that of a token which is not among them cannot be had: it is beyond every tolerance then.

        Raises:
            _UnsureError: If it is not among them, and may be within the tolerance.
        """
        if other in logs:
            return logs[best] - logs[other]
        least = logs[best] - min(logs.values())
        tolerance = self._generation.tolerance
        if least > tolerance:
            return least
        if not exact:
            raise _UnsureError
        return tolerance + 1.0


def _best(logs: Logs) -> int:
    return max(logs, key=logs.__getitem__)


def _pause(state: RetryCallState) -> float:
    """Wait as long as the server says, or ever longer."""
    error = state.outcome.exception() if state.outcome else None
    asked = error.retry_after if isinstance(error, RemoteError) else None
    return _backoff(state) if asked is None else asked
