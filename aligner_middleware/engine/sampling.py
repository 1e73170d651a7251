"""Chooses tokens from logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from aligner_middleware.engine.model import Logits


@dataclass(frozen=True)
class Sampler:
    """Chooses tokens at random, as the paper's authors do (temperature 0.3, top-p 0.95), or the most likely ones.

    A draft proposes one token, without a distribution, so speculative sampling is simple: a token is drawn from the model's
    own distribution, and the proposal is accepted if it is that token. Tokens have the same distribution as without a draft.

    Attributes:
        temperature: Divides the logits; 0 takes the most likely token.
        top_p: Only the most likely tokens that together have this probability are drawn from.
        seed: Of the draws; `None` for a random one.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    _random: np.random.Generator = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_random", np.random.default_rng(self.seed))

    def choose(self, logits: Logits, proposal: Sequence[int]) -> list[int]:
        """Choose the token at each position, up to the first that differs from the proposal.

        Args:
            logits: `[T, V]`.
            proposal: The proposed token of each position; at least `T - 1` tokens.
        """
        if self.temperature == 0:
            return [int(token) for token in logits.argmax(axis=-1)]
        chosen: list[int] = []
        for at, row in enumerate(logits):
            chosen.append(self._draw(row))
            if at < len(proposal) and chosen[-1] != proposal[at]:
                break
        return chosen

    def _draw(self, logits: Logits) -> int:
        scaled = logits.astype(np.float64) / self.temperature
        weights = np.exp(scaled - scaled.max())
        if self.top_p < 1:
            order = np.argsort(-weights, kind="stable")
            before = np.cumsum(weights[order]) - weights[order]
            weights[order[before >= self.top_p * weights.sum()]] = 0.0
        return int(self._random.choice(len(weights), p=weights / weights.sum()))


GREEDY = Sampler()
