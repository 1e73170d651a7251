"""A draft, read alongside what is said: where does it go on from here, and how far is it worth following?

The first pass verifies the whole draft. Where the model departs from it, the draft is found again by the latest words:
after a sentence that was dropped, put in or moved, the rest is mostly the draft's once more.
"""

from __future__ import annotations

from collections.abc import Sequence

# A pass over one more token costs this share of a pass over one (int8 on a CPU; benchmarks/README.md).
_COST = 0.065
_FIRST_CREDIT, _CREDIT_PER_TOKEN, _MOST_CREDIT = 1.0, 0.02, 16.0  # in passes over one token
_SAVED = 0.5  # of what a right proposal saves, the share that goes to the credit
_SHORTEST, _LONGEST = 4, 128  # tokens looked ahead
_SURE = 3  # words that tell a place in the draft


class DraftReader:
    """Follows a draft along what is written, and proposes how that goes on.

    Where it stands in the draft depends on the written tokens alone. How far it looks ahead does not: looking ahead in vain
    costs time. So that is paid from a credit that every decoded token and every right proposal raises: a sequence that never
    returns to its draft costs a few per cent more than without one.

    Args:
        draft: Token ids that the sequence is expected to write.
    """

    def __init__(self, draft: Sequence[int]) -> None:
        self._draft = list(draft)
        self._at = 0
        self._matched = _SURE  # of the latest tokens, those that stand before its place in the draft
        self._latest: tuple[int, ...] = ()
        self._length = _SHORTEST
        self._credit = _FIRST_CREDIT
        self._places: dict[tuple[int, ...], list[int]] | None = None

    def propose(self) -> list[int]:
        """Give tokens that may come next, or none."""
        if not self._latest:
            return self._draft
        length = min(self._length, 2 * _SHORTEST * self._matched, int(self._credit / _COST))
        return self._draft[self._at : self._at + length] if self._matched else []

    def expected(self, accepted: int, end: int | None) -> int | None:
        """Give the draft's next token once so many of the latest proposal are accepted, or `end` at its end.

        Returns:
            It; `None` where too few of the latest tokens tell that they stand in the draft.
        """
        if not self._draft or self._matched + accepted < _SURE:
            return None
        at = self._at + accepted
        return self._draft[at] if at < len(self._draft) else end

    def advance(self, tokens: Sequence[int]) -> None:
        """Take in further tokens that were written."""
        for token in tokens:
            self._latest = (*self._latest[1 - _SURE :], token)
            if self._at < len(self._draft) and self._draft[self._at] == token:
                self._at += 1
                self._matched = min(self._matched + 1, _SURE) if self._matched else 1
            else:
                self._matched = self._find_again()

    def learn(self, proposed: int, accepted: int) -> None:
        """Take in how many tokens of a proposal were right, before one more token was decoded."""
        self._credit += _CREDIT_PER_TOKEN + _SAVED * accepted * (1 - _COST) - (proposed - accepted) * _COST
        self._credit = min(max(self._credit, 0.0), _MOST_CREDIT)
        if proposed:
            self._length = min(2 * self._length, _LONGEST) if accepted == proposed else _SHORTEST

    def _find_again(self) -> int:
        """Move to the place after the latest words, and give how many of them match there."""
        for words in range(_SURE, 0, -1):
            place = self._find(self._latest[-words:])
            if place is not None:
                self._at = place
                return words
        return 0

    def _find(self, words: tuple[int, ...]) -> int | None:
        """Find the nearest place after these words, the later ones first. A single word must be there only once."""
        if self._places is None:
            self._places = {}
            for size in (1, 2, 3):
                for end in range(size, len(self._draft)):  # after the last words nothing is left to propose
                    self._places.setdefault(tuple(self._draft[end - size : end]), []).append(end)
        places = self._places.get(words, [])
        if len(words) == 1 and len(places) > 1:
            return None
        ahead = next((place for place in places if place > self._at), None)
        return ahead if ahead is not None else max(places, default=None)
