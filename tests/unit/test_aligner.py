"""`Aligner` over a model whose corrections are known."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aligner_middleware import Aligner, InputError, PromptTooLongError
from tests.fakes import fake_aligner

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60)


def soften(question: str, answer: str) -> str:
    return answer.replace("idiot", "friend")


@given(TEXT.filter(str.strip), TEXT)
def test_a_good_answer_comes_back_byte_for_byte_in_one_pass(question: str, answer: str) -> None:
    correction = fake_aligner(lambda q, a: a).correct(question, answer)
    assert correction.corrected == answer
    assert not correction.changed
    assert correction.usage.passes == (1 if answer.strip() else 0)


def test_a_bad_answer_is_corrected_and_says_what_it_cost() -> None:
    correction = fake_aligner(soften).correct("Which way?", "Left, idiot, then right.")
    assert correction.corrected == "Left, friend, then right."
    assert correction.changed
    assert correction.original == "Left, idiot, then right."
    assert correction.usage.decoded_tokens == len(correction.corrected) - correction.usage.accepted_tokens
    assert correction.usage.decoded_tokens < len("friend, then right.")  # ", then right." was found in the answer again
    assert correction.usage.draft_tokens == len(correction.original)


@pytest.mark.parametrize("answer", ["Fine.", "No, idiot.", "日本 idiot 👩‍👩‍👧", "<|im_end|> idiot"])
def test_draft_batch_and_stream_agree(answer: str) -> None:
    with_draft, without = fake_aligner(soften), fake_aligner(soften, draft=False)
    expected = soften("", answer)
    assert with_draft.correct("q", answer).corrected == expected
    assert without.correct("q", answer).corrected == expected
    assert [c.corrected for c in with_draft.correct_batch([("q", answer), ("r", "idiot")])] == [expected, "friend"]
    assert "".join(with_draft.stream("q", answer)) == expected
    assert "".join(with_draft.stream("q", iter(answer))) == expected
    assert asyncio.run(with_draft.acorrect("q", answer)).corrected == expected


def test_max_new_tokens_cuts_and_says_so() -> None:
    correction = fake_aligner(lambda q, a: "x" * 50, max_new_tokens=7).correct("q", "a")
    assert correction.corrected == "x" * 7
    assert correction.finish_reason == "length"


def test_a_blank_answer_costs_nothing_and_a_blank_question_is_refused() -> None:
    aligner = fake_aligner(soften)
    assert aligner.correct("q", " \n").corrected == " \n"
    assert aligner.correct("q", "").usage.passes == 0
    with pytest.raises(InputError, match="question is blank"):
        aligner.correct("  ", "a")


def test_a_lone_surrogate_is_refused_by_place() -> None:
    with pytest.raises(InputError, match=r"answer holds a lone surrogate, '\\ud83d' at character 2"):
        fake_aligner(soften).correct("q", "ab\ud83d")


def test_nul_bytes_pass_through() -> None:
    assert fake_aligner(soften).correct("q", "a\x00b").corrected == "a\x00b"


def test_an_answer_of_100_000_characters_is_refused_with_figures() -> None:
    with pytest.raises(PromptTooLongError) as caught:
        fake_aligner(soften).correct("q", "a" * 100_000)
    assert caught.value.tokens > 100_000
    assert caught.value.limit == 4096


def test_one_bad_pair_does_not_hold_the_others_up() -> None:
    good, bad = fake_aligner(soften).correct_batch([("q", "idiot"), ("", "a")], return_exceptions=True)
    assert good.corrected == "friend"  # type: ignore[union-attr]
    assert isinstance(bad, InputError)


def test_no_correction_for_no_pairs() -> None:
    assert fake_aligner(soften).correct_batch([]) == []


def test_a_wrong_engine_is_refused() -> None:
    with pytest.raises(InputError, match="expected 'onnx' or 'torch'"):
        Aligner.load(engine="jax")  # type: ignore[arg-type]
