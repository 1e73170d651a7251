"""Follows a draft while the model writes, and proposes its next tokens for verification.

The first pass verifies the whole draft. After a rejected token the place in the draft is found again by the latest tokens:
after a sentence that was removed, inserted or moved, the model mostly follows the draft again.
"""

from __future__ import annotations

from collections.abc import Sequence

# A pass over one more token costs this share of a pass over one (int8 on a CPU; benchmarks/README.md).
_COST = 0.065
_FIRST_CREDIT, _CREDIT_PER_TOKEN, _MOST_CREDIT = 1.0, 0.02, 16.0  # in passes over one token
_SAVED = 0.5  # share of the time saved by accepted tokens that is added to the credit
_SHORTEST, _LONGEST = 4, 128  # tokens of a proposal, where a pass over one token is cheap
_SURE = 3  # equal tokens in a row after which a place in the draft is certain


class DraftReader:
    """Follows a draft along the written tokens, and proposes the next ones.

    Its place in the draft depends on the written tokens alone; the length of a proposal does not. Rejected tokens cost time,
    which is paid from a credit that every decoded and every accepted token raises: a sequence that never returns to its draft
    takes a few per cent longer than without one.

    Args:
        draft: Token ids that the sequence is expected to write.
        shortest: Tokens of a proposal after a rejected one.
    """

    def __init__(self, draft: Sequence[int], shortest: int = _SHORTEST) -> None:
        self._draft = list(draft)
        self._shortest = shortest
        self._at = 0
        self._matched = _SURE  # how many of the latest tokens equal those before its place in the draft
        self._latest: tuple[int, ...] = ()
        self._length = shortest
        self._credit = _FIRST_CREDIT
        self._places: dict[tuple[int, ...], list[int]] | None = None

    def propose(self) -> list[int]:
        """Give tokens that may come next, or none."""
        if not self._latest:
            return self._draft
        length = min(self._length, 2 * self._shortest * self._matched, int(self._credit / _COST))
        return self._draft[self._at : self._at + length] if self._matched else []

    @property
    def follows(self) -> bool:
        """Whether there is a draft."""
        return bool(self._draft)

    def rest(self) -> list[int]:
        """Give all of the draft that is left; `[]` where too few of the latest tokens equal its own to be certain."""
        return self._draft[self._at :] if self._matched >= _SURE else []

    def expected(self, accepted: int, end: int | None) -> int | None:
        """Give the draft's token after `accepted` tokens of the latest proposal, or `end` at the draft's end.

        Returns:
            The token; `None` where too few of the latest tokens equal the draft's to be certain of the place.
        """
        if not self._draft or self._matched + accepted < _SURE:
            return None
        at = self._at + accepted
        return self._draft[at] if at < len(self._draft) else end

    def advance(self, tokens: Sequence[int]) -> None:
        """Follow the tokens that were written since."""
        for token in tokens:
            self._latest = (*self._latest[1 - _SURE :], token)
            if self._at < len(self._draft) and self._draft[self._at] == token:
                self._at += 1
                self._matched = min(self._matched + 1, _SURE) if self._matched else 1
            else:
                self._matched = self._find_again()

    def learn(self, proposed: int, accepted: int) -> None:
        """Update credit and length by how many proposed tokens were accepted; one more token was decoded after them."""
        self._credit += _CREDIT_PER_TOKEN + _SAVED * accepted * (1 - _COST) - (proposed - accepted) * _COST
        self._credit = min(max(self._credit, 0.0), _MOST_CREDIT)
        if proposed:
            self._length = min(2 * self._length, _LONGEST) if accepted == proposed else self._shortest

    def _find_again(self) -> int:
        """Move to the place after the latest tokens, and give how many of them match there."""
        for words in range(_SURE, 0, -1):
            place = self._find(self._latest[-words:])
            if place is not None:
                self._at = place
                return words
        return 0

    def _find(self, words: tuple[int, ...]) -> int | None:
        """Find the nearest place after these tokens, preferably a later one. A single token must occur only once."""
        if self._places is None:
            self._places = {}
            for size in (1, 2, 3):
                for end in range(size, len(self._draft)):  # after the last token nothing is left to propose
                    self._places.setdefault(tuple(self._draft[end - size : end]), []).append(end)
        places = self._places.get(words, [])
        if len(words) == 1 and len(places) > 1:
            return None
        ahead = next((place for place in places if place > self._at), None)
        return ahead if ahead is not None else max(places, default=None)
