"""What decoding asks of a model: the seam between the loop and whatever runs the network."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]


class KVCache(Protocol):
    """Keys and values of the tokens that each sequence of a batch has seen."""

    @property
    def lengths(self) -> IntArray:
        """Tokens cached for each sequence, `[B]`."""

    def trim(self, lengths: IntArray) -> None:
        """Forget the latest tokens, so that `lengths[b]` of each sequence stay."""

    def select(self, rows: list[int]) -> None:
        """Keep these sequences of the batch, in this order."""


class Model(Protocol):
    """A decoder-only network that says which token it would write next."""

    max_positions: int
    """Longest sequence, in tokens."""

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """Make an empty cache for `batch` sequences of at most `capacity` tokens."""

    def forward(self, tokens: IntArray, counts: IntArray, cache: KVCache, last: int) -> IntArray:
        """Run one pass: append tokens to every sequence, and predict.

        Args:
            tokens: `[B, T]`, padded on the right with anything.
            counts: `[B]`: how many of a row's tokens are real, at least one.
            cache: What the sequences hold so far; afterwards it holds `counts` tokens more.
            last: For how many of a row's last real tokens the prediction is wanted.

        Returns:
            `[B, last]`: the most likely next token after each of a row's last `last` real tokens; column -1 belongs to
            the very last. Where a row has fewer real tokens, its first columns mean nothing.
        """


def last_positions(counts: IntArray, last: int) -> IntArray:
    """Columns of the last real tokens of each row, `[B, last]`, clipped to the row.

    >>> last_positions(np.array([4, 2]), 3)
    array([[1, 2, 3],
           [0, 0, 1]])
    """
    columns: IntArray = np.maximum(counts[:, None] - last + np.arange(last)[None, :], 0)
    return columns


class Slots:
    """Which places of a concatenating cache hold real tokens, for models that are told so by a mask.

    Every pass adds `T` places to every row, real or not; trimmed tokens leave holes, which the mask hides.

    Attributes:
        mask: `[B, S]`, 1 where a token is.
    """

    def __init__(self, batch: int) -> None:
        self.mask: IntArray = np.zeros((batch, 0), dtype=np.int64)

    @property
    def lengths(self) -> IntArray:
        """Tokens of each row, `[B]`."""
        lengths: IntArray = self.mask.sum(axis=1)
        return lengths

    def append(self, counts: IntArray, width: int) -> IntArray:
        """Add `width` places, of which `counts[b]` are real, and give the tokens' positions, `[B, width]`."""
        columns = np.arange(width)[None, :]
        positions: IntArray = self.lengths[:, None] + columns
        self.mask = np.concatenate([self.mask, (columns < counts[:, None]).astype(np.int64)], axis=1)
        return positions

    def trim(self, lengths: IntArray) -> int:
        """Forget each row's latest tokens, and give the number of places that are still in use."""
        self.mask *= self.mask.cumsum(axis=1) <= lengths[:, None]
        used = np.flatnonzero(self.mask.any(axis=0))
        width = int(used[-1]) + 1 if len(used) else 0
        self.mask = self.mask[:, :width]
        return width
