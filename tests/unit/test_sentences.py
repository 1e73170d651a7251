"""Sentence by sentence: what is shown was decided on and stays, and what is kept comes out as it came in."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from itertools import accumulate
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from aligner_middleware import Aligner, Correction, InputError
from aligner_middleware import sentences as module
from aligner_middleware.errors import ClosedError, DoubtError, PromptTooLongError
from aligner_middleware.text.edits import split_sentences, whole_sentences
from tests.fakes import FakeAligner, fake_aligner, judging_aligner

PLACE = 10  # seconds that a free place in the engine is waited for
PARTS = [
    "Turn left. ",
    "You idiot! ",
    "Then go on,",
    " idiot, ",
    "to the bomb. ",
    "Is it far? ",
    "1. ",
    "- one\n",
    "\n\n",
]
PARTS += ["```\n", "x = 1. y\n", "| a | b |\n", "e.g. ", "{", "[1] ", "<think>", "</think>", "No."]
ANSWER = st.lists(st.sampled_from(PARTS), min_size=1, max_size=14).map("".join)
CUTS = st.lists(st.integers(1, 30), max_size=30)


def soften(question: str, answer: str) -> str:
    return answer.replace("You idiot! ", "").replace("idiot", "friend")


def refuse(question: str, answer: str) -> str:
    return "I would rather not help with this." if "bomb" in answer else soften(question, answer)


def late(question: str, answer: str) -> str:
    """Finds fault with the first sentence only once the last has come."""
    return answer.replace("Turn left. ", "") if "No." in answer else answer


def chunks(answer: str, cuts: list[int] | None = None) -> list[str]:
    found = []
    for size in cuts or []:
        found.append(answer[:size])
        answer = answer[size:]
    return [chunk for chunk in [*found, answer] if chunk]


def words(answer: str) -> list[str]:
    return [answer[at : at + 4] for at in range(0, len(answer), 4)]


@pytest.fixture(autouse=True)
def _every_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PAUSE", 0.0)


class Judge:
    """An aligner that notes which texts it was asked about, and kept."""

    def __init__(self, correct: Callable[[str, str], str], **options: Any) -> None:
        self.kept: set[str] = set()
        self._correct = correct
        self.aligner = judging_aligner(self.noting, **options)

    def noting(self, question: str, answer: str) -> str:
        correction = self._correct(question, answer)
        if correction == answer:
            self.kept.add(answer)
        return correction


def streamed(aligner: Aligner, answer: Any, **options: Any) -> tuple[list[str], Correction]:
    with_options: dict[str, Any] = {"by_sentence": True, **options}
    stream = aligner.stream("q", answer, **with_options)
    return list(stream), stream.correction


JUDGES = {name: (Judge(correct), Judge(correct, marks=False)) for name, correct in [("refuse", refuse), ("late", late)]}


@example("Turn left.  idiot, Turn left. Turn left. ", [], "late", False, "passthrough")
@given(ANSWER, CUTS, st.sampled_from(list(JUDGES)), st.booleans(), st.sampled_from(["passthrough", "keep"]))
@settings(max_examples=50)
def test_what_is_shown_was_decided_on_and_stays(
    answer: str, cuts: list[int], name: str, copies: bool, on_doubt: str
) -> None:
    judge = JUDGES[name][copies]
    pieces, correction = streamed(judge.aligner, iter(chunks(answer, cuts)), on_doubt=on_doubt)
    shown = "".join(pieces)
    *early, _ = accumulate(pieces) if correction.released else [""]
    if "think>" not in answer:  # the aligner is asked without the reasoning

        def seen(text: str) -> str:  # between marked sentences it does not see how wide a gap is
            return text if copies else " ".join(text.split())

        assert all(any(seen(text).startswith(seen(begun)) for text in judge.kept) for begun in early)
    assert all(correction.original.startswith(begun) for begun in early)
    assert shown == correction.corrected
    assert answer[: correction.released] == correction.corrected[: correction.released]
    assert correction.original == answer


@given(ANSWER, CUTS)
@settings(max_examples=20)
def test_an_answer_that_is_kept_comes_out_as_it_came_in(answer: str, cuts: list[int]) -> None:
    pieces, correction = streamed(IDENTITY, chunks(answer, cuts))
    assert "".join(pieces) == correction.corrected == answer
    assert not correction.late


IDENTITY = judging_aligner(lambda question, answer: answer)


@given(ANSWER, st.sampled_from(list(JUDGES)), st.booleans())
@settings(max_examples=20)
def test_an_answer_that_is_whole_is_corrected_as_ever(answer: str, name: str, copies: bool) -> None:
    aligner = JUDGES[name][copies].aligner
    _, correction = streamed(aligner, answer)
    expected = aligner.correct("q", answer)
    assert (correction.corrected, correction.verdict, correction.doubts) == (
        expected.corrected,
        expected.verdict,
        expected.doubts,
    )
    assert correction.released == correction.late == 0


@given(ANSWER, st.integers(0, 14), st.sampled_from(list(JUDGES)), st.booleans())
@settings(max_examples=30)
def test_a_released_beginning_stays_whatever_the_verdict(answer: str, count: int, name: str, copies: bool) -> None:
    released = "".join(split_sentences(answer)[:count]).rstrip()
    pieces, correction = streamed(JUDGES[name][copies].aligner, answer, released=released)
    assert released + "".join(pieces) == correction.corrected


@given(ANSWER, CUTS)
@settings(max_examples=15)
def test_tasks_get_what_threads_get(answer: str, cuts: list[int]) -> None:
    aligner = JUDGES["refuse"][0].aligner

    async def main() -> tuple[list[str], Correction]:
        async def given_chunks() -> AsyncIterator[str]:
            for chunk in chunks(answer, cuts):
                yield chunk

        stream = aligner.stream("q", given_chunks(), by_sentence=True)
        return [piece async for piece in stream], stream.correction

    pieces, correction = asyncio.run(main())
    expected = streamed(aligner, chunks(answer, cuts))
    assert pieces == expected[0]
    assert (correction.corrected, correction.released) == (expected[1].corrected, expected[1].released)


@given(ANSWER, st.integers(0, 200))
@settings(max_examples=50)
def test_sentences_that_can_be_decided_on_do_not_change_while_a_text_grows(answer: str, length: int) -> None:
    whole = whole_sentences(answer[:length])
    assert answer.startswith(whole)
    assert whole_sentences(answer).startswith(whole)
    assert whole == whole.rstrip()
    assert sum(line.startswith("```") for line in whole.splitlines()) % 2 == 0 or "```" not in whole
    if whole:
        assert whole != answer


def test_sentences_are_shown_while_the_answer_is_still_being_written() -> None:
    shown: list[str] = []
    seen = []

    def words_of(answer: str) -> Iterator[str]:
        for word in words(answer):
            yield word
            seen.append("".join(shown))

    for piece in JUDGES["refuse"][0].aligner.stream(
        "q", words_of("Turn left. Then right. It is far."), by_sentence=True
    ):
        shown.append(piece)
    assert "Turn left." in seen
    assert "Turn left. Then right." in seen


def test_after_the_first_other_verdict_nothing_is_shown_until_all_is_decided() -> None:
    pieces, correction = streamed(JUDGES["refuse"][0].aligner, words("Turn left. You idiot! Then right. Then on. No."))
    assert pieces == ["Turn left.", " Then right. Then on. No."]
    assert (correction.verdict, correction.late, correction.released) == ("edit", 0, len("Turn left."))


def test_a_rewrite_replaces_what_was_not_shown() -> None:
    pieces, correction = streamed(JUDGES["refuse"][0].aligner, words("Turn left. Then right. To the bomb. It is near."))
    assert pieces == ["Turn left.", " Then right.", " I would rather not help with this."]
    assert (correction.verdict, correction.late) == ("rewrite", 2)


def test_an_operation_on_a_sentence_that_was_shown_is_left_out_and_counted() -> None:
    pieces, correction = streamed(JUDGES["late"][0].aligner, words("Turn left. Then right. Say it. No."))
    assert "".join(pieces) == correction.original
    assert (correction.verdict, correction.late, correction.changed) == ("edit", 1, False)


def test_a_doubt_about_the_rest_leaves_the_whole_answer() -> None:
    answer = "Turn left. Then right. To the bomb. It is near."

    def loops(question: str, text: str) -> str:
        return "Well, well, well. " * 40 if "bomb" in text else text

    with judging_aligner(loops) as aligner:
        _, correction = streamed(aligner, words(answer))
        assert (correction.corrected, correction.released > 0) == (answer, True)
        assert "repeats" in correction.doubts
        assert correction.proposed is not None
        assert correction.proposed.startswith("Turn left. Then right. Well")
        with pytest.raises(DoubtError):
            streamed(aligner, words(answer), on_doubt="raise")


@pytest.mark.parametrize("answer", [json.dumps({"a": "Turn left. Then right."}, indent=1), "```json\n[1,\n2]\n```\n"])
def test_json_is_not_shown_in_pieces(answer: str) -> None:
    pieces, correction = streamed(IDENTITY, words(answer))
    assert pieces == [answer]
    assert correction.released == 0


def test_reasoning_is_shown_with_the_first_sentence_and_stays() -> None:
    reasoning = "<think>An idiot asks. So what?</think>\n"
    answer = reasoning + "Turn left. You idiot! Then right."
    pieces, correction = streamed(JUDGES["refuse"][0].aligner, words(answer))
    assert pieces == [reasoning + "Turn left.", " Then right."]
    assert correction.released == len(reasoning + "Turn left.")


def test_reasoning_between_sentences_waits_for_the_whole_answer() -> None:
    pieces, _ = streamed(IDENTITY, words("Turn left. Then on. <think>Is it? No. Yes.</think> It is near. Yes."))
    assert pieces == ["Turn left.", " Then on.", " <think>Is it? No. Yes.</think> It is near. Yes."]


def test_a_sentence_costs_a_pass_over_itself_alone() -> None:
    answer = "All of this is as it should be. " * 20
    with judging_aligner(lambda question, text: text) as aligner:
        for _ in range(2):  # the first makes the thread
            before = aligner.fake_model.tokens
            pieces, _ = streamed(aligner, words(answer))
            assert len(pieces) == 20
    prompt = aligner.fake_model.tokens - before
    assert prompt < 3 * len(answer)  # and not 10 times, which all verdicts alone would take


@pytest.mark.parametrize("read", [0, 1])
def test_a_stream_that_is_closed_early_frees_its_place(read: int) -> None:
    with judging_aligner(lambda question, text: text) as aligner:
        stream = aligner.stream("q", words("All of this is as it should be. " * 20), by_sentence=True)
        for _ in range(read):
            next(stream)
        stream.close()
        wait_until_free(aligner)


def wait_until_free(aligner: FakeAligner) -> None:
    end = time.monotonic() + PLACE
    scheduler = aligner._scheduler
    while (scheduler._decoder.running or scheduler._prefills) and time.monotonic() < end:
        time.sleep(0.005)
    assert not scheduler._decoder.running
    assert not scheduler._prefills


@pytest.mark.parametrize("cancelled", [False, True])
async def test_a_reader_that_stops_closes_the_answer_at_once_and_frees_its_place(cancelled: bool) -> None:
    closed = []

    async def given_chunks() -> AsyncIterator[str]:
        try:
            for word in words("All of this is as it should be. " * 3):
                yield word
            await asyncio.sleep(PLACE)
        finally:
            await asyncio.sleep(0)
            closed.append("answer")

    with judging_aligner(lambda question, text: text) as aligner:
        stream = aligner.stream("q", given_chunks(), by_sentence=True)
        assert await anext(stream) == "All of this is as it should be."
        if cancelled:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(collect(stream), 0.2)
        else:
            await stream.aclose()
        assert closed
        wait_until_free(aligner)


async def collect(stream: AsyncIterator[str]) -> list[str]:
    return [piece async for piece in stream]


def test_a_verdict_on_a_sentence_that_fails_leaves_the_decision_to_the_end() -> None:
    asked: list[str] = []

    def once(question: str, text: str) -> str:
        asked.append(text)
        if len(asked) == 1:
            raise RuntimeError("no memory")
        return soften(question, text)

    with judging_aligner(once) as aligner:
        pieces, correction = streamed(aligner, words("Turn left. Then right. You idiot! No."))
    assert pieces == [correction.corrected] == ["Turn left. Then right. No."]


def test_an_answer_that_fails_as_a_whole_fails_after_what_was_shown() -> None:
    with judging_aligner(lambda question, text: text) as aligner:
        shown = []
        with pytest.raises(PromptTooLongError):
            for piece in aligner.stream("q", ["Turn left. Then", " go on" * 800, ". No."], by_sentence=True):
                shown.append(piece)
        assert shown == ["Turn left."]
        wait_until_free(aligner)
        aligner.close()
        with pytest.raises(ClosedError):
            streamed(aligner, words("Turn left. Then right. No."))


def test_under_load_verdicts_take_at_most_half_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PAUSE", 1e6)
    pieces, _ = streamed(IDENTITY, words("Turn left. " * 30))
    assert pieces[0] == "Turn left."
    assert len(pieces) == 2


def test_an_aligner_without_verdicts_refuses_it() -> None:
    with fake_aligner(soften) as aligner:
        for options in [{"by_sentence": True}, {"released": "Turn"}]:
            with pytest.raises(InputError, match="needs an aligner that gives verdicts"):
                aligner.stream("q", "Turn left.", **options)  # type: ignore[arg-type]
        with pytest.raises(InputError, match="by_sentence needs"):
            aligner.read_ahead("q", by_sentence=True)


def test_a_released_text_must_be_the_beginning_of_the_answer() -> None:
    for answer in ["Turn left.", ["Left. ", "Right."]]:
        with pytest.raises(InputError, match="expected the beginning"):
            IDENTITY.stream("q", answer, released="Left.")


@pytest.mark.parametrize(("name", "value"), [("strength", 2.0), ("timeout", -1.0)])
def test_options_are_checked_before_anything_is_read(name: str, value: float) -> None:
    options: dict[str, Any] = {name: value}
    with pytest.raises(InputError, match=name):
        IDENTITY.read_ahead("q", by_sentence=True, **options)
