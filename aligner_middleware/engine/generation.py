"""One sequence on its way, with a draft of what it will say."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from aligner_middleware.engine.draft import DraftReader
from aligner_middleware.engine.sampling import GREEDY, Sampler

FinishReason = Literal["stop", "length"]


class Prefill:
    """A prompt that is still being written: what is known of it already goes through.

    Attributes:
        prompt: Its tokens so far. May be replaced at any time, by any thread.
        fed: Those that the cache holds.
    """

    def __init__(self, prompt: Sequence[int] = ()) -> None:
        self.prompt = prompt
        self.fed: list[int] = []

    def common(self, prompt: Sequence[int]) -> int:
        """How many of the tokens in the cache a prompt begins with."""
        pairs = zip(self.fed, prompt, strict=False)
        return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(self.fed), len(prompt)))


@dataclass(eq=False)
class Generation:
    """A sequence: what it was given, and what has come of it.

    Attributes:
        prompt: Token ids to go on from, at least one.
        draft: What it is expected to say; `[]` for plain decoding. It holds no token that ends a sequence.
        max_new_tokens: Where it ends at the latest.
        sampler: How tokens are chosen; greedily by default.
        prefill: What has gone through of the prompt already.
        tokens: What it says, without the end token.
        accepted: How many of them were proposed by the draft.
        passes: Forward passes that it took part in.
        seconds: Time from when it was made to its end.
        finish_reason: `stop` after an end token, `length` at `max_new_tokens`, `None` while it runs.
        error: What made it fail.
    """

    prompt: Sequence[int]
    draft: Sequence[int] = ()
    max_new_tokens: int = 256
    sampler: Sampler = GREEDY
    prefill: Prefill | None = None
    tokens: list[int] = field(default_factory=list)
    accepted: int = 0
    passes: int = 0
    seconds: float = 0.0
    finish_reason: FinishReason | None = None
    error: Exception | None = None

    def __post_init__(self) -> None:
        self._made = time.perf_counter()
        self._reader = DraftReader(self.draft)
        self.proposal: list[int] = []

    @property
    def longest(self) -> int:
        """Most tokens that it can come to hold in the cache."""
        return len(self.prompt) + max(self.max_new_tokens, min(len(self.draft), self.max_new_tokens))

    @property
    def started(self) -> bool:
        """Whether its prompt has gone through."""
        return self.passes > 0

    @property
    def done(self) -> bool:
        """Whether nothing more will come."""
        return self.finish_reason is not None or self.error is not None

    @property
    def cached(self) -> int:
        """How many tokens the cache should hold of it: all but the latest, which is the next pass's input."""
        return len(self.prompt) + len(self.tokens) - 1

    def propose(self) -> list[int]:
        """Look in the draft for what may come next, and remember it as `proposal`."""
        room = self.max_new_tokens - len(self.tokens)
        self.proposal = self._reader.propose(self.tokens)[:room]
        return self.proposal

    def take(self, predicted: Sequence[int], stop: frozenset[int]) -> None:
        """Accept the proposal as far as it is what was chosen, then the next token chosen.

        Args:
            predicted: The choice before and after each token of the proposal, at least up to the first that is not the
                proposal's.
            stop: Tokens that end a sequence.
        """
        right = 0
        while right < len(self.proposal) and predicted[right] == self.proposal[right]:
            right += 1
        self.tokens += self.proposal[:right]
        self.accepted += right
        self.passes += 1
        self._reader.learn(len(self.proposal), right)
        if len(self.tokens) < self.max_new_tokens:
            token = int(predicted[right])
            if token in stop:
                self.finish_reason = "stop"
            else:
                self.tokens.append(token)
        if self.finish_reason is None and len(self.tokens) == self.max_new_tokens:
            self.finish_reason = "length"
        self.seconds = time.perf_counter() - self._made
