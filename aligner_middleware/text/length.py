"""Safeguards against lost text, such as words from inside a sentence, and against too much new text."""

from __future__ import annotations

from collections import defaultdict

from aligner_middleware.text.words import Sentence, is_subsequence, sentences, words

_SENTENCE = 4  # words; shorter sentences are not compared
_MOST, _MORE = 1.5, 60  # an edit has at most so many times the answer's words, and so many more
_LOSABLE = 40  # words; of a shorter answer one good sentence may be all that can stay
_ADJECTIVES = 3  # up to so many words may be left out anywhere in a sentence


def holes(answer: str, correction: str) -> bool:
    """A correction that only leaves out words leaves out whole sentences, lines or clauses, or a few words together.

    A clause has a punctuation mark on at least one side, or it begins the sentence, and the next word then gets a capital
    letter. Text missing from inside one sentence to inside another is a hole: a model that copies skips between passages that
    begin alike. A sentence that loses its end still ends with a punctuation mark.
    """
    before, after = words(answer), words(correction)
    if len(after) >= len(before) or not is_subsequence(after, before):
        return False
    kept = iter(sentences(answer))
    return not all(any(_is_cut(whole, part) for whole in kept) for part in sentences(correction))


def _is_cut(whole: Sentence, part: Sentence) -> bool:
    """Whether a sentence is another one, without some of its clauses and adjectives."""
    places: dict[str, int] = defaultdict(int)  # sets of places are the bits of a number: fast in a line of any length
    for at, word in enumerate(whole.words):
        places[word] |= 1 << at
    apart = sum(1 << at for at, there in enumerate(whole.apart) if there)
    apart |= whole.small or not part.small  # place 0: after a cut beginning the next word gets a capital
    ends = 1  # places in the whole where the part's next word may stand
    for word in part.words:
        nearby = ends
        for _ in range(_ADJECTIVES):
            nearby |= nearby << 1
        clauses = _from_first(ends & apart) & apart | (_from_first(1) if ends & apart & 1 else 0)
        ends = ((nearby | clauses) & places[word]) << 1
    return any(_may_end(whole, end, part.ended) for end in range(len(whole.apart)) if ends >> end & 1)


def _from_first(places: int) -> int:
    """All places from the first of these on."""
    return -(places & -places)


def _may_end(whole: Sentence, end: int, ended: bool) -> bool:
    """Whether a sentence may lose all words from `end` on; `ended` says whether the rest ends as a sentence does."""
    left = len(whole.words) - end
    if ended:
        return whole.apart[end] or left <= _ADJECTIVES
    return not left or (whole.apart[end] and not whole.ended)


def growth(answer: str, correction: str) -> bool:
    """A correction that keeps most of the answer's sentences is not much longer than the answer. A new text may be longer."""
    before, after = (
        {one.words for one in sentences(text) if len(one.words) >= _SENTENCE} for text in (answer, correction)
    )
    keeps = len(before) >= 3 and 2 * len(before & after) > len(before)
    return keeps and len(words(correction)) > _MOST * len(words(answer)) + _MORE


def loss(answer: str, correction: str) -> bool:
    """A correction that only leaves words out keeps a third of an answer that is not short."""
    before, after = words(answer), words(correction)
    return len(before) >= _LOSABLE and 3 * len(after) < len(before) and is_subsequence(after, before)
