"""Greedy decoding of several sequences together, each with a draft of what it will say.

The draft goes through in the same pass as the prompt. Wherever the model would have written the draft's own next token,
that token is decoded already; at the first other one the rest of the proposal is dropped. Then the draft is found again
(`draft.py`) as soon as it can be, and so on. The result is what greedy decoding without a draft gives, and a draft that is
right costs one pass.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from aligner_middleware.engine.draft import DraftReader
from aligner_middleware.engine.model import IntArray, Model

FinishReason = Literal["stop", "length"]


@dataclass
class Generation:
    """One sequence on its way: what it was given, and what has come of it.

    Attributes:
        prompt: Token ids to go on from.
        draft: What it is expected to say; `[]` for plain decoding. It holds no token that ends a sequence.
        max_new_tokens: Where it ends at the latest.
        tokens: What it says, without the end token.
        accepted: How many of them were proposed by the draft.
        passes: Forward passes that it took part in.
        seconds: Time from its first pass to its last.
        finish_reason: `stop` after an end token, `length` at `max_new_tokens`, `None` while it runs.
    """

    prompt: Sequence[int]
    draft: Sequence[int] = ()
    max_new_tokens: int = 256
    tokens: list[int] = field(default_factory=list)
    accepted: int = 0
    passes: int = 0
    seconds: float = 0.0
    finish_reason: FinishReason | None = None

    def __post_init__(self) -> None:
        self._reader = DraftReader(self.draft)
        self._proposal: list[int] = []

    def next_input(self) -> list[int]:
        """Give the tokens of the next pass: what the cache does not hold yet, and what may come after it."""
        room = self.max_new_tokens - len(self.tokens)
        self._proposal = self._reader.propose(self.tokens)[:room]
        return [*(self.tokens[-1:] or self.prompt), *self._proposal]

    @property
    def wanted(self) -> int:
        """For how many tokens of that input, from its end on, a prediction is wanted."""
        return 1 + len(self._proposal)

    @property
    def cached(self) -> int:
        """How many tokens of the sequence a pass has seen; the rest of what went in is to be forgotten."""
        return len(self.prompt) + len(self.tokens) - 1

    def take(self, predicted: IntArray, stop: frozenset[int]) -> None:
        """Accept the proposal as far as it is what the model says, then the model's own next token.

        Args:
            predicted: `[wanted]`: the model's choice before and after each token of the proposal.
            stop: Tokens that end a sequence.
        """
        agrees = np.append(predicted[:-1] == np.asarray(self._proposal, dtype=np.int64), False)
        right = int(agrees.argmin())
        self.tokens += self._proposal[:right]
        self.accepted += right
        self._reader.learn(len(self._proposal), right)
        if len(self.tokens) == self.max_new_tokens:
            self.finish_reason = "length"
        elif int(predicted[right]) in stop:
            self.finish_reason = "stop"
        else:
            self.tokens.append(int(predicted[right]))
            if len(self.tokens) == self.max_new_tokens:
                self.finish_reason = "length"


def decode(model: Model, generations: Sequence[Generation], stop: frozenset[int]) -> Iterator[None]:
    """Run sequences to their ends, together.

    Args:
        model: What predicts.
        generations: The sequences; they are filled in place.
        stop: Tokens that end a sequence.

    Yields:
        Once after every pass.
    """
    start = time.perf_counter()
    active = list(generations)
    capacity = max(len(g.prompt) + max(len(g.draft), g.max_new_tokens) for g in active)
    cache = model.new_cache(len(active), capacity)
    while active:
        inputs = [generation.next_input() for generation in active]
        counts = np.array([len(tokens) for tokens in inputs], dtype=np.int64)
        padded = np.zeros((len(inputs), counts.max()), dtype=np.int64)  # [B, T]
        for row, tokens in zip(padded, inputs, strict=True):
            row[: len(tokens)] = tokens
        last = max(generation.wanted for generation in active)
        predicted = model.forward(padded, counts, cache, last)
        for generation, choices in zip(active, predicted, strict=True):
            generation.take(choices[last - generation.wanted :], stop)
            generation.passes += 1
            generation.seconds = time.perf_counter() - start
        yield
        rows = [row for row, generation in enumerate(active) if generation.finish_reason is None]
        if last > 1 and rows:
            cache.trim(np.array([generation.cached for generation in active], dtype=np.int64))
        if len(rows) < len(active):
            active = [active[row] for row in rows]
            if active:
                cache.select(rows)
