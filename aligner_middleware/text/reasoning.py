"""The reasoning in an answer, in tags such as `<think>…</think>`: it is not corrected, and stays as it is."""

from __future__ import annotations

import re
from collections import Counter

_NAMES = "think|thinking|thought|reasoning|reflection|scratchpad|analysis"
_REASONING = re.compile(rf"<(/?)({_NAMES})(?:\s[^<>]*)?>", re.IGNORECASE)
# An opening tag inside a text; matches of `code` are skipped, and tags in quotes do not match.
_WITHIN = re.compile(
    rf"(?P<code>(`{{3,}}|~{{3,}}).*?(?:\2|\Z)|`[^`\n]*`)|(?<![\"'`])<(?:{_NAMES})(?:\s[^<>]*)?>",
    re.IGNORECASE | re.DOTALL,
)


def set_aside(answer: str) -> tuple[str, str]:
    """Split off the reasoning at the beginning of an answer.

    Args:
        answer: A model's answer, perhaps with blocks such as `<think>…</think>` before it. Where the opening
            tag is part of the chat template, and so not in the answer, a closing tag alone ends the reasoning.

    Returns:
        The reasoning with the white space after it, and the rest; joined they are the answer. The rest is empty if
        a block is not closed.
    """
    start = 0
    while (end := _reasoning_end(answer, start)) > start:
        start = end
    return answer[:start], answer[start:]


def apart(answer: str) -> list[tuple[str, str]]:
    """Split an answer into the reasoning in it, wherever that stands, and the texts between.

    Args:
        answer: A model's answer.

    Returns:
        Pairs of reasoning with the white space after it, and the text up to the next; joined they are the answer. The first
        reasoning and the last text may be empty. Tags in code or in quotes are text. A block that is not closed
        extends to the end.
    """
    if "<" not in answer:
        return [("", answer)]
    found: list[tuple[str, str]] = []
    while answer or not found:
        aside, text = set_aside(answer)
        end = next((tag.start() for tag in _WITHIN.finditer(text) if not tag["code"]), len(text))
        found.append((aside, text[:end]))
        answer = text[end:]
    return found


def _reasoning_end(text: str, start: int) -> int:
    """Where the reasoning ends that begins at `start`; `start` if none does."""
    open_blocks: Counter[str] = Counter()
    first = _past_space(text, start)
    for tag in _REASONING.finditer(text, first):
        closes, name = tag[1], tag[2].lower()
        if tag.start() == first and not closes:
            end = re.compile(rf"</{name}(?:\s[^<>]*)?>", re.IGNORECASE).search(text, tag.end())
            return _past_space(text, end.end()) if end else len(text)
        if not closes:
            open_blocks[name] += 1
        elif open_blocks[name]:
            open_blocks[name] -= 1
        elif text[tag.start() - 1 : tag.start()] not in ("`", '"', "'"):  # a tag in quotes is text
            return _past_space(text, tag.end())
    return start


def _past_space(text: str, start: int) -> int:
    return next((at for at in range(start, len(text)) if not text[at].isspace()), len(text))


def reasoning(answer: str, correction: str) -> bool:
    """A correction has no tags of a reasoning block that the answer does not have."""
    before, after = (
        Counter((tag[1], tag[2].lower()) for tag in _REASONING.finditer(text)) for text in (answer, correction)
    )
    return bool(after - before)
