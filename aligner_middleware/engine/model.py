"""The interface between decoding and the code that runs the network, in ONNX Runtime or PyTorch."""

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
        """Append tokens to one row. Many tokens take several passes, each made when the result is iterated.

        Args:
            row: The row.
            tokens: At least one.
            wanted: How many of the last of them to predict after; at least 1.

        Yields:
            `[some, V]`: logits of the token after each of these, `wanted` rows in all. To be read before the next pass.
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
        """Remove a row's latest tokens, so that `length` stay."""

    def stop(self) -> None:
        """Make the current pass raise as soon as possible, and all later ones at once. For any thread."""


class Model(Protocol):
    """A decoder-only network, which predicts the next token."""

    max_positions: int
    """Longest sequence, in tokens."""

    device: str
    """The device that passes run on, in words."""

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
