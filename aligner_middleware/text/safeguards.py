"""Detects doubtful corrections. If a safeguard objects, the original answer is used.

A small model makes mistakes when it copies: it loops, skips text, breaks JSON or code, or slips into another script. A
safeguard compares two texts, without any model. Its docstring states the rule that a sound correction keeps; the function
says whether the correction breaks it. No safeguard knows whether a sound correction is also a good one.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

from aligner_middleware.text.length import growth, holes, loss
from aligner_middleware.text.reasoning import reasoning
from aligner_middleware.text.repetition import repeats
from aligner_middleware.text.structure import structure

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
        answer: The answer.
        correction: The text that the aligner wrote in its place.
        cut_off: Whether the token limit ended the correction, which its text does not show.
        question: The answer's question. The correction may use its scripts.

    Returns:
        `cut_off` and names from `SAFEGUARDS`, in that order; none if the correction may be used. A correction that equals
        the answer has none.
    """
    if correction == answer:
        return ()
    names = ["cut_off"] if cut_off else []
    for name, objects in SAFEGUARDS.items():
        known = f"{question}\n{answer}" if objects is script else answer
        if objects(known, correction):
            names.append(name)
    return tuple(names)


def empty(answer: str, correction: str) -> bool:
    """A correction says something."""
    return not correction.strip()


def spacing(answer: str, correction: str) -> bool:
    """A correction changes more than white space and the form of quotes, dashes and dots."""
    return _without_form(answer) == _without_form(correction)


def _without_form(text: str) -> str:
    return _DASHES.sub("-", "".join(text.split()).translate(_QUOTES).replace("…", "..."))


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
