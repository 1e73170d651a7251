"""Edits as operations: the split is exact, what is not named stays, and text never becomes structure."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aligner_middleware.text.edits import Operation, apply, operations, share_kept, split_sentences
from aligner_middleware.text.template import decode_operations, encode_operations, encode_prompt
from tests.fakes import END, SPARE, byte_tokenizer, verdict_template

TOKENIZER = byte_tokenizer(SPARE)
TEMPLATE = verdict_template(TOKENIZER, marks=True)
MARK = TOKENIZER.special[TEMPLATE.mark or ""]

PIECES = ["a", "Word", " ", "  ", ".", "!", "...", "…", "?)", '"', "1. ", "- ", "b) ", "\n", "\r\n", "\r", "\n\n", "\t"]
PIECES += [
    "```",
    "```py\n",
    "~~~\n",
    "``",
    "| a | b |\n",
    "| --- | --- |\n",
    "。",
    "！",
    "好",
    "「",
    "é",
    "\u2028",
    "\x85",
    "\x1c",
]
PIECES += [*SPARE, "<|im_end|>", "12", "2 "]
TEXT = st.lists(st.sampled_from(PIECES), max_size=25).map("".join) | st.text(st.characters(exclude_categories=["Cs"]))


@given(TEXT)
@settings(max_examples=150)
def test_the_split_loses_nothing(text: str) -> None:
    assert "".join(split_sentences(text)) == text


@given(TEXT)
@settings(max_examples=150)
def test_white_space_goes_with_what_stands_before_it(text: str) -> None:
    assert all(piece.strip() for piece in split_sentences(text)[1:])


@given(TEXT, TEXT)
@settings(max_examples=150)
def test_of_a_text_that_grows_all_sentences_but_the_last_stay(text: str, more: str) -> None:
    before, after = split_sentences(text), split_sentences(text + more)
    assert after[: max(0, len(before) - 1)] == before[:-1]


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("", []),
        ("One. Two!  Three", ["One. ", "Two!  ", "Three"]),
        ('He said "no." Then he left.\n', ['He said "no." ', "Then he left.\n"]),
        ("Version 3.5 is out.", ["Version 3.5 is out."]),
        ("1. Boil water. Wait.\n2. Pour.\n", ["1. Boil water. ", "Wait.\n", "2. Pour.\n"]),
        ("- one\n- two\n\nEnd.", ["- one\n", "- two\n\n", "End."]),
        ("First.\r\nSecond.\r\n\r\nThird.", ["First.\r\n", "Second.\r\n\r\n", "Third."]),
        (
            "Do:\n```py\na. b\n\nc! d\n```\nDone. Yes.",
            ["Do:\n", "```py\n", "a. b\n\n", "c! d\n", "```\n", "Done. ", "Yes."],
        ),
        ("| a | b |\n| - | - |\n| 1 | x |\n", ["| a | b |\n", "| - | - |\n", "| 1 | x |\n"]),
        ("No. That is wrong.", ["No. ", "That is wrong."]),
        ("\n\nLate.", ["\n\n", "Late."]),
        ("好。坏！ 真的吗？", ["好。", "坏！ ", "真的吗？"]),
    ],
)
def test_a_text_is_cut_after_each_line_and_each_sentence(text: str, sentences: list[str]) -> None:
    assert split_sentences(text) == sentences


WORD = st.sampled_from(["the", "dog", "cat", "runs", "on", "mat", "over", "never", "idiot", "good", "tree", "3", "x"])
GAP = st.sampled_from([" ", " ", " ", "  ", "\n", "\n\n", "\r\n", "\n- ", "\n2. "])
SENTENCE = st.lists(WORD, min_size=1, max_size=6).map(lambda words: " ".join(words).capitalize() + ".")
HAN = st.text("好坏真的是人", min_size=1, max_size=5).map(lambda text: text + "。")
LATIN = st.lists(st.tuples(SENTENCE, GAP), min_size=1, max_size=8)
CHINESE = st.lists(st.tuples(HAN, st.just("")), min_size=1, max_size=8)


@st.composite
def edited(draw: st.DrawFn, texts: st.SearchStrategy[list[tuple[str, str]]]) -> tuple[str, str]:
    """Draw an answer, and a correction that deletes, replaces and inserts some of its sentences."""
    answer, corrected = draw(texts), []
    for sentence, gap in answer:
        change = draw(st.sampled_from(["keep", "keep", "keep", "delete", "replace", "insert"]))
        new = draw(texts) if change in ("replace", "insert") else []
        corrected += new + ([(sentence, gap)] if change in ("keep", "insert") else [])
    corrected += draw(st.just([]) | texts)
    return joined(answer), joined(corrected)


def joined(sentences: list[tuple[str, str]]) -> str:
    return "".join(sentence + gap for sentence, gap in sentences).strip()


@given(edited(LATIN) | edited(CHINESE))
@settings(max_examples=150)
def test_the_operations_make_the_correction_up_to_white_space(pair: tuple[str, str]) -> None:
    answer, correction = pair
    found = operations(answer, correction)
    if answer.split() == correction.split():
        assert not found
        return
    assert found is not None
    assert apply(answer, found).split() == correction.split()
    assert [sentence for sentence, _ in found] == sorted({sentence for sentence, _ in found})
    assert all(text == text.strip() for _, text in found)


@given(TEXT, TEXT)
@settings(max_examples=150)
def test_of_any_two_texts_the_operations_make_the_correction_or_there_are_none(answer: str, correction: str) -> None:
    found = operations(answer, correction)
    assert found is None or apply(answer, found).split() == correction.split()


@given(TEXT, st.data())
@settings(max_examples=150)
def test_what_is_not_named_comes_back_byte_for_byte(answer: str, data: st.DataObject) -> None:
    pieces = split_sentences(answer)
    texts = st.just("") | SENTENCE
    new = data.draw(st.dictionaries(st.integers(1, len(pieces)), texts, max_size=4)) if pieces else {}
    expected = []
    for number, piece in enumerate(pieces, 1):
        core, gap = piece.rstrip(), piece[len(piece.rstrip()) :]
        if new.get(number):
            core = core[: len(core) - len(core.lstrip())] + new[number]
        if new.get(number) != "":
            expected.append((core, [gap]))
        elif expected:  # beside a sentence that goes, one of the gaps around it stays
            expected[-1][1].append(gap)
    pattern = "".join(f"{re.escape(core)}(?:{'|'.join(map(re.escape, gaps))})" for core, gaps in expected)
    assert re.fullmatch(pattern, apply(answer, [Operation(*item) for item in sorted(new.items())]))


@given(TEXT)
def test_without_operations_the_answer_comes_back(answer: str) -> None:
    assert apply(answer, []) == answer


@pytest.mark.parametrize(
    ("answer", "found", "corrected"),
    [
        ("One. Two. Three.", [(2, "")], "One. Three."),
        ("One.\n\nTwo. Three.", [(1, "")], "Two. Three."),
        ("One. Two.\n\nThree.", [(2, "")], "One.\n\nThree."),  # the wider gap stays
        ("One.\n\nTwo.\nThree.\n", [(3, "")], "One.\n\nTwo.\n"),
        ("One. Two.", [(1, ""), (2, "")], ""),
        ("First.\r\n  Second.\r\nThird.\r\n", [(2, "New.")], "First.\r\n  New.\r\nThird.\r\n"),
        ("1. Boil.\n2. Shout.\n3. Pour.\n", [(2, "2. Wait. Then stir.")], "1. Boil.\n2. Wait. Then stir.\n3. Pour.\n"),
        ("| a | b |\n| - | - |\n| x | y |\n| p | q |\n", [(3, "")], "| a | b |\n| - | - |\n| p | q |\n"),
        ("Run:\n```\n  rm -rf /\n  ls\n```\nDone.", [(3, "rm x")], "Run:\n```\n  rm x\n  ls\n```\nDone."),
        ("Tabs\tand more.\x0bNo!\x0cYes.", [(2, "")], "Tabs\tand more.\x0bYes."),
    ],
)
def test_structure_survives_an_edit(answer: str, found: list[tuple[int, str]], corrected: str) -> None:
    assert apply(answer, [Operation(*one) for one in found]) == corrected


@pytest.mark.parametrize("numbers", [[0], [4], [-1], [2, 1], [2, 2], [1, 3, 4]])
def test_unknown_and_unordered_sentences_are_refused(numbers: list[int]) -> None:
    with pytest.raises(ValueError, match="is not one of 3, or out of order"):
        apply("One. Two. Three.", [Operation(number, "x") for number in numbers])


def test_a_paragraph_put_in_at_the_end_is_one() -> None:
    answer, correction = "One. Two.", "One. Two.\n\nThree."
    assert apply(answer, operations(answer, correction) or []) == correction


NEW = TEXT.map(str.strip)


@given(st.dictionaries(st.integers(1, 10**6), NEW, min_size=1, max_size=5))
def test_operations_come_back_from_their_tokens(new: dict[int, str]) -> None:
    found = [Operation(*item) for item in sorted(new.items())]
    assert decode_operations(TOKENIZER, TEMPLATE, encode_operations(TOKENIZER, TEMPLATE, found)) == found


@given(TEXT, TEXT)
def test_each_sentence_has_one_mark_and_no_text_spells_one(question: str, answer: str) -> None:
    ids = encode_prompt(TOKENIZER, TEMPLATE, question, answer)
    verdicts = [TOKENIZER.special[token] for token in TEMPLATE.verdicts or ()]
    assert ids.count(MARK) == len(split_sentences(answer))
    assert not set(ids) & set(verdicts)
    found = encode_operations(TOKENIZER, TEMPLATE, [Operation(1, question)])
    assert found.count(MARK) == 1


@given(TEXT)
def test_a_marked_answer_reads_as_its_sentences(answer: str) -> None:
    ids = encode_prompt(TOKENIZER, TEMPLATE, "q", answer)
    pieces = split_sentences(answer)
    starts = [at for at, token in enumerate(ids) if token == MARK]
    ends = [*starts[1:], len(ids) - ids[::-1].index(END) - 1][: len(starts)]
    for number, (piece, start, end) in enumerate(zip(pieces, starts, ends, strict=True), 1):
        text = piece.removesuffix(" ")
        assert TOKENIZER.decode(ids[start + 1 : end]) == (f"{number} {text}" if text else str(number))


@pytest.mark.parametrize("text", ["", "no mark", " 1 x"])
def test_what_does_not_begin_with_a_mark_is_no_operation(text: str) -> None:
    with pytest.raises(ValueError, match="begin with a mark"):
        decode_operations(TOKENIZER, TEMPLATE, TOKENIZER.encode(text))


@pytest.mark.parametrize("text", ["", "x", " 1", "1x", "1\nx", "-1 x", "9" * 5000])
def test_what_does_not_begin_with_a_number_is_no_operation(text: str) -> None:
    with pytest.raises(ValueError):
        decode_operations(TOKENIZER, TEMPLATE, [MARK, *TOKENIZER.encode(text)])


@given(edited(LATIN))
def test_the_share_kept_is_one_where_nothing_goes_and_zero_where_all_does(pair: tuple[str, str]) -> None:
    answer, correction = pair
    assert share_kept(answer, f"{answer} {correction}") == 1
    assert share_kept(answer, correction.upper() + " ÄÖ") <= share_kept(answer, answer) == 1
    assert share_kept(answer, "ÄÖ") == 0
    assert 0 <= share_kept(answer, correction) <= 1
