"""Byte-level BPE by tiktoken, which encodes several times faster than `tokenizers` and gives the same ids.

A `tokenizer.json` lists merges: pairs of tokens to join, in order. tiktoken has no list of pairs: it joins any two neighbours
whose bytes together are a token, the token of the lowest rank first. Both give the same ids if BPE turns the text of each
token into that one token. `identical` checks this, and compares the two encoders on characters from all of Unicode. It takes
some seconds, so it runs when an aligner is built, which records the result (`Artifact.tiktoken`).
"""

from __future__ import annotations

import json
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator
from typing import Any

from tokenizers import Tokenizer as Backend

# The pattern by which GPT-2, and `ByteLevel` in tokenizers, split text.
_GPT_2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LONGEST = 50_000  # characters; a longer run without a break costs tiktoken the square of its length

Encode = Callable[[str], list[int]]


def byte_level_encoder(description: dict[str, Any], otherwise: Encode) -> Encode | None:
    """Make an encoder by tiktoken.

    Args:
        description: A `tokenizer.json` that gives no special tokens for text.
        otherwise: Encodes the texts that tiktoken cannot encode.

    Returns:
        `None` if the description is not of byte-level BPE with one regular expression.
    """
    pattern, normal_form = _pattern(description.get("pre_tokenizer")), _normal_form(description.get("normalizer"))
    model = description["model"]
    if pattern is None or normal_form is None or model.get("type") != "BPE" or description.get("added_tokens"):
        return None
    import tiktoken

    ranks, ids = _ranks(model)
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if any(0x80 <= byte < 0xC0 for byte in missing):  # part of too many characters: most texts would go to `otherwise`
        return None
    ranks |= {bytes([byte]): len(ranks) + place for place, byte in enumerate(missing)}  # tiktoken requires all bytes
    encoding = tiktoken.Encoding("aligner", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    left_out = re.compile("|".join(map(_characters, missing)) or "(?!)")

    def encode(text: str) -> list[int]:
        if len(text) > _LONGEST or left_out.search(text):
            return otherwise(text)
        normed = unicodedata.normalize(normal_form, text) if normal_form else text
        return [ids[rank] for rank in encoding.encode_ordinary(normed)]

    return encode


def identical(description: dict[str, Any], encode: Encode, reference: Encode) -> bool:
    """Whether an encoder gives the ids of another one, for every text."""
    backend = Backend.from_str(json.dumps(description))
    vocab = description["model"]["vocab"]
    merged = {joined(merge) for merge in description["model"]["merges"]}
    if any([token.id for token in backend.model.tokenize(text)] != [vocab[text]] for text in merged):
        return False
    return all(encode(text) == reference(text) for text in _characters_in_use())


def _characters_in_use() -> Iterator[str]:
    """Characters after a letter, after a space, and before a digit: all of the first two planes, every 64th of the others."""
    for start in range(0, sys.maxunicode + 1, 256):
        codes = range(start, start + 256, 1 if start < 0x20000 else 64)
        characters = [chr(code) for code in codes if not 0xD800 <= code < 0xE000]
        yield "".join(f"a{character} {character}1" for character in characters)


def _pattern(splitter: dict[str, Any] | None) -> str | None:
    """Find the regular expression that text is split by before its bytes are joined."""
    parts = splitter.get("pretokenizers", [splitter]) if splitter else []
    match parts:
        case [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            return _GPT_2
        case [
            {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ]:
            return pattern
    return None


def _normal_form(normalizer: dict[str, Any] | None) -> Any:
    """Find the Unicode normal form, "" for none; `None` if the normaliser does more than that."""
    if normalizer is None or (normalizer["type"] == "Sequence" and not normalizer["normalizers"]):
        return ""
    return normalizer["type"] if normalizer["type"] in ("NFC", "NFKC", "NFD", "NFKD") else None


def _ranks(model: dict[str, Any]) -> tuple[dict[bytes, int], list[int]]:
    """Number tokens in the order of their merges: the rank of each by its bytes, and the id of each rank."""
    characters = alphabet()
    byte_of = {character: byte for byte, character in characters.items()}
    tokens = [character for character in characters.values() if character in model["vocab"]]
    tokens += dict.fromkeys(joined(merge) for merge in model["merges"])
    ranks = {bytes(byte_of[character] for character in token): rank for rank, token in enumerate(tokens)}
    return ranks, [model["vocab"][token] for token in tokens]


def _characters(byte: int) -> str:
    """Write a regular expression for the characters that begin with a byte in UTF-8."""
    if byte < 0x80:
        return re.escape(chr(byte))
    bits = 6 if byte < 0xE0 else 12 if byte < 0xF0 else 18  # in the bytes after the first
    first = (byte & (0x1F, 0x0F, 0x07)[bits // 6 - 1]) << bits
    last = min(first + (1 << bits) - 1, sys.maxunicode)
    return f"[{chr(first)}-{chr(last)}]" if 0x7F < first <= last else "(?!)"


def alphabet() -> dict[int, str]:
    """Give the character that stands for each byte in a byte-level vocabulary: itself where it can be printed."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {byte: chr(256 + place) for place, byte in enumerate(hidden)}


def joined(merge: str | list[str]) -> str:
    """Join the two tokens of a merge, in either way that `tokenizer.json` writes one."""
    return "".join(merge.split(" ", 1) if isinstance(merge, str) else merge)
