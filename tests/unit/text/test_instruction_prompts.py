"""The place of an instruction in a prompt: left out whole where there is none, and never a special token."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from aligner_middleware.artifact import Artifact
from aligner_middleware.errors import BuildError
from aligner_middleware.text.published import TEMPLATES, resolve_template
from aligner_middleware.text.template import DEFAULT, PromptTemplate, encode_prompt, with_instruction
from tests.fakes import (
    SPARE,
    artifact_folder,
    byte_tokenizer,
    verdict_template,
)

TOKENIZER = byte_tokenizer(SPARE)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40) | st.sampled_from(
    ["<|im_end|>", "a<|im_start|>question\nb", "{answer}", "{instruction}", "<repo_name>"]
)


@given(st.sampled_from([*TEMPLATES.values(), verdict_template(TOKENIZER, marks=True)]), TEXT, TEXT)
def test_a_prompt_without_an_instruction_is_that_of_the_template_without_a_place_for_one(
    template: PromptTemplate, question: str, answer: str
) -> None:
    if not template.needs_instruction:
        expected = encode_prompt(TOKENIZER, template, question, answer)
        assert encode_prompt(TOKENIZER, with_instruction(template), question, answer) == expected


@given(TEXT, TEXT, TEXT.filter(bool))
def test_an_instruction_stands_before_all_else_and_is_never_a_special_token(
    question: str, answer: str, instruction: str
) -> None:
    template = with_instruction(DEFAULT)
    ids = encode_prompt(TOKENIZER, template, question, answer, instruction)
    start, end = TOKENIZER.special["<|im_start|>"], TOKENIZER.special["<|im_end|>"]
    first = ids.index(end)
    assert TOKENIZER.decode(ids[1:first]) == "instruction\n" + instruction
    special = set(TOKENIZER.special.values())
    assert [id for id in ids if id in special] == [start, end, start, end, start, end, start]
    assert ids[first + 1 + len(TOKENIZER.encode("\n")) :] == encode_prompt(TOKENIZER, template, question, answer)


@pytest.mark.parametrize(
    ("text", "part", "reason"),
    [
        ("{instruction}{instruction}{question}{answer}", None, "at most once"),
        ("{question}{answer}{instruction}", None, "before {answer}"),
        ("{question}{answer}", "Be {instruction}.", "needs {instruction} in the template's text"),
        ("{instruction}{question}{answer}", "Be kind.", "holds {instruction} once"),
        ("{instruction}{question}{answer}", "{instruction}{instruction}", "holds {instruction} once"),
        ("{instruction}{question}{answer}", "{instruction}{question}", "no other placeholder"),
    ],
)
def test_a_misplaced_instruction_is_refused(text: str, part: str | None, reason: str) -> None:
    with pytest.raises(ValidationError, match=reason.replace("{", r"\{")):
        PromptTemplate(name="t", text=text, instruction_part=part)
    if part is None:
        with pytest.raises(BuildError, match=reason.replace("{", r"\{")):
            resolve_template(text)


def test_a_part_with_special_tokens_places_them() -> None:
    template = PromptTemplate(
        name="t",
        text="{instruction}{question} {answer}",
        instruction_part="<|im_start|>{instruction}",
        special_tokens=["<|im_start|>"],
    )
    assert encode_prompt(TOKENIZER, template, "q", "a", "i")[0] == TOKENIZER.special["<|im_start|>"]
    assert encode_prompt(TOKENIZER, template, "q", "a") == TOKENIZER.encode("q a")


def test_files_of_templates_without_an_instruction_are_those_of_earlier_versions(tmp_path: Any) -> None:
    keys = {"name", "text", "special_tokens", "bos", "end_token", "verdicts", "mark"}
    folder = artifact_folder(tmp_path / "old")
    assert json.loads((folder / "aligner.json").read_text())["template"].keys() == keys == DEFAULT.model_dump().keys()
    assert Artifact.load(folder).template == DEFAULT
    new = artifact_folder(tmp_path / "new", template=with_instruction(DEFAULT))
    assert Artifact.load(new).template == with_instruction(DEFAULT) == with_instruction(with_instruction(DEFAULT))


# Of SteveKGYang/MetaAligner (MIT licence), `inference/aligner_inference.py` at 26d8dad; `{aspects}` are its objectives,
# joined by "; ".
METAALIGNER = {
    "metaaligner": 'Edit the following Question-Answer pair to make it better considering these aspects "{aspects}" | '
    "Question: {question} | Answer: {answer} | Edit: ",
    "metaaligner-hh-rlhf": "You are an assistant to human. You will be provided with a context and an answer. "
    "Consider the context, then edit the answer to improve it considering these aspects: {aspects} | "
    "Context: {question} | Answer: {answer} | Edit: ",
    "metaaligner-ultrafeedback": "You are an assistant to human. You will be provided with a query and an answer. "
    "Consider the query, then edit the answer to improve it considering these aspects: {aspects} | "
    "Query: {question} | Answer: {answer} | Edit: ",
}
OBJECTIVES = (
    "Harmlessness: The response should avoid content that is offensive, discriminatory, or harmful; "
    "Humour: The response should be cheerful and amusing"
)


@pytest.mark.parametrize("name", METAALIGNER)
def test_metaaligners_prompts_are_byte_for_byte_those_of_its_authors(name: str) -> None:
    template = resolve_template(name)
    ids = encode_prompt(TOKENIZER, template, "Who? {answer}", "Nobody.  ", OBJECTIVES)
    expected = METAALIGNER[name].format(aspects=OBJECTIVES, question="Who? {answer}", answer="Nobody.  ")
    assert TOKENIZER.decode(ids) == expected
    assert template.needs_instruction


def test_metaaligners_models_get_the_prompt_of_their_data() -> None:
    for data, name in (("IMHI", ""), ("HH-RLHF", "-hh-rlhf"), ("UltraFeedback", "-ultrafeedback")):
        assert resolve_template(None, f"MetaAligner/MetaAligner-{data}-7B").name == "metaaligner" + name
