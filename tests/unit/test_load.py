"""Hundreds of corrections at once, some of them given up."""

import pytest
from load import quick_aligner, run


@pytest.mark.slow
@pytest.mark.parametrize("loops", [1, 3])
def test_five_hundred_calls_at_once_all_end_each_with_its_own_answer(loops: int) -> None:
    result = run(quick_aligner, 500, loops, limit=900)
    assert all(result.held.values()), (result.held, result.outcomes)
    assert result.outcomes["answered"] >= 300
    assert result.outcomes["dropped"] > 20
