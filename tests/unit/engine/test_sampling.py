"""Drawing tokens: the draft changes the cost, never the distribution."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from aligner_middleware import InputError
from aligner_middleware.engine import Generation, Sampler, decode
from aligner_middleware.engine.model import Logits
from tests.fakes import FakeModel, fake_aligner

LOGITS = np.array([[0.0, 1.0, 2.0, 0.5], [1.5, 0.0, -1.0, 2.0], [0.0, 0.0, 3.0, 1.0], [1.0, 2.0, 0.0, 0.0]])
DRAWS = 1500


class Markov(FakeModel):
    """The next token's logits are those of the latest token."""

    def append(self, held: list[int], tokens: Sequence[int], wanted: int, capacity: int) -> Logits:
        held += tokens
        return LOGITS[list(tokens)][-wanted:].astype(np.float32)


def probabilities(logits: Logits, temperature: float, top_p: float) -> NDArray[np.float64]:
    weights = np.exp(logits / temperature)
    weights /= weights.sum()
    order = np.argsort(-weights)
    kept = order[: int(np.searchsorted(np.cumsum(weights[order]), top_p)) + 1] if top_p < 1 else order
    masked: NDArray[np.float64] = np.zeros_like(weights)
    masked[kept] = weights[kept]
    masked /= masked.sum()
    return masked


@pytest.mark.parametrize("draft", [[], [2, 2, 2], [3, 0, 3, 0], [1]])
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 0.9)])
def test_three_tokens_have_the_distribution_that_the_model_gives_them(
    draft: list[int], temperature: float, top_p: float
) -> None:
    sampler = Sampler(temperature, top_p, seed=5)
    model = Markov(lambda tokens: 0)
    found: Counter[tuple[int, ...]] = Counter()
    for _ in range(DRAWS):
        generation = Generation([0], draft, max_new_tokens=3, sampler=sampler)
        for _ in decode(model, [generation], frozenset()):
            pass
        found[tuple(generation.tokens)] += 1
    rows = [probabilities(row, temperature, top_p) for row in LOGITS]
    expected: dict[tuple[int, ...], float] = {
        (a, b, c): rows[0][a] * rows[a][b] * rows[b][c] for a in range(4) for b in range(4) for c in range(4)
    }
    assert all(expected[tokens] > 0 for tokens in found)
    cells = [(found[tokens], DRAWS * share) for tokens, share in expected.items() if DRAWS * share >= 5]
    chi_squared = sum((seen - hoped) ** 2 / hoped for seen, hoped in cells)
    assert chi_squared < len(cells) + 4.5 * np.sqrt(2 * len(cells))  # one right sampler in 100,000 fails


def test_a_seed_makes_an_answers_correction_the_same_whenever_it_is_asked_for() -> None:
    one, other = (fake_aligner(lambda question, answer: answer, temperature=50.0, seed=3) for _ in range(2))
    expected = one.correct("q", "some answer", on_doubt="keep").corrected
    other.correct("q", "another one")
    assert other.correct("q", "some answer", on_doubt="keep").corrected == expected != "some answer"


def test_a_temperature_below_zero_is_refused() -> None:
    with pytest.raises(InputError, match="temperature"):
        fake_aligner(lambda question, answer: answer, temperature=-1.0)
