"""Triples to batches of token ids, with everything but the correction masked out of the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from aligner_middleware.prompt import PromptTemplate, encode_continuation, encode_prompt
from aligner_middleware.tokenizer import Tokenizer
from aligner_middleware.triples import Triple

IGNORED = -100  # the label that cross-entropy skips
DECISION = 1 << 24  # added to a label, above every vocabulary: here copying and correcting part


@dataclass(frozen=True)
class Example:
    """One row as token ids.

    Attributes:
        prompt: Question and answer in their template.
        target: What is learnt: the correction and its end token.
        parting: Where in `target` it parts from the answer; its last position, the end token's, if it never does.
    """

    prompt: tuple[int, ...]
    target: tuple[int, ...]
    parting: int

    def __len__(self) -> int:
        return len(self.prompt) + len(self.target)


def encode_triple(tokenizer: Tokenizer, template: PromptTemplate, end_token_id: int, triple: Triple) -> Example:
    """Encode a triple with the very functions that inference uses."""
    prompt = encode_prompt(tokenizer, template, triple.question, triple.answer)
    target = (*encode_continuation(tokenizer, template, triple.correction), end_token_id)
    answer = (*encode_continuation(tokenizer, template, triple.answer), end_token_id)
    parting = next((at for at, (a, b) in enumerate(zip(answer, target, strict=False)) if a != b), len(target) - 1)
    return Example(tuple(prompt), target, parting)


def collate(examples: Sequence[Example], slices: bool = False) -> dict[str, Any]:
    """Pad examples to a batch `[B, T]` for a causal model of transformers.

    With prompt `p`, target `t` and end token `e`:

        input_ids       p p t e      labels  · · t e
                        p t e 0              · t e ·
        attention_mask  1 1 1 1
                        1 1 1 0

    The loss shifts labels by one position. Two labels of each row are marked as decisions: the first, and that at which
    it parts from the answer.

    Args:
        examples: The rows.
        slices: Whether the model takes `logits_to_keep`. Then its head is applied from the batch's first target on, not
            to the prompts: over a vocabulary of 50,000 it is a third of a small model's work.
    """
    width = _rounded(max(map(len, examples)))
    ids = torch.zeros(len(examples), width, dtype=torch.long)
    labels = torch.full((len(examples), width), IGNORED, dtype=torch.long)
    mask = torch.zeros(len(examples), width, dtype=torch.long)
    for row, example in enumerate(examples):
        start, end = len(example.prompt), len(example)
        ids[row, :end] = torch.tensor(example.prompt + example.target)
        labels[row, start:end] = torch.tensor(example.target)
        labels[row, [start, start + example.parting]] += DECISION
        mask[row, :end] = 1
    batch = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    first = min(len(example.prompt) for example in examples)
    return batch | ({"logits_to_keep": min(width, _rounded(width - first + 1))} if slices else {})


def _rounded(width: int) -> int:
    """Round up, so that few shapes occur: for each new one the CPU's kernels are compiled and kept anew."""
    return -(-width // 32) * 32


def correction_loss(
    outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None, *, decision_weight: float = 1.0
) -> torch.Tensor:
    """Cross-entropy on the targets alone, in nats a token.

    Args:
        outputs: With `logits` of the last `W` positions, `[B, W, vocabulary]`.
        labels: `[B, T]` of `collate`; no target stands before the first of those positions.
        num_items_in_batch: Targets in the whole step, over its passes and devices. The trainer gives it in training;
            without it, in evaluation, the mean over `labels` is taken and every token counts the same.
        decision_weight: How much more than another token a decision counts.
    """
    logits = outputs["logits"]
    following = labels[:, -logits.shape[1] :][:, 1:]
    supervised = following != IGNORED
    targets = following[supervised]
    losses = torch.nn.functional.cross_entropy(logits[:, :-1][supervised].float(), targets % DECISION, reduction="none")
    if num_items_in_batch is None:
        return losses.mean()
    weighted = losses * torch.where(targets < DECISION, 1.0, decision_weight)
    return weighted.sum() / torch.as_tensor(num_items_in_batch)
