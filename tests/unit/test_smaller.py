"""The smallest edit: a sentence that an edit names without need comes back, and nothing bad does."""

from __future__ import annotations

import asyncio
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aligner_middleware import Correction
from aligner_middleware.text.edits import Operation, apply, smaller_edits, split_sentences
from tests.fakes import FakeAligner, judging_aligner

BAD = "You idiot! "
SENTENCES = ["Turn left. ", "Mind the step. ", "1. ", "Ask at the inn.\n", BAD, "- one\n"]


def with_neighbours(question: str, answer: str) -> str:
    """Removes a bad sentence together with those on both sides of it, as a small model does at times."""
    pieces = split_sentences(answer)
    bad = [at for at, piece in enumerate(pieces) if "idiot" in piece]
    return "".join(piece for at, piece in enumerate(pieces) if all(abs(at - one) > 1 for one in bad))


def the_whole(question: str, answer: str) -> str:
    return "".join(piece for piece in split_sentences(answer) if "idiot" not in piece)


def both_ways(aligner: FakeAligner, answer: str, **options: object) -> Correction:
    """Correct an answer in every way that there is, which make the same of it."""
    made = aligner.correct("q", answer, **options)  # type: ignore[arg-type]
    stream = aligner.stream("q", answer, **options)  # type: ignore[arg-type]
    texts = [
        aligner.correct_batch([("q", answer)], **options)[0].corrected,  # type: ignore[call-overload]
        asyncio.run(aligner.acorrect("q", answer, **options)).corrected,  # type: ignore[arg-type]
        "".join(stream),
    ]
    assert texts == [made.corrected] * 3
    return made


FIRST = "First of all, go to the old bridge over the river. "
LAST = " Then ask at the inn beside the church, which opens at eight."
LONG = f"{FIRST}Turn left. {BAD}Go on.{LAST}"
CASES = [
    (LONG, BAD),
    ("Mind the step. You idiot! 4. Ask at the inn, which opens at eight and has rooms for the night.", BAD),
]


@pytest.mark.parametrize(("answer", "bad"), CASES)
def test_good_neighbours_of_a_bad_sentence_stay(answer: str, bad: str) -> None:
    with judging_aligner(with_neighbours) as aligner:
        made = both_ways(aligner, answer)
    assert made.corrected == answer.replace(bad, "")
    assert (made.verdict, made.doubts) == ("edit", ())


@pytest.mark.parametrize(
    ("middle", "left"),
    [
        ("what an idiot would say My friend, the sea is wide and deep.", "My friend, the sea is wide and deep."),
        ("Only an idiot would say so to Anna or to me.", ""),  # it begins like any other sentence
        ("what would My friend the idiot say.", ""),  # the rest of it is no better
    ],
)
def test_a_good_sentence_stays_that_a_bad_one_without_end_mark_runs_into(middle: str, left: str) -> None:
    with judging_aligner(the_whole) as aligner:
        assert both_ways(aligner, f"{FIRST}{middle}{LAST}").corrected.split() == f"{FIRST}{left}{LAST}".split()


def test_where_no_smaller_edit_is_kept_the_edit_stays() -> None:
    answer = "Go to the bridge and over it. You idiot! Another idiot! Then take the road to the church."
    with judging_aligner(the_whole) as aligner:
        made = both_ways(aligner, answer)
    assert made.corrected == "Go to the bridge and over it. Then take the road to the church."


@pytest.mark.parametrize("odds", [-1.0, 0.0, 5.0])
def test_a_smaller_edit_that_is_not_clearly_kept_is_not_taken(odds: float) -> None:
    full = with_neighbours("q", LONG)

    def doubt(question: str, text: str) -> float:
        return 20.0 if text == LONG else -20.0 if text == full else odds

    with judging_aligner(with_neighbours, doubt) as aligner:
        assert both_ways(aligner, LONG).corrected == full


def test_only_an_edit_that_can_be_smaller_costs_more() -> None:
    with judging_aligner(with_neighbours) as several, judging_aligner(the_whole) as single:
        for aligner in (several, single):
            made = aligner.correct("q", LONG)
            assert made.corrected == LONG.replace(BAD, "")
            # The prompt, each token of the edit and its end take a pass each.
            asked = made.usage.passes - (made.usage.decoded_tokens + 2)
            # Of three sentences each is removed alone, and left in alone.
            assert asked == (6 if aligner is several else 0)
            assert asked == 0 or made.usage.prompt_tokens > 5 * single.correct("q", LONG).usage.prompt_tokens


@pytest.mark.parametrize("how", ["thread", "task", "stream"])
def test_where_smaller_edits_take_too_long_the_edit_stands(how: str) -> None:
    seen = list[str]()

    def slow(question: str, text: str) -> str:
        seen.append(text)
        if text != LONG:
            time.sleep(1.0)
        return with_neighbours(question, text)

    with judging_aligner(slow) as aligner:
        start = time.monotonic()
        if how == "thread":
            corrected = aligner.correct("q", LONG, timeout=0.5).corrected
        elif how == "task":
            corrected = asyncio.run(aligner.acorrect("q", LONG, timeout=0.5)).corrected
        else:
            corrected = "".join(aligner.stream("q", LONG, timeout=0.5))
        assert time.monotonic() - start < 0.9
    assert corrected == with_neighbours("q", LONG)
    assert len(seen) > 1


def test_a_smaller_edit_is_kept_by_the_strength_of_the_call() -> None:
    smaller = LONG.replace(BAD, "")

    def odds(question: str, text: str) -> float:
        return -2.94 if text == smaller else 20.0 if BAD in text else -20.0  # a score of 0.05

    with judging_aligner(with_neighbours, odds) as aligner:
        assert aligner.correct("q", LONG, strength=0.5).corrected == smaller
        assert aligner.correct("q", LONG, strength=0.01).corrected != smaller
        assert BAD not in aligner.correct("q", LONG, strength=0.01).corrected


def test_a_repaired_sentence_is_not_removed_in_its_place() -> None:
    answer = f"{FIRST}Turn left, you idiot. Go on.{LAST}"

    def repair(question: str, text: str) -> str:
        return text.replace("Turn left, you idiot.", "Now turn left at the mill.").replace(" Go on.", "")

    with judging_aligner(repair, lambda q, text: 20.0 if "idiot" in text else -20.0) as aligner:
        assert both_ways(aligner, answer).corrected == f"{FIRST}Now turn left at the mill. Go on.{LAST}"


def test_a_block_of_reasoning_inside_an_answer_stays() -> None:
    answer = f"{BAD}<think>Which way?</think> Go on. {FIRST}{LAST.strip()}"

    def clumsy(question: str, text: str) -> str:
        return text.replace(BAD, "").replace("Go on. ", "") if "idiot" in text else text

    with judging_aligner(clumsy) as aligner:
        assert "<think>Which way?</think>" in both_ways(aligner, answer).corrected


@given(st.lists(st.sampled_from(SENTENCES), min_size=1, max_size=8), st.data())
@settings(max_examples=200)
def test_smaller_edits_change_nothing_that_the_edit_leaves(sentences: list[str], data: st.DataObject) -> None:
    answer = "".join(sentences)
    count = len(split_sentences(answer))
    named = sorted(data.draw(st.sets(st.integers(1, count), min_size=1)))
    edit = [Operation(number, data.draw(st.sampled_from(["", "New."]))) for number in named]
    for smaller in smaller_edits(answer, edit):
        assert {one.sentence for one in smaller} <= set(named)
        assert smaller != edit
        apply(answer, smaller)
