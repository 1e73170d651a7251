"""The real default aligner, built once into the user's cache, and small random models of several families."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from aligner_middleware import Aligner
from aligner_middleware.artifact import DEFAULT_FOLDER
from tests.fakes import tokenizer_json


@pytest.fixture(scope="session")
def aligner() -> Aligner:
    return Aligner.load()


@pytest.fixture(scope="session")
def held_out() -> list[dict[str, str]]:
    return [json.loads(line) for line in (DEFAULT_FOLDER / "held_out.jsonl").read_text(encoding="utf-8").splitlines()]


FAMILIES: dict[str, dict[str, object]] = {
    "llama": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 2},
    "gemma": {"num_key_value_heads": 1, "head_dim": 16},
    "mistral": {"num_key_value_heads": 2, "sliding_window": None},
    "gpt_neox": {},
}


def random_checkpoint(family: str, folder: Path) -> Path:
    """Write a 2-layer model of a family with random weights and the byte tokenizer."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family,
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
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(tokenizer_json())
    return folder
