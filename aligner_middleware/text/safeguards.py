"""Is a correction doubtful, whatever the weights? Then the original answer goes on instead.

A small model fails at copying: it loops, skips, breaks what a program reads, or slips into another script. Each safeguard
is a law about two texts, without any model. None of them knows whether a sound correction is also a good one.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import eq

_NAMES = "think|thinking|thought|reasoning|reflection|scratchpad|analysis"
_REASONING = re.compile(rf"<(/?)({_NAMES})(?:\s[^<>]*)?>", re.IGNORECASE)
# Where reasoning begins inside of a text, unless the tag is in code or in quotes.
_WITHIN = re.compile(
    rf"(?P<code>(`{{3,}}|~{{3,}}).*?(?:\2|\Z)|`[^`\n]*`)|(?<![\"'`])<(?:{_NAMES})(?:\s[^<>]*)?>",
    re.IGNORECASE | re.DOTALL,
)
_LETTER = r"[\w\u0300-\u036f\u0591-\u05c7\u064b-\u065f\u0900-\u0963\u0966-\u0dff\u0e30-\u0e4f]"  # with its marks
_WORD = re.compile(rf"[\u3040-\u30ff\u3400-\u9fff]|{_LETTER}+(?:[.,'’-]{_LETTER}+)*")  # a sign of Han or kana is a word
_MARKER = re.compile(r"^[ \t>#*_]*(?:(?:(?:step[ \t]+)?\d+[.):]|[-*+•])[*_]*[ \t]+)+", re.IGNORECASE | re.MULTILINE)
_BREAK = re.compile(r"\n|(?<=[.!?…।])['\"”’»)\]*_]*\s+|(?<=[。！？])")
_UNENDED = re.compile(r"[\w,(\[{/–—-]$")

_SENTENCE, _LONG_SENTENCE = 4, 12  # words; a shorter sentence may well be said again
_LOOP_WORDS, _LOOP_LETTERS = (8, 100), (40, 40)  # how long a loop is at least, and its period at most
_PASSAGE = 12  # words; so long a passage is not said again by chance
_MOST, _MORE = 1.5, 60  # an edit has at most so many times the answer's words, and so many more
_LOSABLE = 40  # words; of a shorter answer one good sentence may be all that can stay
_ADJECTIVES = 3  # so few words may go from anywhere in a sentence

_DELIMITER = re.compile(r"[ \t>]*\|?(?:[ \t]*:?-+:?[ \t]*\|)+(?:[ \t]*:?-+:?)?[ \t]*")
_CELL_END = re.compile(r"(?<!\\)\|")
_FENCE = re.compile(r"[ \t>]*(?:(?:[-*+]|\d+[.)])[ \t]+)?(`{3,}|~{3,})(.*)")
_FENCED = re.compile(r"(`{3,}|~{3,})[^\n`]*\n(.*)\n[ \t]*\1", re.DOTALL)
_TAG = re.compile(r"<(/?)([a-z][\w:.-]*)(?:\s[^<>]*)?(?<!/)>", re.IGNORECASE)
_VOID = frozenset(
    ("area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "param", "source", "track", "wbr")
)

_QUOTES = dict.fromkeys(map(ord, "'\"`´‘’‚‛“”„‟«»‹›′″＇＂"))
_DASHES = re.compile(r"[-‐‑‒–—―−]+")
_SCRIPTS = {
    **{name: name for name in ("LATIN", "CYRILLIC", "GREEK", "HANGUL", "ARABIC", "HEBREW", "DEVANAGARI", "THAI")},
    **{"CJK": "HAN", "HIRAGANA": "KANA", "KATAKANA": "KANA", "KATAKANA-HIRAGANA": "KANA"},
}
_UNFIT = frozenset(("Cc", "Cn", "Co", "Cs"))  # control, unassigned, private use, half a surrogate pair


def doubts(answer: str, correction: str, *, cut_off: bool = False, question: str = "") -> tuple[str, ...]:
    """Name the safeguards that object to a correction.

    Args:
        answer: What the aligner read.
        correction: What it wrote in its place.
        cut_off: Whether the token limit ended the correction; the text does not tell.
        question: What the answer answers. A script that it uses is not foreign.

    Returns:
        `cut_off` and names from `SAFEGUARDS`, in that order; none if the correction may go on. A correction that is the
        answer has none.
    """
    if correction == answer:
        return ()
    names = ["cut_off"] if cut_off else []
    for name, objects in SAFEGUARDS.items():
        known = f"{question}\n{answer}" if objects is script else answer
        if objects(known, correction):
            names.append(name)
    return tuple(names)


def set_aside(answer: str) -> tuple[str, str]:
    """Split off the reasoning at the beginning of an answer, which goes on as it is.

    Args:
        answer: A model's answer, perhaps with blocks such as `<think>…</think>` before it. Where a chat template ate the
            opening tag, a closing tag alone ends the reasoning.

    Returns:
        The reasoning with the white space after it, and the rest; joined they are the answer. A block that is not closed
        leaves no rest.
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
        reasoning and the last text may be empty. Tags in code or in quotes are only spoken about. A block that is not
        closed is all the rest.
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
        elif text[tag.start() - 1 : tag.start()] not in ("`", '"', "'"):  # in quotes it is only spoken about
            return _past_space(text, tag.end())
    return start


def _past_space(text: str, start: int) -> int:
    return next((at for at in range(start, len(text)) if not text[at].isspace()), len(text))


def empty(answer: str, correction: str) -> bool:
    """A correction says something."""
    return not correction.strip()


def reasoning(answer: str, correction: str) -> bool:
    """A correction has no tags of a reasoning block that the answer does not have."""
    before, after = (
        Counter((tag[1], tag[2].lower()) for tag in _REASONING.finditer(text)) for text in (answer, correction)
    )
    return bool(after - before)


def repeats(answer: str, correction: str) -> bool:
    """A correction does not say the same again and again, unless the answer does so as often.

    The same is a run of words (or of letters, in one long word) that comes again at once, or a sentence, line or long passage
    anywhere. The numbers of a list are not read: items that differ only in theirs are the same.
    """
    before, after = _words(answer), _words(correction)
    if _loops(_letters(answer), _letters(correction), *_LOOP_LETTERS):
        return True
    if _in_order(after, before):  # words were left out, no more: what stood apart may stand together now
        return False
    return _says_again(answer, correction) or _has_new_passages(before, after) or _loops(before, after, *_LOOP_WORDS)


def _says_again(answer: str, correction: str) -> bool:
    before, after = (
        Counter(sentence.words for sentence in _sentences(text) if len(sentence.words) >= _SENTENCE)
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


def _words(text: str) -> list[str]:
    return [word.casefold() for word in _WORD.findall(_MARKER.sub("", text))]


def _letters(text: str) -> list[str]:
    return list("".join(text.split()))


def _loops(before: Sequence[str], after: Sequence[str], least: int, longest: int) -> bool:
    """Whether the same items come again at once, longer than any with their period did before.

    Together they are `least` items or more; a few come three times, many twice.
    """
    for period in range(1, min(longest, len(after) // 2) + 1):
        again = period if 2 * period >= 3 * least else 2 * period
        run = _longest_run(after, period)
        if run >= max(again, least - period) and run > _longest_run(before, period):
            return True
    return False


def _longest_run(items: Sequence[str], period: int) -> int:
    """How many items in a row are the one that stands `period` before."""
    same = bytes(map(eq, items[period:], items))
    return max(map(len, same.split(b"\0")))


def structure(answer: str, correction: str) -> bool:
    """What a program could read in the answer it can read in the correction; a whole table, fence or tag may go."""
    return any(breaks(answer, correction) for breaks in (breaks_json, _breaks_fences, _breaks_tables, _breaks_tags))


def breaks_json(answer: str, correction: str) -> bool:
    """Say whether an answer is an object or array in JSON, or a fence with one, and its correction is not."""
    if is_json(answer):
        return not is_json(correction)
    inside = _inside_of_fence(answer)
    return inside != answer and is_json(inside) and not is_json(_inside_of_fence(correction))


def is_json(text: str) -> bool:
    """Say whether a text is an object or array in JSON; a word or number alone is that by chance."""
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
    return _open_fence(correction) and not _open_fence(answer)


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
    """Whether all rows have the same number of columns, for each table; rows without a head are a broken one."""
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


def spacing(answer: str, correction: str) -> bool:
    """A correction changes more than white space and the form of quotes, dashes and dots."""
    return _without_form(answer) == _without_form(correction)


def _without_form(text: str) -> str:
    return _DASHES.sub("-", "".join(text.split()).translate(_QUOTES).replace("…", "..."))


def holes(answer: str, correction: str) -> bool:
    """A correction that only leaves out words leaves out whole sentences, lines or clauses, or a few words together.

    A clause has a punctuation mark on one side at least, or begins the sentence and leaves a capital letter there. What goes
    from the inside of one sentence to the inside of another is a skip between passages that begin alike; what goes from the
    end of a sentence leaves it ended.
    """
    before, after = _words(answer), _words(correction)
    if len(after) >= len(before) or not _in_order(after, before):
        return False
    kept = iter(_sentences(answer))
    return not all(any(_is_cut(whole, part) for whole in kept) for part in _sentences(correction))


def _in_order(some: Sequence[str], words: Sequence[str]) -> bool:
    rest = iter(words)
    return all(word in rest for word in some)


def _is_cut(whole: _Sentence, part: _Sentence) -> bool:
    """Whether a sentence is another one, without some of its clauses and adjectives."""
    places: dict[str, int] = defaultdict(int)  # sets of places are the bits of a number: fast in a line of any length
    for at, word in enumerate(whole.words):
        places[word] |= 1 << at
    apart = sum(1 << at for at, there in enumerate(whole.apart) if there)
    apart |= whole.small or not part.small  # place 0: whoever cuts a beginning writes the next word with a capital
    ends = 1  # where the whole may go on for the next word of the part
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


def _may_end(whole: _Sentence, end: int, ended: bool) -> bool:
    """Whether all words from `end` on may go from a sentence, for one that is `ended` or not."""
    left = len(whole.words) - end
    if ended:
        return whole.apart[end] or left <= _ADJECTIVES
    return not left or (whole.apart[end] and not whole.ended)


def growth(answer: str, correction: str) -> bool:
    """A correction that keeps most of the answer's sentences is not much longer than the answer; another text may be."""
    before, after = (
        {one.words for one in _sentences(text) if len(one.words) >= _SENTENCE} for text in (answer, correction)
    )
    keeps = len(before) >= 3 and 2 * len(before & after) > len(before)
    return keeps and len(_words(correction)) > _MOST * len(_words(answer)) + _MORE


def loss(answer: str, correction: str) -> bool:
    """A correction that only leaves words out keeps a third of an answer that is not short."""
    before, after = _words(answer), _words(correction)
    return len(before) >= _LOSABLE and 3 * len(after) < len(before) and _in_order(after, before)


def script(answer: str, correction: str) -> bool:
    """A correction has letters of no other script than the answer, and no signs that are not text."""
    before, after = _scripts(answer), _scripts(correction)
    if "KANA" in before:
        before.add("HAN")  # Japanese has both
    return not after <= before


def _scripts(text: str) -> set[str]:
    """The scripts of the letters; a sign that is not text is its own."""
    found = set()
    for sign in set(text):
        if sign == "\N{REPLACEMENT CHARACTER}" or (unicodedata.category(sign) in _UNFIT and not sign.isspace()):
            found.add(sign)
        elif sign.isalpha():
            name = unicodedata.name(unicodedata.normalize("NFKC", sign)[0], "OTHER")
            found.add(_SCRIPTS.get(name.split()[0], "OTHER"))
    return found


@dataclass(frozen=True)
class _Sentence:
    """A sentence, or a line that is none.

    Attributes:
        words: In lower case.
        apart: Whether a punctuation mark parts each word from the one before it; at last, as if one ended the sentence.
        small: Whether it begins with a small letter.
        ended: Whether its last sign can end a sentence.
    """

    words: tuple[str, ...]
    apart: tuple[bool, ...]
    small: bool
    ended: bool


def _sentences(text: str) -> Iterator[_Sentence]:
    for sentence in _BREAK.split(_MARKER.sub("", text)):
        if found := list(_WORD.finditer(sentence)):
            gaps = (sentence[one.end() : other.start()] for one, other in pairwise(found))
            yield _Sentence(
                words=tuple(word[0].casefold() for word in found),
                apart=(False, *(bool(gap.strip()) for gap in gaps), True),
                small=found[0][0][0].islower(),
                ended=not _UNENDED.search(sentence.rstrip()),
            )


# By name, in the order in which `doubts` gives them. Each takes the answer and the correction and says whether it objects.
SAFEGUARDS: dict[str, Callable[[str, str], bool]] = {
    "repeats": repeats,
    "structure": structure,
    "spacing": spacing,
    "holes": holes,
    "growth": growth,
    "loss": loss,
    "script": script,
    "empty": empty,
    "reasoning": reasoning,
}
