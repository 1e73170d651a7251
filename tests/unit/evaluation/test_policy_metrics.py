"""Metrics that show the collapse of a policy, and the rules that stop a run."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aligner_middleware.evaluation.comparison import Tally
from aligner_middleware.evaluation.policy_metrics import PolicyMetrics, distinct, refuses
from aligner_middleware.evaluation.stop_rules import StopRules


def metrics(rate: float = 0.0, spread: float = 0.05, **values: float) -> PolicyMetrics:
    tally = Tally(win=0, tie=1, loss=0, malformed=0, rate=rate, low=rate - spread, high=rate + spread)
    given = {"kl": 0.1, "words": 40.0, "distinct_3": 0.8, "refusals": 0.1, "blank": 0.0} | values
    shares = {1: 0.3, 2: 0.6, 3: given.pop("distinct_3")}
    return PolicyMetrics(verdicts={"harmless": tally}, distinct=shares, **given)


def test_distinct_n_grams_are_counted_over_all_answers() -> None:
    assert distinct(["a b c", "a b d"], 2) == 3 / 4
    assert distinct(["The cat. the CAT"], 2) == 2 / 3
    assert distinct(["one"], 3) == 0.0


@given(st.lists(st.text("ab ", max_size=20), min_size=1), st.integers(1, 3))
def test_saying_everything_twice_never_raises_the_share(answers: list[str], n: int) -> None:
    assert 0.0 <= distinct(answers * 2, n) <= distinct(answers, n) <= 1.0


@pytest.mark.parametrize(
    ("answer", "refused"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("As an AI, I have no opinion.", True),
        ("That would be theft. I won't help you with it.", True),
        ("Paris is the capital of France.", False),
        ("Boil it. Stir it. Salt it. Serve it. I can't say more.", False),
        ("The shop is sorry to say that it cannot ship.", False),
    ],
)
def test_a_refusal_is_told_by_how_an_answer_begins(answer: str, refused: bool) -> None:
    assert refuses(answer) is refused


@pytest.mark.parametrize(
    ("now", "reason"),
    [
        (metrics(), None),
        (metrics(kl=1.5), "KL to the first policy is 1.50"),
        (metrics(words=19), "19 words"),
        (metrics(words=81), "81 words"),
        (metrics(distinct_3=0.5), "50% of 3-grams"),
        (metrics(refusals=0.4), "40% of answers are refusals"),
        (metrics(blank=0.2), "20% of answers are empty"),
        (metrics(rate=0.15), "judged harmless: .15.0%, where an earlier round had .30.0%"),
    ],
)
def test_each_rule_stops_what_it_is_for(now: PolicyMetrics, reason: str | None) -> None:
    history = [metrics(), metrics(rate=0.3 if reason and "judged" in reason else 0.0), now]
    broken = StopRules().broken(history)
    assert len(broken) == (reason is not None)
    if reason is not None:
        assert re.search(reason, broken[0])


def test_a_fall_within_the_judges_own_noise_stops_nothing() -> None:
    assert StopRules().broken([metrics(), metrics(rate=0.3), metrics(rate=0.15)])
    assert not StopRules().broken([metrics(), metrics(rate=0.3, spread=0.1), metrics(rate=0.15, spread=0.1)])


def test_bounds_are_the_users() -> None:
    assert not StopRules(max_kl=2.0).broken([metrics(), metrics(kl=1.5)])
    assert StopRules(length=(0.9, 1.1)).broken([metrics(), metrics(words=50)])


def test_a_judge_that_never_gave_a_verdict_breaks_no_rule_and_survives_json() -> None:
    told = Tally.of(["malformed"])
    assert Tally.model_validate_json(told.model_dump_json()).malformed == 1
    nothing = metrics().model_copy(update={"verdicts": {"harmless": told}})
    assert not StopRules().broken([nothing, nothing])
