"""Two texts compared word by word: which words were removed, and which were added."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher
from html import escape
from typing import Any, Literal

Kind = Literal["same", "removed", "added"]

_WORD = re.compile(r"\s+|\w+|[^\w\s]")
_STRAY = 2  # up to so many equal words between two changes are part of the change: mostly they are equal by chance
_STYLES: dict[Kind, str] = {"same": "", "removed": "red strike", "added": "bold green"}
_TAGS: dict[Kind, str] = {"same": "", "removed": "del", "added": "ins"}
_MARKS: dict[Kind, tuple[str, str]] = {"same": ("", ""), "removed": ("[-", "-]"), "added": ("{+", "+}")}


@dataclass(frozen=True)
class Change:
    """A run of text that is the same in both texts, or was removed or added.

    Attributes:
        kind: `same`, `removed` or `added`.
        text: The text, with its white space.
    """

    kind: Kind
    text: str

    @property
    def marked(self) -> str:
        """The text, [-like this-] if it was removed, {+like this+} if it was added."""
        before, after = _MARKS[self.kind]
        return f"{before}{self.text}{after}"


@dataclass(frozen=True)
class Diff:
    """The changes between two texts. It can be shown in a terminal (by Rich), in a notebook (as HTML) and as plain text.

    Attributes:
        changes: In order. Those that are `same` or `removed`, joined, are the old text; those that are `same` or
            `added`, the new one.
    """

    changes: tuple[Change, ...]

    @classmethod
    def between(cls, old: str, new: str) -> Diff:
        """Compare two texts."""
        changes: list[Change] = []
        removed = added = ""
        runs = list(compare(old, new))
        for number, (same, before, after) in enumerate(runs):
            between = (removed or added) and number < len(runs) - 1
            if not same or (between and len(before.split()) <= _STRAY):
                removed, added = removed + before, added + after
                continue
            changes += [*_changed(removed, added), Change("same", before)]
            removed = added = ""
        return cls(tuple(changes + _changed(removed, added)))

    @property
    def removed(self) -> list[str]:
        """The removed words."""
        return self._words("removed")

    @property
    def added(self) -> list[str]:
        """The added words."""
        return self._words("added")

    def _words(self, kind: Kind) -> list[str]:
        return [word for change in self.changes if change.kind == kind for word in change.text.split()]

    def __str__(self) -> str:
        """Mark removed text [-like this-] and added text {+like this+}."""
        return "".join(change.marked for change in self.changes)

    def __rich__(self) -> Any:
        """Give a Rich text: removed text red, added text green, both with the marks of `str` as well."""
        from rich.text import Text

        return Text.assemble(*((change.marked, _STYLES[change.kind]) for change in self.changes))

    def html(self) -> str:
        """Give HTML, with removed text in `<del>` and added text in `<ins>`; the texts are escaped."""
        parts = []
        for change in self.changes:
            tag, text = _TAGS[change.kind], escape(change.text)
            parts.append(f"<{tag}>{text}</{tag}>" if tag else text)
        return f'<div class="aligner-diff" style="white-space: pre-wrap">{"".join(parts)}</div>'

    _repr_html_ = html


def _changed(removed: str, added: str) -> list[Change]:
    pairs: list[tuple[Kind, str]] = [("removed", removed), ("added", added)]
    return [Change(kind, text) for kind, text in pairs if text]


def compare(old: str, new: str) -> Iterator[tuple[bool, str, str]]:
    """Cut two texts into runs of words, each with whether it is the same in both.

    Yields:
        Whether the two are the same, and the run in the old and in the new text, either of which may be empty.
    """
    before, after = _WORD.findall(old), _WORD.findall(new)
    shorter = min(len(before), len(after))
    # The matcher is slow, and most of a text is the same: only the part between the first and the last change is matched.
    head = next((at for at in range(shorter) if before[at] != after[at]), shorter)
    tail = next((at for at in range(shorter - head) if before[-1 - at] != after[-1 - at]), shorter - head)
    middle = before[head : len(before) - tail], after[head : len(after) - tail]
    if head:
        yield True, "".join(before[:head]), "".join(after[:head])
    for kind, a, b, c, d in SequenceMatcher(None, *middle, autojunk=False).get_opcodes():
        yield kind == "equal", "".join(middle[0][a:b]), "".join(middle[1][c:d])
    if tail:
        yield True, "".join(before[-tail:]), "".join(after[-tail:])
