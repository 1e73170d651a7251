"""Greedy decoding of several sequences together, each with a draft of what it will say.

The draft goes through in the same pass as the prompt. Wherever the model would have written the draft's own next token,
that token is decoded already; at the first other one the rest of the draft is dropped and decoding goes on token by
token. The result is what greedy decoding without a draft gives, and a draft that is right costs one pass.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from aligner_middleware.engine.model import IntArray, KVCache, Model

FinishReason = Literal["stop", "length"]


@dataclass
class Generation:
    """One sequence on its way: what it was given, and what has come of it.

    Attributes:
        prompt: Token ids to go on from.
        draft: What it is expected to say; `[]` for plain decoding.
        max_new_tokens: Where it ends at the latest.
        tokens: What it says, without the end token.
        accepted: How many of them were taken from the draft.
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

    def take_draft(self, predicted: IntArray, stop: frozenset[int]) -> None:
        """Accept the draft as far as it is what the model says, then the model's own next token.

        Args:
            predicted: `[len(draft) + 1]`: the model's choice after the prompt and after each draft token.
            stop: Tokens that end a sequence.
        """
        draft = np.asarray(self.draft, dtype=np.int64)
        agrees = np.append(predicted[:-1] == draft, False)
        self.accepted = min(int(agrees.argmin()), self.max_new_tokens)
        self.tokens = list(self.draft[: self.accepted])
        if self.accepted == self.max_new_tokens:
            self.finish_reason = "length"
        else:
            self.push(int(predicted[self.accepted]), stop)

    def push(self, token: int, stop: frozenset[int]) -> None:
        """Add the model's choice, or end."""
        if token in stop:
            self.finish_reason = "stop"
            return
        self.tokens.append(token)
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

    def count_pass() -> None:
        for generation in active:
            generation.passes += 1
            generation.seconds = time.perf_counter() - start

    active = list(generations)
    capacity = max(len(g.prompt) + max(len(g.draft), g.max_new_tokens) for g in active)
    cache = model.new_cache(len(active), capacity)
    _verify_drafts(model, active, cache, stop)
    count_pass()
    yield
    while rows := [row for row, generation in enumerate(active) if generation.finish_reason is None]:
        if len(rows) < len(active):
            cache.select(rows)
            active = [active[row] for row in rows]
        latest = np.array([[generation.tokens[-1]] for generation in active], dtype=np.int64)  # [B, 1]
        predicted = model.forward(latest, np.ones(len(active), dtype=np.int64), cache, last=1)
        for generation, token in zip(active, predicted[:, 0], strict=True):
            generation.push(int(token), stop)
        count_pass()
        yield


def _verify_drafts(model: Model, generations: Sequence[Generation], cache: KVCache, stop: frozenset[int]) -> None:
    """Prefill prompts and drafts in one pass, and keep of the drafts what the model agrees with."""
    rows = [[*generation.prompt, *generation.draft] for generation in generations]
    counts = np.array([len(row) for row in rows], dtype=np.int64)
    tokens = np.zeros((len(rows), counts.max()), dtype=np.int64)  # [B, T]
    for padded, row in zip(tokens, rows, strict=True):
        padded[: len(row)] = row
    predicted = model.forward(tokens, counts, cache, last=1 + max(len(g.draft) for g in generations))
    for generation, choices in zip(generations, predicted, strict=True):
        generation.take_draft(choices[len(choices) - 1 - len(generation.draft) :], stop)
    cache.trim(np.array([len(g.prompt) + g.accepted for g in generations], dtype=np.int64))
