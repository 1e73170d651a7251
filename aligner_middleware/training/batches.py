"""Triples to batches of token ids, with everything but verdict and correction masked out of the loss."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from aligner_middleware.data.triples import Triple
from aligner_middleware.text.targets import EDIT_SHARE, encode_target
from aligner_middleware.text.template import (
    VERDICTS,
    PromptTemplate,
    Verdict,
    encode_continuation,
    encode_prompt,
    verdict_ids,
)
from aligner_middleware.text.tokenizer import Tokenizer

IGNORED = -100  # the label that cross-entropy skips
DECIDING = 1 << 24  # added to the label of a deciding token; larger than every vocabulary
VERDICT = 1 << 25  # added to a verdict's label
_PACK_STEP = 128  # packed batches have a multiple of so many tokens


@dataclass(frozen=True)
class Example:
    """One row as token ids.

    Attributes:
        prompt: Question, answer and maybe an instruction in their template; in the warm-up stage also the verdict, which is
            not learnt.
        target: Tokens to learn: a verdict, the correction and its end token, as far as the row has them.
        deciding: Positions in `target` of deciding tokens (`text/targets.py`): those that choose what to change, such as
            the first edit.
        verdict: The first token of `target`; `None` for an aligner without verdicts, and in the warm-up stage.
    """

    prompt: tuple[int, ...]
    target: tuple[int, ...]
    deciding: tuple[int, ...] = ()
    verdict: Verdict | None = None

    def __len__(self) -> int:
        return len(self.prompt) + len(self.target)


def encode_triple(
    tokenizer: Tokenizer, template: PromptTemplate, end_token_id: int, triple: Triple, edit_share: float = EDIT_SHARE
) -> Example:
    """Encode a triple with the functions that inference uses."""
    prompt = encode_prompt(tokenizer, template, triple.question, triple.answer, triple.instruction or "")
    target = encode_target(tokenizer, template, end_token_id, triple.answer, triple.correction, edit_share)
    return Example(tuple(prompt), target.ids, target.deciding, target.verdict)


def encode_identity(
    tokenizer: Tokenizer, template: PromptTemplate, end_token_id: int, triple: Triple
) -> Example | None:
    """Encode a row of the warm-up stage: the answer copied, after the verdict `edit` where there are verdicts.

    Returns:
        The row; `None` for a template whose edits are operations: these copy nothing.
    """
    if template.mark:
        return None
    prompt = encode_prompt(tokenizer, template, triple.question, triple.answer, triple.instruction or "")
    if (verdicts := verdict_ids(tokenizer, template)) is not None:
        prompt.append(verdicts[VERDICTS.index("edit")])
    copy = (*encode_continuation(tokenizer, template, triple.answer), end_token_id)
    return Example(tuple(prompt), copy, tuple(sorted({0, len(copy) - 1})))


def verdict_weights(examples: Sequence[Example], balance: float) -> dict[Verdict, float]:
    """Weigh each verdict by its frequency: `(N / (3 n)) ** balance`, of n among N rows."""
    counts = Counter(example.verdict for example in examples if example.verdict)
    return {verdict: (counts.total() / (3 * max(1, counts[verdict]))) ** balance for verdict in VERDICTS}


def collate(examples: Sequence[Example]) -> dict[str, Any]:
    """Pad examples to a batch `[B, T]` for a causal model of transformers.

    With prompt `p`, target `t` and end token `e`:

        input_ids       p p t e      labels  · · t e
                        p t e 0              · t e ·
        attention_mask  1 1 1 1
                        1 1 1 0

    The loss shifts labels by one position. `VERDICT` and `DECIDING` are added to the labels of such tokens.
    """
    width = _rounded(max(map(len, examples)))
    ids = torch.zeros(len(examples), width, dtype=torch.long)
    labels = torch.full((len(examples), width), IGNORED, dtype=torch.long)
    mask = torch.zeros(len(examples), width, dtype=torch.long)
    for row, example in enumerate(examples):
        start, end = len(example.prompt), len(example)
        ids[row, :end] = torch.tensor(example.prompt + example.target)
        labels[row, start:end] = _labels(example)
        mask[row, :end] = 1
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def pack(examples: Sequence[Example]) -> dict[str, Any]:
    """Put examples end to end, for a model with the attention of `packing`.

    Returns:
        `input_ids`, `labels`, `position_ids` and `attention_mask`, `[1, N]`, as of `collate`, and `boundaries`: where each
        row begins, and N. N is rounded up; the padding is a row of its own, without labels.
    """
    length = sum(map(len, examples))
    filled = _rounded(length, _PACK_STEP)
    ids = torch.zeros(filled, dtype=torch.long)
    labels = torch.full((filled,), IGNORED, dtype=torch.long)
    positions = torch.zeros(filled, dtype=torch.long)
    positions[length:] = torch.arange(filled - length)
    start, boundaries = 0, [0]
    for example in examples:
        end = start + len(example)
        ids[start:end] = torch.tensor(example.prompt + example.target)
        labels[start + len(example.prompt) : end] = _labels(example)
        positions[start:end] = torch.arange(len(example))
        boundaries.append(start := end)
    if filled > length:
        boundaries.append(filled)
    mask = (torch.arange(filled) < length).long()
    return {
        "input_ids": ids[None],
        "labels": labels[None],
        "position_ids": positions[None],
        "attention_mask": mask[None],
        "boundaries": boundaries,
    }


def _labels(example: Example) -> torch.Tensor:
    labels = torch.tensor(example.target, dtype=torch.long)
    labels[list(example.deciding)] += DECIDING
    if example.verdict:
        labels[0] += VERDICT
    return labels


def supervised(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the positions of a batch that are learnt.

    Args:
        labels: `[B, T]` of `collate`.

    Returns:
        Indices into the batch's `B * T` positions whose prediction is wanted, `[N]`, and the label of each. N is rounded
        up; the padding has the label `IGNORED`.
    """
    following = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()
    positions = (following != IGNORED).nonzero()[:, 0]
    filling = _rounded(len(positions)) - len(positions)
    return torch.nn.functional.pad(positions, (0, filling)), torch.nn.functional.pad(
        following[positions], (0, filling), value=IGNORED
    )


def count_targets(labels: torch.Tensor) -> torch.Tensor:
    """Count targets in labels of `collate`: tokens of corrections, and verdicts, `[2]`."""
    verdicts = (labels >= VERDICT).sum()
    return torch.stack([(labels != IGNORED).sum() - verdicts, verdicts])


@contextmanager
def predicting_at(head: torch.nn.Module, positions: torch.Tensor) -> Iterator[None]:
    """Apply a model's head at some positions only: over a vocabulary of 50,000 it is a third of a small model's work.

    Args:
        head: The module that makes logits `[N, V]` of hidden states, which otherwise are `[B, T, H]`.
        positions: Indices `[N]` into the batch's `B * T` positions.
    """
    hook = head.register_forward_pre_hook(lambda module, args: (args[0].flatten(0, 1)[positions], *args[1:]))
    try:
        yield
    finally:
        hook.remove()


def _rounded(width: int, step: int = 32) -> int:
    """Round up, so that few shapes occur: the CPU's kernels are compiled and kept for each new one."""
    return -(-width // step) * step


def correction_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    shares: torch.Tensor | None = None,
    *,
    decision_weight: float = 1.0,
    verdict_weight: float = 1.0,
    weights: dict[int, float] | None = None,
) -> torch.Tensor:
    """Cross-entropy in nats: the corrections' mean over tokens, plus the verdicts' over rows.

    Args:
        logits: `[N, V]`.
        targets: `[N]`, labels of `supervised`.
        shares: In training, this pass's share of the step's correction tokens, and of its verdicts, `[2]`: the weights of
            its two means. `None` in evaluation, where every token and every verdict counts the same.
        decision_weight: How many times as much as another token a deciding token counts.
        verdict_weight: How much the verdicts' loss counts.
        weights: Of each verdict, by its token; `None` for 1.
    """
    learnt = targets != IGNORED
    logits, targets = logits[learnt], targets[learnt]
    losses = torch.nn.functional.cross_entropy(logits.float(), targets % DECIDING, reduction="none")
    is_verdict = targets >= VERDICT
    verdicts, corrections = losses[is_verdict], losses[~is_verdict]
    if shares is not None:
        corrections = corrections * torch.where(targets[~is_verdict] >= DECIDING, decision_weight, 1.0)
        if weights:
            tokens = (targets[is_verdict] - VERDICT).tolist()
            verdicts = verdicts * torch.tensor([weights[token] for token in tokens], device=verdicts.device)
    of_corrections, of_verdicts = (1.0, 1.0) if shares is None else shares
    return of_corrections * _mean(corrections) + of_verdicts * verdict_weight * _mean(verdicts)


def _mean(losses: torch.Tensor) -> torch.Tensor:
    return losses.sum() / max(1, len(losses))
