"""The safeguard against repetition."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from operator import eq

from aligner_middleware.text.words import is_subsequence, letters, sentences, words

_SENTENCE, _LONG_SENTENCE = 4, 12  # words; shorter sentences may come again
_LOOP_WORDS, _LOOP_LETTERS = (8, 100), (40, 40)  # how long a loop is at least, and its period at most
_PASSAGE = 12  # words; a passage of this length does not come twice by chance


def repeats(answer: str, correction: str) -> bool:
    """A correction does not say the same again and again, unless the answer does so as often.

    It looks for runs of words (or of letters, in one long word) that repeat at once, and for sentences, lines and long
    passages that come again anywhere. The numbers of a list are ignored: items that differ only in them are the same.
    """
    before, after = words(answer), words(correction)
    if _loops(letters(answer), letters(correction), *_LOOP_LETTERS):
        return True
    if is_subsequence(after, before):  # only words were left out: repetitions may have moved together
        return False
    return _says_again(answer, correction) or _has_new_passages(before, after) or _loops(before, after, *_LOOP_WORDS)


def _says_again(answer: str, correction: str) -> bool:
    before, after = (
        Counter(sentence.words for sentence in sentences(text) if len(sentence.words) >= _SENTENCE)
        for text in (answer, correction)
    )
    return any(
        count > before[words] and count >= (2 if len(words) >= _LONG_SENTENCE else 3) for words, count in after.items()
    )


def _has_new_passages(before: Sequence[str], after: Sequence[str]) -> bool:
    """Whether a passage that comes twice or more comes more often than it did, whatever stands between."""
    known = Counter(_passages(before))
    return any(count > 1 and count > known[passage] for passage, count in Counter(_passages(after)).items())


def _passages(words: Sequence[str]) -> Iterator[tuple[str, ...]]:
    return zip(*(words[start:] for start in range(_PASSAGE)), strict=False)


def _loops(before: Sequence[str], after: Sequence[str], least: int, longest: int) -> bool:
    """Whether a run of items repeats at once, for longer than any run of that period in `before`.

    All its turns together have at least `least` items. A short run comes at least three times, a long one twice.
    """
    for period in range(1, min(longest, len(after) // 2) + 1):
        again = period if 2 * period >= 3 * least else 2 * period
        run = _longest_run(after, period)
        if run >= max(again, least - period) and run > _longest_run(before, period):
            return True
    return False


def _longest_run(items: Sequence[str], period: int) -> int:
    """Give the greatest number of items in a row that equal the item `period` places before them."""
    same = bytes(map(eq, items[period:], items))
    return max(map(len, same.split(b"\0")))
