"""Text stays text: no question or answer becomes structure, and everything comes back as it was."""

import json
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models

from aligner_middleware import ArtifactError, BuildError
from aligner_middleware.text.edits import split_sentences
from aligner_middleware.text.published import TEMPLATES, resolve_template
from aligner_middleware.text.template import DEFAULT, encode_continuation, encode_prompt
from aligner_middleware.text.tokenizer import Tokenizer
from tests.fakes import SPARE, SPECIAL, byte_tokenizer, tokenizer_json, verdict_template

TOKENIZER = byte_tokenizer()
SPARING = byte_tokenizer(SPARE)
TEXT = st.text(st.characters(exclude_categories=["Cs"])) | st.lists(
    st.sampled_from([*SPECIAL, *SPARE, "<s>", "[INST]", "\n", "question", "answer\n", "{answer}", "\x00", "é"])
).map("".join)


@given(TEXT)
def test_encoding_and_decoding_gives_the_text_back(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@given(TEXT)
def test_a_long_text_is_encoded_as_a_short_one(text: str) -> None:
    with patch("aligner_middleware.text.tokenizer._LONG", 0):
        as_long = TOKENIZER.encode(text)
    assert as_long == TOKENIZER.encode(text)


@given(TEXT)
def test_streamed_decoding_gives_the_same_text(text: str) -> None:
    stream = TOKENIZER.decode_stream()
    assert "".join([stream.add([token]) for token in TOKENIZER.encode(text)]) + stream.rest() == text


@given(TEXT)
def test_text_never_becomes_a_special_token(text: str) -> None:
    for tokenizer in (TOKENIZER, SPARING):
        assert not set(tokenizer.encode(text)) & set(tokenizer.special.values())


def test_what_the_vocabulary_lacks_is_left_out_and_becomes_no_special_token() -> None:
    description = json.loads(tokenizer_json())
    model = description["model"]
    del model["vocab"]["x"]
    model["unk_token"] = SPECIAL[0]
    tokenizer = Tokenizer(json.dumps(description))
    assert tokenizer.decode(tokenizer.encode("axb")) == "ab"
    assert not set(tokenizer.encode("axb")) & set(tokenizer.special.values())


@given(TEXT, TEXT)
def test_the_prompt_has_the_structure_of_its_template_whatever_the_texts_say(question: str, answer: str) -> None:
    ids = encode_prompt(TOKENIZER, DEFAULT, question, answer)
    special = [id for id in ids if id in TOKENIZER.special.values()]
    start, end = TOKENIZER.special["<|im_start|>"], TOKENIZER.special["<|im_end|>"]
    assert special == [start, end, start, end, start]
    first = ids.index(end)
    assert TOKENIZER.decode(ids[:first]) == "question\n" + question


@given(TEXT, TEXT, st.booleans())
def test_with_verdicts_too_the_prompt_has_the_structure_of_its_template(
    question: str, answer: str, marks: bool
) -> None:
    template = verdict_template(SPARING, marks=marks)
    ids = encode_prompt(SPARING, template, question, answer)
    start, end = SPARING.special["<|im_start|>"], SPARING.special["<|im_end|>"]
    special = [id for id in ids if id in SPARING.special.values()]
    sentences = len(split_sentences(answer)) if marks else 0
    assert special == [start, end, start, *[SPARING.special["<gh_stars>"]] * sentences, end, start]


@given(TEXT)
def test_a_continuation_decodes_to_the_text(text: str) -> None:
    assert TOKENIZER.decode(encode_continuation(TOKENIZER, DEFAULT, text)) == text


def test_sentencepiece_style_merges_cannot_spell_a_control_token() -> None:
    vocab = {"<unk>": 0, "<s>": 1, "<": 2, "s": 3, ">": 4, "s>": 5}
    backend = Backend(models.BPE(vocab=vocab, merges=[("s", ">"), ("<", "s>")], unk_token="<unk>"))
    backend.add_special_tokens(["<unk>", "<s>"])
    assert Tokenizer(backend.to_str()).encode("<s>") == [2, 5]


def test_published_templates_are_byte_for_byte() -> None:
    text = TEMPLATES["pku-7b"].text.replace("{question}", "Q").replace("{answer}", "A")
    assert text == (
        "BEGINNING OF CONVERSATION: USER: Edit the following Question-Answer pair to make it more helpful and harmless: "
        "Q | A ASSISTANT:"
    )
    assert TEMPLATES["pku-code"].text.endswith("##Correction:  ASSISTANT:")


def test_a_hub_model_gets_the_template_it_was_trained_with() -> None:
    assert resolve_template(None, "aligner/aligner-7b-v1.0").name == "pku-7b"
    assert resolve_template(None, "somebody/else").name == "default"
    assert resolve_template("Q {question} A {answer}").name == "custom"


def test_a_wrong_template_is_refused_by_name() -> None:
    with pytest.raises(BuildError, match=r"'nonsense' is none of .*default"):
        resolve_template("nonsense")
    with pytest.raises(BuildError, match=r"did you mean 'default'\?"):
        resolve_template("defualt")


def test_a_tokenizer_without_the_templates_special_tokens_is_refused() -> None:
    description = json.loads(Backend(models.BPE(vocab={"a": 0}, merges=[])).to_str())
    with pytest.raises(BuildError, match=r"needs the special token '<\|im_start\|>'"):
        encode_prompt(Tokenizer(json.dumps(description)), DEFAULT, "q", "a")


def test_nonsense_is_not_a_tokenizer() -> None:
    with pytest.raises(ArtifactError, match="not a tokenizer"):
        Tokenizer("{}")
