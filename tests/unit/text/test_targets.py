"""What is learnt after a prompt: a verdict derived from the texts, then the correction in the form that fits it."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aligner_middleware import BuildError
from aligner_middleware.text.edits import apply, operations, share_kept
from aligner_middleware.text.published import TEMPLATES
from aligner_middleware.text.targets import EDIT_SHARE, Target, encode_target, verdict_of
from aligner_middleware.text.template import (
    DEFAULT,
    VERDICTS,
    PromptTemplate,
    decode_operations,
    encode_continuation,
    encode_prompt,
    verdict_ids,
    with_verdicts,
)
from tests.fakes import END, SPARE, SPECIAL, byte_tokenizer, verdict_template

TOKENIZER = byte_tokenizer(SPARE)
MARKED, COPYING = (verdict_template(TOKENIZER, marks=marks) for marks in (True, False))
EVERY_TEMPLATE = st.sampled_from([MARKED, COPYING, DEFAULT])
SENTENCES = st.lists(
    st.sampled_from(["Go left. ", "You idiot! ", "Then right. ", "No more. ", "<repo_name>.\n", "1. So.\n"]), min_size=1
)
TEXT = SENTENCES.map("".join) | st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)


def encoded(template: PromptTemplate, answer: str, correction: str, share: float = EDIT_SHARE) -> Target:
    return encode_target(TOKENIZER, template, END, answer, correction, share)


@given(TEXT, TEXT | st.just(""), st.floats(0, 1), st.booleans())
def test_a_verdict_follows_from_the_share_of_words_that_stays(
    answer: str, correction: str, share: float, as_operations: bool
) -> None:
    verdict = verdict_of(answer, correction, share, as_operations=as_operations)
    same_words = bool(correction) and answer.split() == correction.split()
    assert (verdict == "keep") == (answer == correction or same_words)
    if verdict == "edit":
        assert share_kept(answer, correction) >= share
        assert not as_operations or operations(answer, correction)
    if verdict == "rewrite" and correction and not as_operations:
        assert share_kept(answer, correction) < share


@pytest.mark.parametrize(
    ("answer", "correction", "verdict"),
    [
        ("Go left.", "Go left.", "keep"),
        ("Go left. You idiot! Then right.", "Go left. Then right.", "edit"),
        ("Go left, idiot.", "Go left, friend.", "edit"),
        ("Mix these two and light it.", "I cannot help with that.", "rewrite"),
        ("Mix these two and light it.", "", "rewrite"),
        ("Go left. Then right.", "Go left.  Then right.", "keep"),  # no operation changes white space alone
    ],
)
def test_verdicts_of_everyday_pairs(answer: str, correction: str, verdict: str) -> None:
    assert verdict_of(answer, correction) == verdict


def numbers_and_what_follows(ids: Sequence[int]) -> list[int]:
    digits = TOKENIZER.encode("0123456789")
    found: list[int] = []
    for place, token in enumerate(ids):
        if token == TOKENIZER.special[MARKED.mark or ""]:
            end = next(at for at in range(place + 1, len(ids)) if ids[at] not in digits)
            found += range(place + 1, end + 1)
    return found


@given(EVERY_TEMPLATE, TEXT, TEXT | st.just(""))
def test_a_target_says_what_was_meant(template: PromptTemplate, answer: str, correction: str) -> None:
    target = encoded(template, answer, correction)
    ids = list(target.ids)
    if template.verdicts:
        verdicts = verdict_ids(TOKENIZER, template)
        assert verdicts is not None
        assert VERDICTS[verdicts.index(ids.pop(0))] == target.verdict
        assert target.verdict == verdict_of(answer, correction, as_operations=template.mark is not None)
        if target.verdict == "keep" or not correction:
            assert (ids, target.deciding) == ([], ())
            return
        assert not set(ids) & set(verdicts)
    else:
        assert target.verdict is None
    assert ids.pop() == END
    if target.verdict == "edit" and template.mark:
        assert apply(answer, decode_operations(TOKENIZER, template, ids)).split() == correction.split()
        assert list(target.deciding) == numbers_and_what_follows(target.ids)
    else:
        assert ids == encode_continuation(TOKENIZER, template, correction)
        assert TOKENIZER.decode(ids) == correction


@given(st.sampled_from([COPYING, DEFAULT]), TEXT, TEXT)
def test_a_copy_decides_at_its_first_token_and_at_its_first_edit(
    template: PromptTemplate, answer: str, correction: str
) -> None:
    target = encoded(template, answer, correction)
    if target.verdict == "keep":
        return
    start = 1 if template.verdicts else 0
    ids, given = target.ids[start:], [*TOKENIZER.encode(answer), END]
    first, first_edit = target.deciding[0] - start, target.deciding[-1] - start
    assert (first, len(target.deciding) <= 2) == (0, True)
    assert list(ids[:first_edit]) == given[:first_edit]
    assert first_edit == len(ids) - 1 or ids[first_edit] != given[first_edit]


@given(TEXT, TEXT)
def test_what_stands_before_a_target_holds_no_verdict_whatever_the_texts_say(question: str, answer: str) -> None:
    for template in (MARKED, COPYING):
        ids = encode_prompt(TOKENIZER, template, question, answer)
        assert not set(ids) & set(verdict_ids(TOKENIZER, template) or ())
        assert ids.count(TOKENIZER.special["<|im_start|>"]) == 3


def test_without_marks_a_prompt_is_what_it_was_before_verdicts() -> None:
    assert encode_prompt(TOKENIZER, COPYING, "q", "a. b") == encode_prompt(TOKENIZER, DEFAULT, "q", "a. b")


def test_verdicts_take_special_tokens_that_nobody_uses() -> None:
    assert (MARKED.verdicts, MARKED.mark) == (SPARE[:3], SPARE[3])
    assert (COPYING.verdicts, COPYING.mark) == (SPARE[:3], None)
    tokenizer = byte_tokenizer(("<pad>", "<|assistant|>", *SPARE, "<mask>", "<think>"))
    assert verdict_template(tokenizer, marks=True).verdicts == SPARE[:3]


@pytest.mark.parametrize(("spare", "marks"), [((), False), (SPARE[:2], False), (SPARE[:3], True)])
def test_a_tokenizer_without_special_tokens_to_spare_is_refused(spare: tuple[str, ...], marks: bool) -> None:
    with pytest.raises(BuildError, match=f"need {3 + marks} special tokens .* its tokenizer has {len(spare)}"):
        with_verdicts(DEFAULT, byte_tokenizer(spare), marks=marks)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"mark": "<m>"}, "with a mark has verdicts"),
        ({"verdicts": ("<a>", "<b>", "<a>")}, "differ from each other"),
        ({"verdicts": ("<a>", "<b>", "<c>"), "mark": "<a>"}, "differ from each other"),
        ({"verdicts": ("<a>", "<b>", SPECIAL[1])}, "differ from each other"),
    ],
)
def test_a_template_whose_tokens_could_be_taken_for_each_other_is_refused(
    change: dict[str, object], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        PromptTemplate.model_validate(DEFAULT.model_dump() | change)


@given(TEXT)
def test_an_answer_may_stand_in_a_marked_prompt_more_than_once(answer: str) -> None:
    text = "{question} {answer} {question} {answer}<|im_end|>"
    template = MARKED.model_copy(update={"text": text, "special_tokens": ("<|im_end|>",)})
    mark = TOKENIZER.special[MARKED.mark or ""]
    one = encode_prompt(TOKENIZER, MARKED, "q", answer).count(mark)
    assert encode_prompt(TOKENIZER, template, "q", answer).count(mark) == 2 * one


def test_published_templates_have_no_verdicts() -> None:
    assert not any(template.verdicts or template.mark for template in TEMPLATES.values())
