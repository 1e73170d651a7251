"""Triples to batches of token ids, with everything but the correction masked out of the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from aligner_middleware.prompt import PromptTemplate, encode_continuation, encode_prompt
from aligner_middleware.tokenizer import Tokenizer
from aligner_middleware.training.triples import Triple

IGNORED = -100  # the label that cross-entropy skips


@dataclass(frozen=True)
class Example:
    """One row as token ids: `prompt`, then the supervised `target` (the correction and its end token)."""

    prompt: tuple[int, ...]
    target: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.target)


def encode_triple(tokenizer: Tokenizer, template: PromptTemplate, end_token_id: int, triple: Triple) -> Example:
    """Encode a triple with the very functions that inference uses."""
    prompt = encode_prompt(tokenizer, template, triple.question, triple.answer)
    correction = encode_continuation(tokenizer, template, triple.correction)
    return Example(tuple(prompt), (*correction, end_token_id))


def collate(examples: Sequence[Example]) -> dict[str, torch.Tensor]:
    """Pad examples to `[B, T]` on the right.

    With prompt `p`, target `t` and end token `e`:

        input_ids       p p t e      labels  · · t e
                        p t e 0              · t e ·
        attention_mask  1 1 1 1
                        1 1 1 0

    The model itself shifts labels by one position.
    """
    width = max(map(len, examples))
    ids = torch.zeros(len(examples), width, dtype=torch.long)
    labels = torch.full((len(examples), width), IGNORED, dtype=torch.long)
    mask = torch.zeros(len(examples), width, dtype=torch.long)
    for row, example in enumerate(examples):
        start, end = len(example.prompt), len(example)
        ids[row, :end] = torch.tensor(example.prompt + example.target)
        labels[row, start:end] = torch.tensor(example.target)
        mask[row, :end] = 1
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}
