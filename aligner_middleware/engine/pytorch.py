"""The same decoder in PyTorch: what the exported graph is checked and measured against."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from aligner_middleware.engine.model import IntArray, KVCache, Slots, last_positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TorchModel:
    """A causal language model of transformers, behind the interface of `Model`."""

    def __init__(self, network: PreTrainedModel) -> None:
        self.max_positions = int(network.config.get_text_config().max_position_embeddings)
        self._network = network

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """Make an empty cache; it grows by itself."""
        return _TorchCache(batch)

    @torch.inference_mode()
    def forward(self, tokens: IntArray, counts: IntArray, cache: KVCache, last: int) -> IntArray:
        """Run one pass; see `Model.forward`."""
        assert isinstance(cache, _TorchCache)
        positions = cache.slots.append(counts, tokens.shape[1])
        wanted = last_positions(counts, last)
        first = int(wanted.min())
        device = self._network.device
        logits = self._network(
            input_ids=torch.from_numpy(tokens).to(device),
            attention_mask=torch.from_numpy(cache.slots.mask).to(device),
            position_ids=torch.from_numpy(positions).to(device),
            past_key_values=cache.layers,
            use_cache=True,
            logits_to_keep=tokens.shape[1] - first,
        ).logits  # [B, T - first, V]
        chosen: IntArray = logits.argmax(dim=-1).gather(1, torch.from_numpy(wanted - first).to(device)).cpu().numpy()
        return chosen


class _TorchCache:
    def __init__(self, batch: int) -> None:
        from transformers import DynamicCache

        self.slots = Slots(batch)
        self.layers: Any = DynamicCache()

    @property
    def lengths(self) -> IntArray:
        return self.slots.lengths

    def trim(self, lengths: IntArray) -> None:
        self.layers.crop(self.slots.trim(lengths))

    def select(self, rows: list[int]) -> None:
        self.slots.mask = self.slots.mask[rows]
        self.layers.batch_select_indices(torch.tensor(rows))
