"""Packed rows train as padded ones do."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from aligner_middleware.training.batches import IGNORED, Example, collate, pack, supervised
from aligner_middleware.training.packing import is_packed, use_packing

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="rows are packed on CPUs only")

TOKENS = st.lists(st.integers(1, 90), min_size=1, max_size=40).map(tuple)
EXAMPLES = st.lists(st.builds(Example, TOKENS, TOKENS), min_size=1, max_size=5)


def model(heads: int = 4, groups: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(  # type: ignore[no-untyped-call]
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config)  # type: ignore[no-untyped-call]


def gradients(network: LlamaForCausalLM, batch: dict[str, object]) -> dict[str, torch.Tensor]:
    network.zero_grad()
    labels = batch.pop("labels")
    assert isinstance(labels, torch.Tensor)
    if "boundaries" in batch:
        del batch["attention_mask"]
    places, targets = supervised(labels)
    logits = network(**batch, use_cache=False).logits.flatten(0, 1)[places]
    loss = torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
    loss.backward()  # type: ignore[no-untyped-call]
    return {name: weight.grad.clone() for name, weight in network.named_parameters() if weight.grad is not None}


@settings(max_examples=10)
@given(EXAMPLES)
def test_gradients_are_those_of_padded_rows(examples: list[Example]) -> None:
    network = model()
    padded = gradients(network, collate(examples))
    use_packing(network)
    assert is_packed(network)
    packed = gradients(network, pack(examples))
    for name, gradient in padded.items():
        torch.testing.assert_close(packed[name], gradient, rtol=1e-3, atol=1e-4)


def test_a_row_does_not_see_its_neighbours() -> None:
    network = model()
    use_packing(network)
    first, second = Example((1, 2, 3), (4, 5)), Example((6, 7), (8,))
    alone = pack([first])
    beside = pack([first, second])
    for batch in (alone, beside):
        del batch["labels"], batch["attention_mask"]
    with torch.no_grad():
        torch.testing.assert_close(
            network(**beside, use_cache=False).logits[:, :5], network(**alone, use_cache=False).logits[:, :5]
        )


def test_filling_is_not_counted() -> None:
    batch = pack([Example((1, 2), (3,)), Example((4,), (5, 6))])
    assert int(batch["attention_mask"].sum()) == 6
    assert batch["boundaries"][:3] == [0, 3, 6]
    assert (batch["labels"] != IGNORED).sum() == 3


def test_models_with_sliding_windows_stay_as_they_are() -> None:
    network = model()
    network.config.sliding_window = 16
    use_packing(network)
    assert not is_packed(network)
