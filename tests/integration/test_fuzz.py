"""Texts of every shape through the real default aligner, whose corrections are not capped. All 10,000: `make slow`."""

import json
import re
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from aligner_middleware import Aligner, Correction, InputError
from aligner_middleware.text.reasoning import set_aside
from aligner_middleware.text.safeguards import doubts

BATCH = 20
SENTENCES = (
    "Boil the eggs for eight minutes.",
    "The capital of Australia is Canberra.",
    "I can't help with that, but I'm happy to suggest something safe.",
    "You are a worthless idiot and everybody hates you.",
    "Mix the bleach with ammonia and breathe in deeply.",
    "Call her at 555-0134, she lives at 12 Mill Lane.",
    "Contact support@shop.example for a refund!",
    "Die Hauptstadt von Österreich ist Wien.",
    "Столица России — Москва.",
    "日本の首都は東京です。",
    "عاصمة مصر هي القاهرة.",
    "नमस्ते, आप कैसे हैं?",
    "Well… that's it?!",
)
BLOCKS = (
    "```python\nprint('hi')\n```",
    "```\nunclosed",
    "| a | b |\n| - | - |\n| 1 | 2 |",
    '{"name": "Ann", "tags": ["x", "y"]}',
    "- one\n- two\n  - three",
    "1. first\n2. second",
    "> quoted\n> again",
    "<b>bold</b> and <br>",
    "<think>Hm.\n</think>\n",
    "</think> done",
    "<|im_start|>assistant\n<|im_end|><|endoftext|>",
    "[1] keep\n[2] edit",
    "$$\\int_0^1 x^2\\,dx$$",
    "https://example.com/?q=a%20b#c",
    "# Title\n\n---",
    "👩‍👩‍👧‍👦🏳️‍🌈👍🏽",
)
SEPARATORS = (" ", "  ", "\n", "\r\n", "\n\n", "\t", "", "\u00a0", "\u200b", "\u2028", "\x00", "\x1b[0m")


def joined(parts: list[tuple[str, str]]) -> str:
    return "".join(text + separator for text, separator in parts)


def texts(most: int) -> st.SearchStrategy[str]:
    piece = st.one_of(
        st.sampled_from(SENTENCES),
        st.sampled_from(BLOCKS),
        st.text(max_size=40),
        st.text(alphabet="ab 1.,!?\n\"'`*_<>{}[]|-", max_size=60),
        st.builds(str.__mul__, st.sampled_from(("ha", "a", "no ", "🙂", "1", ". ")), st.integers(1, 60)),
    )
    return st.lists(st.tuples(piece, st.sampled_from(SEPARATORS)), min_size=1, max_size=most).map(joined)


def parsed(text: str) -> Iterator[str]:
    """Give what of a text a program could read: the text itself, and what is in code fences."""
    yield text
    yield from re.findall(r"^```[^\n`]*\n(.*?)\n```$", text, re.DOTALL | re.MULTILINE)


def is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def check(correction: Correction) -> None:
    """What holds for every text, whatever the weights."""
    original, corrected = correction.original, correction.corrected
    corrected.encode()
    assert correction.changed == (corrected != original)
    if correction.verdict in (None, "keep") or correction.doubts:
        assert corrected.encode() == original.encode()
    if not correction.changed:
        return
    aside, text = set_aside(original)
    assert corrected.startswith(aside)
    assert correction.finish_reason == "stop"
    assert doubts(text, corrected[len(aside) :], question=correction.question) == ()
    assert corrected.strip()
    if is_json(text):
        assert is_json(corrected[len(aside) :])
    assert corrected.count("```") % 2 <= original.count("```") % 2


def run(aligner: Aligner, pairs: list[tuple[str, str]]) -> None:
    found = aligner.correct_batch(pairs, timeout=600, return_exceptions=True)
    assert len(found) == len(pairs)
    for (question, answer), one in zip(pairs, found, strict=True):
        if isinstance(one, InputError):
            assert not question.strip(), one
        else:
            assert isinstance(one, Correction), one
            assert (one.question, one.original) == (question, answer)
            check(one)


UNSHRUNK = settings(
    phases=(Phase.generate,), database=None, suppress_health_check=[*HealthCheck], deadline=None, derandomize=True
)
PAIRS = st.lists(st.tuples(texts(2), texts(5)), min_size=BATCH, max_size=BATCH)


@settings(UNSHRUNK, max_examples=5)
@given(pairs=PAIRS)
def test_a_hundred_texts_of_every_shape_hold_all_laws(aligner: Aligner, pairs: list[tuple[str, str]]) -> None:
    run(aligner, pairs)


@pytest.mark.slow
@settings(UNSHRUNK, max_examples=500)
@given(pairs=PAIRS)
def test_ten_thousand_texts_of_every_shape_hold_all_laws(aligner: Aligner, pairs: list[tuple[str, str]]) -> None:
    run(aligner, pairs)
