"""Rows packed end to end on a CPU: attention within each row, all other layers over one long sequence without padding.

The fused attention of PyTorch takes a third of a small model's step there in bfloat16; plain products take a tenth.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_NAME = "packed"  # of this attention among those of transformers


def use_packing(model: Any) -> None:
    """Set a model up for packed rows where that works: on a CPU, if each of its layers attends to whole rows."""
    settings = model.config.get_text_config()
    if (
        not torch.cuda.is_available()
        and model._supports_attention_backend
        and not getattr(settings, "sliding_window", None)
        and not getattr(settings, "attn_logit_softcapping", None)
        and not getattr(settings, "attention_dropout", 0)
        and not getattr(settings, "attn_pdrop", 0)
    ):
        model.set_attn_implementation(_NAME)


def is_packed(model: Any) -> bool:
    """Whether a model takes packed rows."""
    return bool(model.config._attn_implementation == _NAME)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float | None = None,
    *,
    boundaries: Sequence[int] = (),
    **unused: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within each row, to earlier positions.

    Args:
        module: The layer; unused.
        query: `[1, H, N, D]`, of rows end to end.
        key: `[1, G, N, D]`, each for `H / G` heads.
        value: As `key`.
        attention_mask: `None`: `boundaries` separates the rows.
        scaling: Of scores; `None` for `D ** -0.5`.
        boundaries: Where each row begins, and N.
        **unused: More that some models pass.

    Returns:
        `[1, N, H, D]`, and no weights.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    kind = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    parts = (part[0].to(kind) for part in (query, key, value))
    return _Attention.apply(*parts, tuple(boundaries), scale)[None], None  # type: ignore[no-untyped-call]


ALL_ATTENTION_FUNCTIONS.register(_NAME, packed_attention)


class _Attention(torch.autograd.Function):
    """Causal attention by plain products, row by row; probabilities are kept for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, boundaries: tuple[int, ...], scale: float
    ) -> torch.Tensor:
        heads, length, size = query.shape
        groups = key.shape[0]
        longest = max(end - start for start, end in pairwise(boundaries))
        future = torch.ones(longest, longest, dtype=torch.bool).triu(1)
        output = query.new_empty(length, heads, size)
        kept = []
        for start, end in pairwise(boundaries):
            row = end - start
            asked = query[:, start:end].reshape(groups, -1, size)
            scores = torch.bmm(asked, key[:, start:end].transpose(1, 2)).float().mul_(scale)
            scores.view(heads, row, row).masked_fill_(future[:row, :row], -torch.inf)
            probabilities = scores.softmax(-1).to(query.dtype)
            output[start:end] = torch.bmm(probabilities, value[:, start:end]).view(heads, row, size).transpose(0, 1)
            kept.append(probabilities)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.boundaries, ctx.scale = boundaries, scale
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors
        heads, _, size = query.shape
        groups = key.shape[0]
        of_query, of_key, of_value = (torch.empty_like(part) for part in (query, key, value))
        for probabilities, (start, end) in zip(kept, pairwise(ctx.boundaries), strict=True):
            asked = query[:, start:end].reshape(groups, -1, size)
            given = gradient[start:end].transpose(0, 1).reshape(groups, -1, size).to(query.dtype)
            of_value[:, start:end] = torch.bmm(probabilities.transpose(1, 2), given)
            of_probabilities = torch.bmm(given, value[:, start:end].transpose(1, 2)).float()
            of_scores = torch._softmax_backward_data(of_probabilities, probabilities.float(), -1, torch.float32)
            of_scores = of_scores.mul_(ctx.scale).to(query.dtype)
            of_query[:, start:end] = torch.bmm(of_scores, key[:, start:end]).view(heads, -1, size)
            of_key[:, start:end] = torch.bmm(of_scores.transpose(1, 2), asked)
        return of_query, of_key, of_value, None, None
