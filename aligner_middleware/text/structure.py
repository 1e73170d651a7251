"""The parts of a text that programs read: JSON, fenced code, tables and tags; and whether a correction breaks them."""

from __future__ import annotations

import json
import re
from collections import Counter

_DELIMITER = re.compile(r"[ \t>]*\|?(?:[ \t]*:?-+:?[ \t]*\|)+(?:[ \t]*:?-+:?)?[ \t]*")
_CELL_END = re.compile(r"(?<!\\)\|")
_FENCE = re.compile(r"[ \t>]*(?:(?:[-*+]|\d+[.)])[ \t]+)?(`{3,}|~{3,})(.*)")
_FENCE_MARKS = re.compile(r"\s*(```|~~~)")
_FENCED = re.compile(r"(`{3,}|~{3,})[^\n`]*\n(.*)\n[ \t]*\1", re.DOTALL)
_TAG = re.compile(r"<(/?)([a-z][\w:.-]*)(?:\s[^<>]*)?(?<!/)>", re.IGNORECASE)
_VOID = frozenset(
    ("area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "param", "source", "track", "wbr")
)


def structure(answer: str, correction: str) -> bool:
    """JSON, fences, tables and tags that were well formed stay so; a whole table, fence or tag may be removed."""
    return any(breaks(answer, correction) for breaks in (breaks_json, _breaks_fences, _breaks_tables, _breaks_tags))


def is_fence(line: str) -> bool:
    """Say whether a line begins or ends a block of fenced code. A looser test than that of `structure`, to cut texts by."""
    return _FENCE_MARKS.match(line) is not None


def breaks_json(answer: str, correction: str) -> bool:
    """Say whether an answer is an object or array in JSON, or a fence with one, and its correction is not."""
    if is_json(answer):
        return not is_json(correction)
    inside = _inside_of_fence(answer)
    return inside != answer and is_json(inside) and not is_json(_inside_of_fence(correction))


def is_json(text: str) -> bool:
    """Say whether a text is an object or array in JSON; a word or number alone is valid JSON by chance."""
    if not text.lstrip().startswith(("{", "[")):
        return False
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _inside_of_fence(text: str) -> str:
    fenced = _FENCED.fullmatch(text.strip())
    return fenced[2] if fenced else text


def _breaks_fences(answer: str, correction: str) -> bool:
    # A block may also begin after text in its line ("Try this: ```sh"): to Markdown that is none, to many renderers it is.
    return any(broken(correction) and not broken(answer) for broken in (_open_fence, _odd_fences))


def _odd_fences(text: str) -> bool:
    return text.count("```") % 2 == 1


def _open_fence(text: str) -> bool:
    fence = ""
    for match in filter(None, map(_FENCE.fullmatch, text.splitlines())):
        marks, rest = match[1], match[2]
        if not fence:
            fence = marks if "`" not in rest else ""  # ```so``` is code within a line
        elif marks.startswith(fence):
            if rest.strip():
                return True  # another block begins before this one has ended
            fence = ""
    return bool(fence)


def _breaks_tables(answer: str, correction: str) -> bool:
    before, after = _tables(answer), _tables(correction)
    return bool(before) and all(before) and not all(after)


def _tables(text: str) -> list[bool]:
    """Whether all rows have the same number of columns, for each table; rows without a head are a broken table."""
    lines = [line.strip() for line in text.splitlines()]
    regular, end = [], 0
    for at, line in enumerate(lines):
        if at < end:
            continue
        if at + 1 < len(lines) and "|" in line and _DELIMITER.fullmatch(lines[at + 1]):
            end = next((row for row in range(at, len(lines)) if "|" not in lines[row]), len(lines))
            regular.append(len({_columns(row) for row in lines[at:end]}) == 1)
        elif len(line) > 1 and line.startswith("|") and line.endswith("|"):
            regular.append(False)
    return regular


def _columns(row: str) -> int:
    return len(_CELL_END.findall(row.removeprefix("|").removesuffix("|")))


def _breaks_tags(answer: str, correction: str) -> bool:
    before, after = _tags(answer), _tags(correction)
    return any(before[name] and not after.get(name, True) for name in before)


def _tags(text: str) -> dict[str, bool]:
    """Whether each opening tag has its closing one, by the name of the tag."""
    depth: Counter[str] = Counter()
    balanced: dict[str, bool] = {}
    for match in _TAG.finditer(text):
        name = match[2].lower()
        if name not in _VOID:
            depth[name] += -1 if match[1] else 1
            balanced[name] = balanced.get(name, True) and depth[name] >= 0
    return {name: whole and not depth[name] for name, whole in balanced.items()}
