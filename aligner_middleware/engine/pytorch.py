"""The same decoder in PyTorch, the reference for checks and measurements of exported graphs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import DynamicCache

from aligner_middleware.engine.model import KVCache, Logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TorchModel:
    """A causal language model of transformers, behind the interface of `Model`.

    Attributes:
        network: As given.
    """

    def __init__(self, network: PreTrainedModel) -> None:
        config = network.config.get_text_config()
        self.max_positions = int(config.max_position_embeddings)
        self.device = f"PyTorch, {network.device}"
        self.bytes_per_token = 2 * int(config.num_hidden_layers) * int(config.hidden_size) * network.dtype.itemsize
        self.network = network

    def new_cache(self, rows: int, capacity: int) -> KVCache:
        """Make empty rows; they grow by themselves."""
        return _TorchCache(self.network, rows, capacity)


class _TorchCache:
    """A cache for each sequence; each row has its own pass."""

    def __init__(self, network: PreTrainedModel, rows: int, capacity: int) -> None:
        self.capacity = capacity
        self._network = network
        self._caches = [DynamicCache() for _ in range(rows)]
        self._stopped = False

    def extend(self, row: int, tokens: Sequence[int], wanted: int) -> Iterator[Logits]:
        """Append tokens to one row; see `KVCache.extend`."""
        yield self._extend(row, tokens, wanted)

    @torch.inference_mode()
    def _extend(self, row: int, tokens: Sequence[int], wanted: int) -> Logits:
        if self._stopped:
            raise RuntimeError("these rows were stopped")
        logits = self._network(
            input_ids=torch.tensor([list(tokens)], device=self._network.device),
            past_key_values=self._caches[row],
            use_cache=True,
            logits_to_keep=wanted,
        ).logits  # [1, wanted, V]
        found: Logits = logits[0].float().cpu().numpy()
        return found

    def step(self, tokens: Mapping[int, int]) -> Logits:
        """Append one token to each of several rows, one after the other."""
        return np.concatenate([self._extend(row, [token], 1) for row, token in tokens.items()])

    def begin(self, prompts: Mapping[int, Sequence[int]]) -> Logits:
        """Fill several rows, one after the other."""
        return np.concatenate([self._extend(row, tokens, 1) for row, tokens in prompts.items()])

    def trim(self, row: int, length: int) -> None:
        """Remove a row's latest tokens; see `KVCache.trim`."""
        if length == 0:
            self._caches[row] = DynamicCache()
        else:
            self._caches[row].crop(length)

    def stop(self) -> None:
        """Refuse further passes; the current one runs to its end."""
        self._stopped = True
