"""An edit as operations on sentences: each names a sentence of the answer and gives its new text, or none.

Sentences that are not named come back byte for byte, because they are never copied. The split is exact: the sentences joined
are the text. `operations` derives operations from an answer and its correction, for training; `apply` applies those that a
model wrote.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from itertools import accumulate
from typing import NamedTuple

from aligner_middleware.text.structure import is_fence

_ITEM = re.compile(r"\s*\(?(?:\d{1,3}|[a-zA-Z]|[ivx]{1,4})[.)]\s+")  # "1. ", "b) " at the beginning of a line
_RUN_ON = re.compile(r"(?<=[a-z,;:]) +(?=[A-Z])")  # where a sentence may begin after one that lacks its end mark
_MOST = 4  # an edit that names more sentences has not named one too many; nor is a sentence cut at more places
_COPIED = 0.5  # share of a new text's words that stand in other sentences, from which it is a copy of them
_END = re.compile(r"[.!?…]+['\"’”)\]*_]*\s+|[。！？]+\s*")


class Operation(NamedTuple):
    """A new text for one sentence, or its removal.

    Attributes:
        sentence: Its number, from 1.
        text: Its new text, without white space around it; empty to remove the sentence.
    """

    sentence: int
    text: str


def split_sentences(text: str) -> list[str]:
    """Cut a text after each line and each sentence; white space belongs to the piece before it.

    Lines of fenced code stay whole. The pieces joined are the text. While a text grows, all its pieces but the last stay the
    same.
    """
    return [piece for piece, _ in _pieces(text)]


def whole_sentences(text: str) -> str:
    """Give the beginning of a growing text that can be decided on: all sentences but the last, and no half of any code.

    The last one may still grow. So may the white space after the others, which is left out.
    """
    pieces = _pieces(text)[:-1]
    while pieces and pieces[-1][1]:
        pieces.pop()
    return "".join(piece for piece, _ in pieces).rstrip()


def count_sentences(text: str, length: int) -> int:
    """Count the sentences that begin within the first `length` characters of a text."""
    starts = accumulate(map(len, split_sentences(text)), initial=0)
    return sum(start < length for start in starts)


def _pieces(text: str) -> list[tuple[str, bool]]:
    """Give the pieces of `split_sentences`, and whether a block of fenced code is open after each."""
    pieces: list[tuple[str, bool]] = []
    fenced = False
    for line in text.splitlines(keepends=True):
        if is_fence(line):
            fenced = not fenced
            pieces.append((line, fenced))
        elif not line.strip() and pieces:
            pieces[-1] = (pieces[-1][0] + line, fenced)
        elif fenced:
            pieces.append((line, fenced))
        else:
            pieces += [(piece, False) for piece in _sentences(line)]
    return pieces


def _sentences(line: str) -> list[str]:
    item = _ITEM.match(line)
    start, pieces = 0, []
    for match in _END.finditer(line, item.end() if item else 0):
        pieces.append(line[start : match.end()])
        start = match.end()
    return [*pieces, line[start:]] if start < len(line) else pieces


def apply(answer: str, operations: Sequence[Operation]) -> str:
    """Give the answer with its sentences replaced or removed.

    A sentence keeps the white space around it. Of the gaps before and after a removed sentence the wider one stays.

    Raises:
        ValueError: If the operations name a sentence that is not there, or are not in order.
    """
    texts = [(piece.rstrip(), _gap(piece)) for piece in split_sentences(answer)]
    new: dict[int, str] = {}
    for sentence, text in operations:
        if not 1 <= sentence <= len(texts) or sentence <= max(new, default=0):
            raise ValueError(f"sentence {sentence} is not one of {len(texts)}, or out of order")
        new[sentence] = text
    kept: list[tuple[str, str]] = []
    for number, (core, gap) in enumerate(texts, 1):
        core = _replaced(core, new[number]) if number in new else core
        if core or number not in new:
            kept.append((core, gap))
        elif kept and gap.count("\n") > kept[-1][1].count("\n"):
            kept[-1] = (kept[-1][0], gap)
    if len(texts) in new and not new[len(texts)] and kept:  # the white space at the text's end stays
        kept[-1] = (kept[-1][0], texts[-1][1])
    return "".join(core + gap for core, gap in kept)


def _replaced(core: str, text: str) -> str:
    return core[: len(core) - len(core.lstrip())] + text if text else ""


def operations(answer: str, correction: str) -> list[Operation] | None:
    """Find the operations that make a correction of an answer, apart from white space.

    Returns:
        The operations in order; `None` where none give the correction.
    """
    pieces, wanted = split_sentences(answer), split_sentences(correction)
    cores, targets = [piece.strip() for piece in pieces], [piece.strip() for piece in wanted]
    new: dict[int, str] = {}
    for tag, start, end, first, last in SequenceMatcher(None, cores, targets, autojunk=False).get_opcodes():
        if tag == "insert" and cores:
            at = max(start - 1, 0)
            before = "" if start == 0 else new.get(at, cores[at]) + (_gap(pieces[at]) or _gap(wanted[first - 1]))
            new[at] = (before + "".join(wanted[first:last]) + ("" if start else cores[0])).strip()
        elif tag == "replace" and end - start == last - first:
            new |= dict(zip(range(start, end), targets[first:last], strict=True))
        elif tag in ("replace", "delete"):
            new |= dict.fromkeys(range(start, end), "")
            new[start] = "".join(wanted[first:last]).strip()
    found = [Operation(at + 1, text) for at, text in sorted(new.items())]
    return found if found and apply(answer, found).split() == correction.split() else None


def smaller_edits(answer: str, found: Sequence[Operation]) -> list[list[Operation]]:
    """Give edits that change less of an answer than this one, and may suffice.

    Of several sentences each may be the only bad one, or, where all are removed, be named without need. A sentence that
    begins in lower case and is removed may hold the next one, if its end mark is missing: that stays.
    """
    if len(found) == 1 and not found[0].text:
        sentence = found[0].sentence
        core = split_sentences(answer)[sentence - 1].strip()
        starts = [match.end() for match in _RUN_ON.finditer(core)] if core[:1].islower() else []
        return [[Operation(sentence, core[start:])] for start in starts[:_MOST]]
    if not 1 < len(found) <= _MOST:
        return []
    pieces = split_sentences(answer)
    alone = [[_alone(one, "".join(pieces[other.sentence - 1] for other in found if other is not one))] for one in found]
    removes = len(found) > 2 and not any(one.text for one in found)
    return [*alone, *([one for one in found if one is not other] for other in found if removes)]


def _alone(one: Operation, others: str) -> Operation:
    """Give an operation without the others; a new text that is taken from their sentences would then be there twice."""
    return Operation(one.sentence, "") if share_kept(one.text, others) >= _COPIED else one


def _gap(piece: str) -> str:
    """Give the white space at the end of a piece."""
    return piece[len(piece.rstrip()) :]


def share_kept(answer: str, correction: str) -> float:
    """Say which share of an answer's words stands in the correction, in the same order; 0 to 1."""
    words = answer.split()
    blocks = SequenceMatcher(None, words, correction.split(), autojunk=False).get_matching_blocks()
    return sum(block.size for block in blocks) / max(1, len(words))
