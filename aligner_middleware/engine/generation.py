"""One sequence: a verdict where the model gives one, then the tokens of a correction, verified against a draft."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from aligner_middleware.engine.draft import DraftReader
from aligner_middleware.engine.model import Logits
from aligner_middleware.engine.sampling import GREEDY, Sampler

FinishReason = Literal["stop", "length", "loop"]

_LOOP_TOKENS, _LOOP_TURNS, _LONGEST_TURN = 32, 4, 128  # of a loop: least tokens, least equal turns, longest turn


class Prefill:
    """A prompt that is still being written; its known part is prefilled.

    Attributes:
        prompt: Its tokens so far. May be replaced at any time, by any thread.
        cached_tokens: Those that the KV cache holds.
        abandoned: Whether no generation will follow it.
    """

    def __init__(self, prompt: Sequence[int] = ()) -> None:
        self.prompt = prompt
        self.cached_tokens: list[int] = []
        self.abandoned = False

    def common(self, prompt: Sequence[int]) -> int:
        """Count the tokens in the cache that a prompt begins with."""
        pairs = zip(self.cached_tokens, prompt, strict=False)
        return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(self.cached_tokens), len(prompt)))


@dataclass(frozen=True)
class VerdictRule:
    """Reads the verdict from the logits after the prompt.

    Attributes:
        keep, edit, rewrite: The tokens of the three verdicts.
        threshold: Log odds of not keeping, in nats, above which an answer is corrected.
        copies: Whether an edit is written as a copy, with the answer as its draft.
    """

    keep: int
    edit: int
    rewrite: int
    threshold: float = 0.0
    copies: bool = False

    def log_odds(self, logits: Logits | Mapping[int, float]) -> float:
        """Give ln (P(edit) + P(rewrite)) / P(keep), of logits `[V]`, or of the logits or log probabilities of the three."""
        return float(np.logaddexp(logits[self.edit], logits[self.rewrite]) - logits[self.keep])

    def choose(self, logits: Logits | Mapping[int, float]) -> int:
        """Give the token of the verdict, of what `log_odds` takes."""
        if self.log_odds(logits) <= self.threshold:
            return self.keep
        return self.edit if logits[self.edit] >= logits[self.rewrite] else self.rewrite


@dataclass(eq=False)
class Generation:
    """A sequence: its input, its settings, and its results so far.

    Attributes:
        prompt: Token ids to continue, at least one.
        draft: The tokens that it is expected to write; `[]` for plain decoding. None of them ends a sequence.
        max_new_tokens: Most tokens that it may write.
        sampler: Chooses the tokens; greedily by default.
        prefill: The part of the prompt that has been prefilled already.
        rule: Reads a verdict before anything is written; `None` for a model that gives none.
        tolerance: A draft's next token stays where its log probability is within so many nats of the best one's.
        verify: Whether a pass verifies many tokens of the draft; the result is the same without.
        end: The token that is expected after the draft's last one.
        stop_loops: Whether it ends as soon as it repeats itself where the draft does not.
        verdict_only: Whether it ends with its verdict, whatever that is, and gives the row back to its `prefill`.
        tokens: The tokens written, without verdict and end token. Other threads may read them: the list only grows.
        verdict: The token of its verdict.
        log_odds: Of that verdict; see `VerdictRule`.
        surprise: The largest gap, in nats, between the log probabilities of the best token and of the draft's. Measured
            only with a tolerance.
        accepted: How many of its tokens are accepted draft tokens.
        passes: Forward passes that it took part in.
        seconds: Time from its creation to its end.
        finish_reason: `stop` after an end token or the verdict to keep, `length` at `max_new_tokens`, `loop` when it
            repeats itself; `None` while it runs.
        error: The error that ended it, if any.
    """

    prompt: Sequence[int]
    draft: Sequence[int] = ()
    max_new_tokens: int = 256
    sampler: Sampler = GREEDY
    prefill: Prefill | None = None
    rule: VerdictRule | None = None
    tolerance: float = 0.0
    verify: bool = True
    end: int | None = None
    stop_loops: bool = False
    verdict_only: bool = False
    tokens: list[int] = field(default_factory=list)
    verdict: int | None = None
    log_odds: float | None = None
    surprise: float = 0.0
    accepted: int = 0
    passes: int = 0
    seconds: float = 0.0
    finish_reason: FinishReason | None = None
    error: Exception | None = None

    def __post_init__(self) -> None:
        self._made = time.perf_counter()
        self._reader = DraftReader(self.draft)
        self._latest = self.prompt[-1]
        self.proposal: list[int] = []

    @property
    def longest(self) -> int:
        """Most tokens that its row in the cache may have to hold."""
        return len(self.prompt) + max(self.max_new_tokens, min(len(self.draft), self.max_new_tokens)) + 1

    @property
    def started(self) -> bool:
        """Whether its prompt has been prefilled."""
        return self.passes > 0

    @property
    def undecided(self) -> bool:
        """Whether the next pass gives its verdict."""
        return self.rule is not None and self.verdict is None

    @property
    def latest(self) -> int:
        """The token that the cache does not hold yet, once it has started."""
        return self._latest

    @property
    def done(self) -> bool:
        """Whether nothing more will come."""
        return self.finish_reason is not None or self.error is not None

    @property
    def cached(self) -> int:
        """How many tokens the cache should hold of it: all but the latest, which is the next pass's input."""
        return len(self.prompt) + (self.verdict is not None) + len(self.tokens) - 1

    def decide(self, logits: Logits | Mapping[int, float]) -> None:
        """Take its verdict from the logits `[V]` after its prompt, or from those of the three verdicts."""
        assert self.rule is not None
        self.passes += 1
        self.log_odds = self.rule.log_odds(logits)
        self.verdict = self._latest = self.rule.choose(logits)
        if self.verdict == self.rule.keep or self.verdict_only:
            self.finish_reason = "stop"
        elif self.verdict == self.rule.rewrite or not self.rule.copies:
            self._reader = DraftReader(())
        self.seconds = time.perf_counter() - self._made

    def propose(self) -> list[int]:
        """Take a proposal of the next tokens from the draft, and keep it in `proposal`."""
        room = self.max_new_tokens - len(self.tokens)
        self.proposal = self._reader.propose()[:room] if self.verify else []
        return self.proposal

    @property
    def rest(self) -> list[int]:
        """The rest of the draft; `[]` where its place there is not certain, or drafts are not verified."""
        return self._reader.rest()[: self.max_new_tokens - len(self.tokens)] if self.verify else []

    @property
    def tolerant(self) -> bool:
        """Whether a token of the draft may stay although it is not the best one."""
        return self.tolerance > 0 and self.sampler.temperature == 0 and self._reader.follows

    def expected(self, after: int = 0) -> int | None:
        """Give the draft's token after so many tokens of its rest, or the end token; `None` where none is certain."""
        return self._reader.expected(after, self.end)

    def choose(self, logits: Logits, done: int = 0) -> list[int]:
        """Choose the next tokens, up to the first that differs from the proposal.

        Args:
            logits: `[T, V]`.
            done: How many tokens of the proposal come before these logits.
        """
        chosen = self.sampler.choose(logits, self.proposal[done:])
        return self.tolerate(chosen, lambda at, best, other: float(logits[at, best] - logits[at, other]), done)

    def tolerate(self, chosen: list[int], gap: Callable[[int, int, int], float], done: int = 0) -> list[int]:
        """Replace the best tokens by those of the draft that are within the tolerance.

        Args:
            chosen: The best token at each position; it is changed.
            gap: Gives how far the log probability of one token is above that of another at a position, in nats.
            done: How many tokens of the proposal come before these.

        Returns:
            The tokens, up to the first that differs from the proposal.
        """
        if self.tolerance <= 0 or self.sampler.temperature > 0:
            return chosen
        proposal = self.proposal[done:]
        room = self.max_new_tokens - len(self.tokens) - done
        for at, best in enumerate(chosen[:room]):
            expected = self._reader.expected(done + at, self.end)
            if expected is not None and best != expected:
                behind = gap(at, best, expected)
                if 0 <= behind <= self.tolerance:
                    chosen[at] = expected
                self.surprise = max(self.surprise, behind)
            if at < len(proposal) and chosen[at] != proposal[at]:
                return chosen[: at + 1]
        return chosen

    def accept(self, predicted: Sequence[int], stop: frozenset[int], passes: int = 1) -> None:
        """Accept the proposal as far as it equals the chosen tokens, then take the next chosen token.

        Args:
            predicted: The token chosen at each position of the proposal and after it, at least up to the first that
                differs from the proposal.
            stop: Tokens that end a sequence.
            passes: Forward passes that this took.
        """
        right = 0
        while right < len(self.proposal) and predicted[right] == self.proposal[right]:
            right += 1
        before = len(self.tokens)
        tokens = [*self.tokens, *self.proposal[:right]]
        self.accepted += right
        self.passes += passes
        self._reader.learn(len(self.proposal), right)
        if len(tokens) < self.max_new_tokens:
            token = int(predicted[right])
            if token in stop:
                self.finish_reason = "stop"
            else:
                tokens.append(token)
        # A beginning that equals the draft's is not a loop.
        looped = self._first_loop(tokens, before or right) if self.stop_loops else None
        if looped is not None:
            del tokens[looped:]
            self.accepted -= max(0, before + right - looped)
            self.finish_reason = "loop"
        self.tokens = tokens  # assigned at once: a stream in another thread may read them at any time
        self._reader.advance(tokens[before:])
        self._latest = tokens[-1] if tokens else self._latest
        if self.finish_reason is None and len(self.tokens) == self.max_new_tokens:
            self.finish_reason = "length"
        self.seconds = time.perf_counter() - self._made

    def begin_again(self) -> None:
        """Drop the tokens of a correction that cannot go on, and was not shown. Its verdict stays; it has no draft then."""
        self.tokens, self.accepted, self._reader = [], 0, DraftReader(())

    def _first_loop(self, tokens: Sequence[int], before: int) -> int | None:
        """Give the least number of tokens, more than `before`, after which they loop; `None` if they do not."""
        ends = range(before + 1, len(tokens) + 1)
        return next((end for end in ends if loops(tokens[:end], self.draft)), None)


def loops(tokens: Sequence[int], draft: Sequence[int]) -> bool:
    """Say whether the latest tokens repeat one run again and again, and the draft has no such repetition."""
    for turn in range(1, min(_LONGEST_TURN, len(tokens) // _LOOP_TURNS) + 1):
        if tokens[-1] != tokens[-1 - turn]:
            continue
        length = turn * max(_LOOP_TURNS, -(-_LOOP_TOKENS // turn))
        if length > len(tokens):
            continue
        run = tokens[-length:]
        if run[turn:] == run[:-turn]:
            return not _holds(draft, run)
    return False


def _holds(tokens: Sequence[int], run: Sequence[int]) -> bool:
    first, run = run[0], list(run)
    places = (at for at, token in enumerate(tokens) if token == first)
    return any(list(tokens[at : at + len(run)]) == run for at in places)
