"""A text's words and sentences, as the safeguards compare them: without numbers of lists and marks of lines."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

_LETTER = r"[\w\u0300-\u036f\u0591-\u05c7\u064b-\u065f\u0900-\u0963\u0966-\u0dff\u0e30-\u0e4f]"  # with its marks
_WORD = re.compile(rf"[\u3040-\u30ff\u3400-\u9fff]|{_LETTER}+(?:[.,'’-]{_LETTER}+)*")  # a sign of Han or kana is a word
_MARKER = re.compile(r"^[ \t>#*_]*(?:(?:(?:step[ \t]+)?\d+[.):]|[-*+•])[*_]*[ \t]+)+", re.IGNORECASE | re.MULTILINE)
_BREAK = re.compile(r"\n|(?<=[.!?…।])['\"”’»)\]*_]*\s+|(?<=[。！？])")
_UNENDED = re.compile(r"[\w,(\[{/–—-]$")


@dataclass(frozen=True)
class Sentence:
    """A sentence, or a line that is not one, such as a heading.

    Attributes:
        words: In lower case.
        apart: For each word, whether a punctuation mark separates it from the one before; and `True` for the sentence's end.
        small: Whether it begins with a lower-case letter.
        ended: Whether its last character can end a sentence.
    """

    words: tuple[str, ...]
    apart: tuple[bool, ...]
    small: bool
    ended: bool


def sentences(text: str) -> Iterator[Sentence]:
    """Cut a text into its sentences; those without a word are left out."""
    for sentence in _BREAK.split(_MARKER.sub("", text)):
        if found := list(_WORD.finditer(sentence)):
            gaps = (sentence[one.end() : other.start()] for one, other in pairwise(found))
            yield Sentence(
                words=tuple(word[0].casefold() for word in found),
                apart=(False, *(bool(gap.strip()) for gap in gaps), True),
                small=found[0][0][0].islower(),
                ended=not _UNENDED.search(sentence.rstrip()),
            )


def words(text: str) -> list[str]:
    """List a text's words, in lower case."""
    return [word.casefold() for word in _WORD.findall(_MARKER.sub("", text))]


def letters(text: str) -> list[str]:
    """List a text's characters, without white space."""
    return list("".join(text.split()))


def is_subsequence(some: Sequence[str], every: Sequence[str]) -> bool:
    """Say whether all items of one sequence stand in another in the same order; others may stand between them."""
    rest = iter(every)
    return all(word in rest for word in some)
