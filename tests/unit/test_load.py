"""Hundreds of corrections at once, some of them given up."""

import pytest
from load import quick_aligner, run


@pytest.mark.parametrize(
    ("calls", "loops"),
    [(100, 2), pytest.param(500, 1, marks=pytest.mark.slow), pytest.param(500, 3, marks=pytest.mark.slow)],
)
def test_calls_at_once_all_end_each_with_its_own_answer(calls: int, loops: int) -> None:
    result = run(quick_aligner, calls, loops, limit=900)
    assert all(result.held.values()), (result.held, result.outcomes)
    assert result.outcomes["answered"] >= 0.6 * calls
    assert result.outcomes["dropped"] > 0.04 * calls
