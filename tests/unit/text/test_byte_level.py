"""tiktoken gives the ids that tokenizers gives, or is not used."""

import json
import sys
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from aligner_middleware.text.tokenizer import Tokenizer as Ours
from aligner_middleware.text.tokenizer import tiktoken_is_identical

TEXT = [
    "The quick brown fox isn't as quick as it was in 1999, they're sure of that.",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich; ça va? naïve façade.",
    "def f(x):\n    return x ** 2  # squares\n\n\tif x:\n\t\tpass",
    "日本語の文章です。日本語を書きます。 👩‍👩‍👧 👍🏽 \u200d mixed العربية",
] * 3
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


def trained(kind: str = "gpt2", left_out: Sequence[str] = ()) -> str:
    """Train byte-level BPE on some text."""
    backend = Tokenizer(models.BPE())
    alphabet = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(left_out))
    if kind == "gpt2":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    else:
        split = pre_tokenizers.Split(Regex(LLAMA_3), "isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    if kind == "llama3, NFC":
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=["<|end|>"], show_progress=False
    )
    backend.train_from_iterator(TEXT, trainer)
    described: dict[str, Any] = json.loads(backend.to_str())
    for character in left_out:
        described["model"]["vocab"].pop(character, None)
    return json.dumps(described)


KINDS = {
    "gpt2": trained("gpt2"),
    "llama3": trained("llama3"),
    "llama3, NFC": trained("llama3, NFC"),
    "gpt2 without some bytes": trained("gpt2", ["Ā", "Ć", "ñ", "ò"]),  # 0x00, 0x06, 0xF1, 0xF2
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_found_out_that_they_are_identical(kind: str) -> None:
    assert tiktoken_is_identical(KINDS[kind])


def test_all_of_unicode_has_the_same_ids() -> None:
    kind = KINDS["gpt2 without some bytes"]
    fast, plain = Ours(kind, tiktoken=True), Ours(kind)
    assigned = [*range(0xD800), *range(0xE000, 0x40000), *range(0xE0000, 0xE1000)]
    places = [*assigned, *range(0x40000, sys.maxunicode + 1, 61)]  # the other planes hold nothing, or private use
    for start in range(0, len(places), 512):
        text = "".join(f"a{chr(n)} {chr(n)}1" for n in places[start : start + 512])
        assert fast.encode(text) == plain.encode(text)


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.text(max_size=60) | st.text(alphabet=" \n\t'\x00\x06aAéßst1٣.,日👍🏽\u0301\U00050000", max_size=30))
def test_any_text_has_the_same_ids(kind: str, text: str) -> None:
    fast, plain = Ours(KINDS[kind], tiktoken=True), Ours(KINDS[kind])
    assert fast.encode(text) == plain.encode(text)


def test_a_lone_surrogate_is_an_error_with_both() -> None:
    for tiktoken in (False, True):
        with pytest.raises(UnicodeEncodeError):
            Ours(KINDS["gpt2"], tiktoken=tiktoken).encode("a\ud800")


def test_text_spelling_a_special_token_stays_text() -> None:
    ids = Ours(KINDS["gpt2"], tiktoken=True).encode("<|end|>")
    assert Ours(KINDS["gpt2"]).special["<|end|>"] not in ids


def test_tiktoken_is_not_used_where_merges_alone_say_more_than_ranks() -> None:
    described = json.loads(trained())
    vocab = described["model"]["vocab"]
    merges = [["b", "c"], ["a", "b"], ["ab", "c"]]  # "abc" is a token that BPE never makes of a, b, c
    described["model"] |= {"merges": merges, "vocab": {t: n for n, t in enumerate(k for k in vocab if len(k) == 1)}}
    described["model"]["vocab"] |= {"".join(pair): 300 + n for n, pair in enumerate(merges)}
    assert not tiktoken_is_identical(json.dumps(described))


def test_another_kind_of_tokenizer_stays_with_tokenizers() -> None:
    described = json.loads(trained())
    described["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": True}
    assert not tiktoken_is_identical(json.dumps(described))
