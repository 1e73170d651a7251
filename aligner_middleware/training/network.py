"""The network that is trained: a base model, with an adapter beside it or with all its weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM


def lora_config(rank: int, alpha: int, dropout: float, tokens: Sequence[int] = ()) -> LoraConfig:
    """Configure an adapter: low-rank matrices beside every linear layer but the head, and the embeddings of some tokens."""
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        trainable_token_indices=list(tokens) or None,
    )


def freeze_other_embeddings(model: Any, tokens: Sequence[int]) -> None:
    """Train only some tokens' embeddings; the same for the head, where it has weights of its own."""
    for weight in {
        id(layer.weight): layer.weight for layer in (model.get_input_embeddings(), model.get_output_embeddings())
    }.values():
        if not tokens:
            weight.requires_grad_(False)
            continue
        chosen = torch.zeros(len(weight), 1)
        chosen[list(tokens)] = 1.0
        weight.register_hook(lambda gradient, chosen=chosen: gradient * chosen.to(gradient.device))


def load_network(base: Path, adapter: LoraConfig | None, trained: Path | None, half: bool) -> Any:
    """Load the network that a stage starts from: the base model, or the result of the stage before.

    Args:
        base: Folder of the base model.
        adapter: Shape of the adapter that is trained; `None` to train all weights.
        trained: Folder of an adapter, or of all weights, that was trained before; `None` for the base model.
        half: Whether matrix products are computed in bfloat16.
    """
    options: dict[str, Any] = {"dtype": torch.float32}
    if torch.cpu._is_amx_tile_supported() and not torch.cuda.is_available():
        options["attn_implementation"] = "eager"  # faster on AMX tiles; elsewhere the fused one is up to 2 x faster
    if adapter is None:
        return AutoModelForCausalLM.from_pretrained(trained or base, **options)
    frozen = AutoModelForCausalLM.from_pretrained(base, **options)
    if trained is not None:
        model = PeftModel.from_pretrained(frozen, str(trained), is_trainable=True)
    else:
        model = get_peft_model(frozen, adapter)
    if half:
        for layer in model.modules():
            if isinstance(layer, LoraLayer):  # autocast would cast these matrices anew in every step
                layer.get_base_layer().weight.data = layer.get_base_layer().weight.data.bfloat16()
    return model


def use_bfloat16(wanted: bool | None) -> bool:
    """Decide on bfloat16: as wanted, or, for `None`, by whether the device has units for it."""
    if wanted is not None:
        return wanted
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
