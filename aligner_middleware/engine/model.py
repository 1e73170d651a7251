"""What decoding asks of a model: the seam between the loop and whatever runs the network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
Logits = NDArray[np.float32]


class KVCache(Protocol):
    """Keys and values of several sequences, a row for each, and the passes that append to them."""

    capacity: int
    """Tokens that fit into a row."""

    def extend(self, row: int, tokens: Sequence[int], wanted: int) -> Iterator[Logits]:
        """Append tokens to one row; many go through in pieces, one after the other as the result is iterated.

        Args:
            row: The row.
            tokens: At least one.
            wanted: For how many of them, from the last one back, the prediction is wanted; at least 1.

        Yields:
            `[some, V]`: logits of the token after each of them, `wanted` rows in all. To be read before the next pass.
        """

    def step(self, tokens: Mapping[int, int]) -> Logits:
        """Append one token to each of several rows, in one pass.

        Args:
            tokens: The token of each row.

        Returns:
            `[len(tokens), V]`: logits of the next one, in the order of `tokens`. To be read before the next pass.
        """

    def begin(self, prompts: Mapping[int, Sequence[int]]) -> Logits:
        """Fill several empty rows, in one pass where that pays.

        Args:
            prompts: The tokens of each row.

        Returns:
            `[len(prompts), V]`: logits of the next token of each. To be read before the next pass.
        """

    def trim(self, row: int, length: int) -> None:
        """Forget a row's latest tokens, so that `length` stay."""

    def stop(self) -> None:
        """Make the pass that is under way raise as soon as may be, and all later ones at once. From any thread."""


class Model(Protocol):
    """A decoder-only network that says how likely each token is to come next."""

    max_positions: int
    """Longest sequence, in tokens."""

    device: str
    """What passes run on, in words."""

    @property
    def bytes_per_token(self) -> int:
        """Memory that a token's keys and values take."""

    def new_cache(self, rows: int, capacity: int) -> KVCache:
        """Make empty rows of `capacity` tokens each."""


def log_probabilities(logits: Logits, targets: IntArray) -> Logits:
    """Natural logarithms of the probabilities, `[T]`, of tokens `[T]`, by the logits that predict them, `[T, V]`."""
    peak = logits.max(axis=-1)
    total = peak + np.log(np.exp(logits - peak[:, None]).sum(axis=-1))
    result: Logits = logits[np.arange(len(targets)), targets] - total
    return result
