"""A long text in pieces that an aligner can read: by paragraphs, or by smaller parts where a paragraph is too long."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from aligner_middleware.text.structure import is_fence

# The ends of parts, from the largest parts to the smallest: the last two cut after 32 characters, and after each one.
_ENDS = (
    re.compile(r"\n"),
    re.compile(r"[.!?…]['\")\]]*\s+|[。！？]"),
    re.compile(r"\s+"),
    re.compile(r"(?s).{1,32}"),
    re.compile(r"(?s)."),
)

# How a later part of an answer is asked about. On pieces of eight long answers the default aligner kept 27 of 34 so, 25
# without what stands before, 17 with 400 characters of it; of an insult added to each it removed 31, 30 and 32.
_CONTINUATION = "{question} Continue after: {before}"
CONTEXT = 100  # characters


def continuation(question: str, before: str) -> str:
    """Give the question about a later part of an answer: the question, and the last words of the text before that part."""
    before = before.rstrip()
    if len(before) > CONTEXT:
        before = before[-CONTEXT:].partition(" ")[2] or before[-CONTEXT:]
    return _CONTINUATION.format(question=question, before=before)


def split(text: str, limit: int, size: Callable[[str], int]) -> list[str]:
    """Cut a text into pieces of at most `limit`.

    Paragraphs stay whole, and so do fenced blocks of code, as long as they fit; as many as fit go into one piece.

    Args:
        text: Any text.
        limit: How large a piece may be.
        size: How large a text is, such as its number of tokens. A piece counts as the sum of its parts.

    Returns:
        The pieces; joined they are the text.
    """
    return list(_packed(_paragraphs(text), _ENDS, limit, size))


def _packed(
    parts: Iterator[str], ends: tuple[re.Pattern[str], ...], limit: int, size: Callable[[str], int]
) -> Iterator[str]:
    piece, held = "", 0
    for part in parts:
        needed = size(part)
        if held + needed <= limit:
            piece, held = piece + part, held + needed
            continue
        if piece:
            yield piece
        if needed > limit and ends:
            *whole, piece = _packed(_parts(part, ends[0]), ends[1:], limit, size)
            yield from whole
            held = size(piece)
        else:
            piece, held = part, needed
    if piece:
        yield piece


def _parts(text: str, end: re.Pattern[str]) -> Iterator[str]:
    start = 0
    for match in end.finditer(text):
        yield text[start : match.end()]
        start = match.end()
    if start < len(text):
        yield text[start:]


def _paragraphs(text: str) -> Iterator[str]:
    """Cut after blank lines that are not inside a fenced block of code."""
    paragraph, fenced, blank = "", False, False
    for line in text.splitlines(keepends=True):
        if blank and not fenced and line.strip():
            yield paragraph
            paragraph = ""
        paragraph += line
        blank = not line.strip()
        if is_fence(line):
            fenced = not fenced
    if paragraph:
        yield paragraph
