"""A byte-level tokenizer without merges, and models whose next token is a known function of the past."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from aligner_middleware import Aligner
from aligner_middleware.engine.model import IntArray
from aligner_middleware.prompt import DEFAULT
from aligner_middleware.tokenizer import Tokenizer

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
END = 2


def tokenizer_json() -> str:
    """A tokenizer with one token a byte, after three special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: place for place, token in enumerate([*SPECIAL, *alphabet])}
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL))
    return backend.to_str()


def byte_tokenizer() -> Tokenizer:
    return Tokenizer(tokenizer_json())


class FakeCache:
    def __init__(self, batch: int) -> None:
        self.rows: list[list[int]] = [[] for _ in range(batch)]

    @property
    def lengths(self) -> IntArray:
        return np.array([len(row) for row in self.rows], dtype=np.int64)

    def trim(self, lengths: IntArray) -> None:
        self.rows = [row[:length] for row, length in zip(self.rows, lengths, strict=True)]

    def select(self, rows: list[int]) -> None:
        self.rows = [self.rows[row] for row in rows]


class FakeModel:
    """Predicts `rule(all tokens so far)`, and counts its passes."""

    max_positions = 4096

    def __init__(self, rule: Callable[[list[int]], int]) -> None:
        self.rule = rule
        self.passes = 0

    def new_cache(self, batch: int, capacity: int) -> FakeCache:
        return FakeCache(batch)

    def forward(self, tokens: IntArray, counts: IntArray, cache: FakeCache, last: int) -> IntArray:
        self.passes += 1
        predicted = np.zeros((len(tokens), last), dtype=np.int64)
        for row, (new, count) in enumerate(zip(tokens, counts, strict=True)):
            for column, token in enumerate(new[:count]):
                cache.rows[row].append(int(token))
                place = last - count + column
                if place >= 0:
                    predicted[row, place] = self.rule(cache.rows[row])
        return predicted


def fake_aligner(correct: Callable[[str, str], str], **options: object) -> Aligner:
    """An aligner whose model reads the default prompt back and writes `correct(question, answer)`."""
    tokenizer = byte_tokenizer()
    start = tokenizer.special["<|im_start|>"]

    def rule(tokens: list[int]) -> int:
        parts: list[list[int]] = []
        for token in tokens:
            if token == start:
                parts.append([])
            else:
                parts[-1].append(token)
        if len(parts) < 3:  # inside the prompt, where no prediction counts
            return END
        question, answer = (tokenizer.decode(part[: part.index(END)]).partition("\n")[2] for part in parts[:2])
        said = parts[2][len(tokenizer.encode("correction\n")) :]
        target = tokenizer.encode(correct(question, answer))
        return target[len(said)] if said == target[: len(said)] and len(said) < len(target) else END

    model = FakeModel(rule)
    aligner = Aligner(model, tokenizer, DEFAULT, [END], name="fake", **options)  # type: ignore[arg-type]
    aligner.fake_model = model  # type: ignore[attr-defined]
    return aligner
