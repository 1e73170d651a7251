"""Laws of decoding: a draft changes the cost, never the result; neither do the neighbours in a batch."""

from hypothesis import given, settings
from hypothesis import strategies as st

from aligner_middleware.engine import Generation, decode
from tests.fakes import FakeModel

STOP = frozenset({0})


def rule(tokens: list[int]) -> int:
    """Looks random and depends on every token; 0 ends."""
    return sum((place + 7) * token for place, token in enumerate(tokens[-9:])) * 2654435761 % 2**32 // 7 % 13


def run(*generations: Generation) -> int:
    model = FakeModel(rule)
    for _ in decode(model, generations, STOP):
        pass
    return model.passes


IDS = st.lists(st.integers(1, 12), max_size=12)
PROMPT = st.lists(st.integers(1, 12), min_size=1, max_size=12)


@given(PROMPT, IDS, st.integers(1, 20))
def test_any_draft_gives_what_plain_decoding_gives(prompt: list[int], draft: list[int], limit: int) -> None:
    plain, drafted = Generation(prompt, max_new_tokens=limit), Generation(prompt, draft, max_new_tokens=limit)
    run(plain)
    run(drafted)
    assert (drafted.tokens, drafted.finish_reason) == (plain.tokens, plain.finish_reason)


@given(PROMPT)
def test_a_perfect_draft_costs_one_pass(prompt: list[int]) -> None:
    plain = Generation(prompt, max_new_tokens=30)
    run(plain)
    drafted = Generation(prompt, list(plain.tokens), max_new_tokens=30)
    assert run(drafted) == 1
    assert drafted.tokens == plain.tokens
    assert drafted.accepted == len(plain.tokens)


@given(st.lists(st.tuples(PROMPT, IDS), min_size=1, max_size=5))
@settings(deadline=None)
def test_a_batch_gives_what_its_sequences_give_alone(rows: list[tuple[list[int], list[int]]]) -> None:
    alone = [Generation(prompt, draft, max_new_tokens=9) for prompt, draft in rows]
    together = [Generation(prompt, draft, max_new_tokens=9) for prompt, draft in rows]
    for generation in alone:
        run(generation)
    run(*together)
    assert [g.tokens for g in together] == [g.tokens for g in alone]
    assert [g.passes for g in together] == [g.passes for g in alone]


@given(PROMPT, IDS, st.integers(1, 5))
def test_max_new_tokens_is_never_passed(prompt: list[int], draft: list[int], limit: int) -> None:
    generation = Generation(prompt, draft, max_new_tokens=limit)
    run(generation)
    assert len(generation.tokens) <= limit
    if generation.finish_reason == "length":
        assert len(generation.tokens) == limit
