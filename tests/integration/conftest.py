"""The real default aligner, built once into the user's cache, and small random models of several families."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from aligner_middleware import Aligner
from aligner_middleware.export.store import export_model
from aligner_middleware.locations import DEFAULT_FOLDER
from tests.fakes import tokenizer_json


@pytest.fixture(scope="session")
def aligner() -> Aligner:
    return Aligner.load()


@pytest.fixture(scope="session")
def held_out() -> list[dict[str, str]]:
    return [json.loads(line) for line in (DEFAULT_FOLDER / "held_out.jsonl").read_text(encoding="utf-8").splitlines()]


_GEMMA: dict[str, object] = {
    "num_key_value_heads": 2,
    "head_dim": 32,
    "sliding_window": 16,
    "query_pre_attn_scalar": 32,
}
_LLAMA_3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
FAMILIES: dict[str, dict[str, object]] = {
    "llama": {"num_key_value_heads": 2},
    "llama, scaled and biased": {
        "num_key_value_heads": 2,
        "rope_scaling": _LLAMA_3 | {"original_max_position_embeddings": 64},
        "attention_bias": True,
        "mlp_bias": True,
    },
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 32},
    "gemma": {"num_key_value_heads": 1, "head_dim": 16},
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "mistral": {"num_key_value_heads": 2, "sliding_window": None},
    "mistral, windowed": {"num_key_value_heads": 2, "sliding_window": 16},
    "phi3": {"num_key_value_heads": 2},
    "gpt_neox": {},
}


def random_checkpoint(family: str, folder: Path) -> Path:
    """Write a 2-layer model of a family with the byte tokenizer, and random weights so strong that a wrong fusion shows."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family.partition(",")[0],
        vocab_size=320,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=2,
        **FAMILIES[family],
    )
    network = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for name, weight in network.named_parameters():
            spread = 0.2 if weight.ndim == 1 else 1.5 / weight.shape[1] ** 0.5
            center = 1.0 if "norm" in name and "gemma" not in family else 0.0
            weight.copy_(torch.randn_like(weight) * spread + center)
    network.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(tokenizer_json())
    return folder


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Give the folder of a family's random `checkpoint` and of its float32 export, `out`; both are made once, to be read."""

    @cache
    def folder_of(family: str) -> Path:
        folder = tmp_path_factory.mktemp("exported")
        export_model(str(random_checkpoint(family, folder / "checkpoint")), folder / "out", "float32")
        return folder

    return folder_of
