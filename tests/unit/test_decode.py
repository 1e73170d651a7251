"""Laws of decoding: a draft changes the cost, never the result; neither do the neighbours in a batch."""

import random

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


def passes(target: list[int], draft: list[int]) -> int:
    """Count the passes of a model that says `target`, whatever it is given as a draft."""
    prompt = [1, 2, 3]
    model = FakeModel(
        lambda tokens: [*target, 0][min(len(tokens) - len(prompt), len(target))] if len(tokens) > 2 else 0
    )
    generation = Generation(prompt, draft, max_new_tokens=len(target) + 5)
    for _ in decode(model, [generation], STOP):
        pass
    assert generation.tokens == target
    return model.passes


TEXT = [random.Random(3).randrange(1, 400) for _ in range(300)]  # words that seldom occur twice, as in real text


def test_the_draft_is_found_again_after_a_sentence_was_changed() -> None:
    new = [500 + place for place in range(20)]
    assert passes(TEXT, TEXT) == 1
    assert passes(TEXT[:100] + TEXT[120:], TEXT) < 15  # left out
    assert passes(TEXT[:100] + new + TEXT[100:], TEXT) < 20 + 15  # put in
    assert passes(TEXT[:100] + new + TEXT[120:], TEXT) < 20 + 15  # rewritten
    assert passes(TEXT[200:] + TEXT[:200], TEXT) < 25  # moved


def test_a_full_rewrite_looks_ahead_little() -> None:
    words = random.Random(4)
    rewrite = [words.choice(TEXT) for _ in range(300)]  # the draft's words in another order tempt it most
    generation = Generation([1, 2, 3], TEXT, max_new_tokens=400)

    def rule(tokens: list[int]) -> int:
        return [*rewrite, 0][len(tokens) - 3] if 3 <= len(tokens) <= 303 else 0

    model = FakeModel(rule)
    for _ in decode(model, [generation], STOP):
        pass
    assert generation.tokens == rewrite
    looked_ahead = model.tokens - 3 - len(TEXT) - (model.passes - 1)
    assert looked_ahead < 0.4 * len(rewrite)  # at 0.16 of a pass each
