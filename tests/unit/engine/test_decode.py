"""Laws of decoding: a draft changes the cost, never the result; neither do the neighbours in a batch."""

import math
import random
import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from aligner_middleware.engine import Generation, decode
from aligner_middleware.engine.model import Logits
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


class Guessing(FakeModel):
    """Its logits are random and depend on the latest tokens; what follows the latest one in the draft is the likelier."""

    def __init__(self, seed: int, draft: Sequence[int] = (), pull: float = 0.0) -> None:
        super().__init__(lambda tokens: 0)
        self.seed, self.pull = seed, pull
        self.following: dict[int, int] = dict(pairwise([*draft, 0]))

    def append(self, held: list[int], tokens: Sequence[int], wanted: int, capacity: int) -> Logits:
        rows = []
        for token in tokens:
            held.append(int(token))
            row = np.random.default_rng([self.seed, *held[-3:]]).normal(size=13).astype(np.float32)
            row[self.following.get(int(token), 0)] += self.pull
            rows.append(row)
        assert len(held) <= capacity
        self.tokens += len(tokens)
        return np.stack(rows[-wanted:])


class Case(NamedTuple):
    """A random model, and what it is given.

    Attributes:
        follows: How much likelier it makes the draft's next token.
    """

    seed: int
    prompt: list[int]
    draft: list[int]
    tolerance: float
    follows: float
    limit: int

    def run(self, **options: Any) -> Generation:
        generation = self.generation(**options)
        for _ in decode(self.model, [generation], STOP):
            pass
        return generation

    def generation(self, **options: Any) -> Generation:
        given: dict[str, Any] = {
            "draft": self.draft,
            "tolerance": self.tolerance,
            "end": 0,
            "stop_loops": True,
        } | options
        return Generation(self.prompt, max_new_tokens=self.limit, **given)

    @property
    def model(self) -> Guessing:
        return Guessing(self.seed, self.draft, self.follows)


CASE = st.builds(
    Case,
    st.integers(0, 2**20),
    PROMPT,
    st.lists(st.integers(1, 12), max_size=40) | st.lists(st.integers(1, 3), max_size=40),
    st.just(0.0) | st.floats(0.1, 4) | st.just(math.inf),
    st.sampled_from([0.0, 2.0, 4.0]),
    st.integers(1, 60),
)


def outcome(generation: Generation) -> tuple[list[int], str | None, float]:
    return generation.tokens, generation.finish_reason, generation.surprise


@given(CASE)
@settings(max_examples=150)
def test_verifying_a_draft_changes_nothing_under_any_tolerance(case: Case) -> None:
    verified, decoded = case.run(), case.run(verify=False)
    assert outcome(verified) == outcome(decoded)
    assert decoded.accepted == 0
    assert verified.passes <= decoded.passes


@given(CASE, st.lists(CASE, min_size=1, max_size=5))
def test_under_any_tolerance_a_batch_gives_what_its_sequences_give_alone(first: Case, others: list[Case]) -> None:
    cases = [first, *(other._replace(seed=first.seed, follows=0.0) for other in others)]  # one model
    cases[0] = first._replace(follows=0.0)
    together = [case.generation() for case in cases]
    for _ in decode(cases[0].model, together, STOP):
        pass
    assert [outcome(generation) for generation in together] == [outcome(case.run()) for case in cases]


@given(CASE)
def test_without_a_bound_the_draft_comes_back(case: Case) -> None:
    generation = case.run(tolerance=math.inf)
    assert generation.tokens == (case.draft or case.run(draft=()).tokens)[: case.limit]
    if case.draft:
        assert generation.finish_reason == ("stop" if case.limit > len(case.draft) else "length")


@given(CASE.filter(lambda case: len(case.draft) > 0))
def test_surprise_is_the_least_tolerance_that_keeps_the_draft(case: Case) -> None:
    case = case._replace(limit=len(case.draft) + 1)
    surprise = case.run(tolerance=math.inf).surprise
    assert case.run(tolerance=surprise).tokens == case.draft
    if surprise > 0:
        assert case.run(tolerance=surprise * (1 - 1e-6)).tokens != case.draft


@given(CASE, st.floats(0, 4))
def test_a_higher_tolerance_keeps_all_that_a_lower_one_keeps(case: Case, other: float) -> None:
    lower, higher = (case.run(tolerance=tolerance).tokens for tolerance in sorted([case.tolerance, other]))
    if lower == case.draft[: case.limit]:
        assert higher == lower


def saying(said: list[int], draft: list[int], **options: Any) -> Generation:
    """Decode a model that says `said` after the prompt [99], whatever it is given as a draft."""
    generation = Generation([99], draft, len(said) + 5, stop_loops=True, **options)
    for _ in decode(FakeModel(lambda tokens: [*said, 0][min(len(tokens) - 1, len(said))]), [generation], STOP):
        pass
    return generation


BEGINNING = st.lists(st.integers(1, 4), max_size=12)
TURN = st.lists(st.integers(5, 40), min_size=1, max_size=20, unique=True)


@given(BEGINNING, TURN, st.booleans(), st.booleans())
def test_a_loop_ends_as_soon_as_it_is_certain(
    beginning: list[int], turn: list[int], drafted: bool, verify: bool
) -> None:
    generation = saying(beginning + turn * 80, beginning + turn if drafted else [], verify=verify)
    certain = len(turn) * max(4, math.ceil(32 / len(turn)))  # four turns, and 32 tokens
    assert generation.finish_reason == "loop"
    assert generation.tokens == (beginning + turn * 80)[: len(beginning) + certain]
    assert 0 <= generation.accepted <= len(generation.tokens)


@given(BEGINNING, TURN, st.booleans())
def test_what_the_draft_repeats_may_be_repeated(beginning: list[int], turn: list[int], verify: bool) -> None:
    rule_of_dashes = turn * max(5, math.ceil(40 / len(turn)))
    for said in (beginning + rule_of_dashes, [*rule_of_dashes, *beginning]):
        generation = saying(said, [7, *said, 8], verify=verify)
        assert (generation.tokens, generation.finish_reason) == (said, "stop")


def test_a_loop_is_let_run_where_nobody_asked() -> None:
    generation = Generation([1], max_new_tokens=200)
    for _ in decode(FakeModel(lambda tokens: 5), [generation], STOP):
        pass
    assert (generation.finish_reason, len(generation.tokens)) == ("length", 200)


def test_tokens_that_another_thread_may_see_are_never_taken_back() -> None:
    turn = list(range(5, 25))
    generation = Generation([99], turn * 3, max_new_tokens=200, stop_loops=True)
    seen: list[list[int]] = []
    sys.setprofile(lambda *event: seen.append(list(generation.tokens)))  # at each call of a function and each return
    try:
        for _ in decode(FakeModel(lambda tokens: turn[(len(tokens) - 1) % len(turn)]), [generation], STOP):
            pass
    finally:
        sys.setprofile(None)
    assert generation.finish_reason == "loop"
    assert all(later[: len(earlier)] == earlier for earlier, later in pairwise(seen))
