"""A compact difference: what it keeps of the trained weights, and what it refuses."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from aligner_middleware import BuildError
from aligner_middleware.checkpoints.difference import add_difference, save_difference

SHAPES = {"large": (300, 257), "embedding": (5000, 16), "norm": (48,), "left": (300, 300), "one": (1, 7)}


class Network(torch.nn.Module):
    """Weights by name."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name, weight in weights.items():
            self.register_parameter(name, torch.nn.Parameter(weight.clone()))


def drawn(seed: int, scale: float = 1.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def trained_from(base: dict[str, torch.Tensor], seed: int = 1) -> dict[str, torch.Tensor]:
    """Change all of it a little, but only two rows of the embeddings, and one matrix not at all."""
    moved = drawn(seed, 1e-3)
    rows = torch.zeros(SHAPES["embedding"][0], 1)
    rows[[7, 4000]] = 1
    moved["embedding"] *= rows
    moved["left"] *= 0
    return {name: base[name] + moved[name] for name in base}


def restored(base: dict[str, torch.Tensor], path: Path) -> dict[str, torch.Tensor]:
    network = Network(base)
    add_difference(network, path)
    return {name: weight.detach() for name, weight in network.named_parameters()}


def error(found: torch.Tensor, trained: torch.Tensor, base: torch.Tensor) -> float:
    """Share of the difference's squared norm that is lost."""
    return float(((found - trained) ** 2).sum() / ((trained - base) ** 2).sum())


def test_what_is_added_is_nearer_to_the_trained_weights_with_every_bit(tmp_path: Path) -> None:
    base = drawn(0)
    trained = trained_from(base)
    errors, sizes = [], []
    for bits in range(1, 9):
        held = save_difference(trained, base, bits, tmp_path / "d")
        found = restored(base, tmp_path / "d")
        errors.append(error(found["large"], trained["large"], base["large"]))
        sizes.append((tmp_path / "d").stat().st_size)
        assert held == pytest.approx(1 - errors[-1], abs=1e-3)
        assert torch.equal(found["left"], base["left"])
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < 0.4  # a bit is a sign: 1 - 2 / π of a normal distribution is lost
    assert errors[2] < 0.05
    assert errors[-1] < 1e-4
    assert sizes == sorted(sizes)
    assert sizes[2] < 300 * 257 * (3 + 16 / 128) / 8 + 3000


def test_small_weights_and_single_rows_are_exact_in_float16(tmp_path: Path) -> None:
    base = drawn(0)
    trained = trained_from(base)
    save_difference(trained, base, 1, tmp_path / "d")
    found = restored(base, tmp_path / "d")
    for name in ("embedding", "norm", "one"):
        difference = (trained[name] - base[name]).half().float()
        assert torch.equal(found[name], base[name] + difference)
    stored = load_file(tmp_path / "d")
    assert stored["embedding:rows"].tolist() == [7, 4000]
    assert not any(name.startswith("left") for name in stored)


@given(st.integers(0, 2**20), st.integers(1, 8), st.floats(-6, 1))
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_weight_moves_further_than_its_group_did(tmp_path: Path, seed: int, bits: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    base = {"w": torch.zeros(520, 130)}
    trained = {"w": 10**scale * torch.randn(520, 130, generator=generator)}
    held = save_difference(trained, base, bits, tmp_path / "d")
    found = restored(base, tmp_path / "d")["w"]
    largest = float(trained["w"].abs().max())
    assert found.abs().max() <= largest * 1.001 + 1e-7
    assert (found - trained["w"]).abs().max() <= 2 * largest + 1e-7
    assert 0 < held <= 1


def test_half_precision_of_the_base_is_kept(tmp_path: Path) -> None:
    base = drawn(0)
    save_difference(trained_from(base), base, 4, tmp_path / "d")
    network = Network(base).bfloat16()
    add_difference(network, tmp_path / "d")
    assert {weight.dtype for weight in network.parameters()} == {torch.bfloat16}


def test_weights_that_did_not_change_leave_an_empty_difference(tmp_path: Path) -> None:
    base = drawn(0)
    assert save_difference(base, base, 3, tmp_path / "d") == 1
    assert all(torch.equal(weight, base[name]) for name, weight in restored(base, tmp_path / "d").items())


@pytest.mark.parametrize("name", ["large", "embedding", "norm"])
@pytest.mark.parametrize("change", ["gone", "smaller", "larger", "turned", "flat"])
def test_another_base_is_refused_by_the_weights_that_do_not_fit(tmp_path: Path, name: str, change: str) -> None:
    base = drawn(0)
    save_difference(trained_from(base), base, 3, tmp_path / "d")
    other = dict(base)
    shape = SHAPES[name]
    if change == "gone":
        del other[name]
    else:
        shapes = {
            "smaller": tuple(size - 1 for size in shape),
            "larger": tuple(size + 1 for size in shape),
            "turned": shape[::-1] if len(shape) > 1 else (1, *shape),
            "flat": (math.prod(shape), 1),
        }
        other[name] = torch.zeros(shapes[change])
    with pytest.raises(BuildError, match=rf"does not fit its base model.*'{name}'"):
        add_difference(Network(other), tmp_path / "d")


def test_a_refused_difference_changes_nothing(tmp_path: Path) -> None:
    base = drawn(0)
    save_difference(trained_from(base), base, 3, tmp_path / "d")
    network = Network(base | {"one": torch.zeros(2, 7)})
    before = {name: weight.detach().clone() for name, weight in network.named_parameters()}
    with pytest.raises(BuildError):
        add_difference(network, tmp_path / "d")
    assert all(torch.equal(weight, before[name]) for name, weight in network.named_parameters())
