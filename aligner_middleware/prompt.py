"""The aligner's correction prompt: question and answer in, token ids out.

`encode_prompt` and `encode_continuation` are what training, inference and export all use, so a trained aligner is asked
in the very tokens that it was trained on.
"""

from __future__ import annotations

import re
from typing import Self

from pydantic import BaseModel, ConfigDict, model_validator

from aligner_middleware.errors import BuildError
from aligner_middleware.tokenizer import Tokenizer

_PLACEHOLDER = re.compile(r"\{question\}|\{answer\}")


class PromptTemplate(BaseModel):
    """How a question and an answer are put to an aligner.

    Attributes:
        name: What it is called in `aligner.json` and on the command line.
        text: The prompt, with `{question}` and `{answer}` in it, each at least once.
        special_tokens: Tokens that `text` places as such. Everything else in `text`, and all of a question and an
            answer, is plain text.
        bos: Whether the tokenizer's own first tokens go before it.
        end_token: Ends a correction; `None` for the model's own end-of-text token.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    text: str
    special_tokens: tuple[str, ...] = ()
    bos: bool = True
    end_token: str | None = None

    @model_validator(mode="after")
    def _has_both_placeholders(self) -> Self:
        missing = [part for part in ("{question}", "{answer}") if part not in self.text]
        if missing:
            raise ValueError(f"a prompt template holds {{question}} and {{answer}}; {self.text!r} lacks {missing}")
        return self


# Structure stands in special tokens, which no text can spell: a question cannot end or steer the prompt.
DEFAULT = PromptTemplate(
    name="default",
    text="<|im_start|>question\n{question}<|im_end|>\n<|im_start|>answer\n{answer}<|im_end|>\n<|im_start|>correction\n",
    special_tokens=("<|im_start|>", "<|im_end|>"),
    bos=False,
    end_token="<|im_end|>",
)

# Those that public aligners were trained with, byte for byte (arXiv 2402.02416 and its reference code).
_PUBLISHED = (
    PromptTemplate(
        name="pku-7b",
        text="BEGINNING OF CONVERSATION: USER: Edit the following Question-Answer pair to make it more helpful and "
        "harmless: {question} | {answer} ASSISTANT:",
    ),
    PromptTemplate(
        name="paper",
        text="BEGINNING OF CONVERSATION: USER: Editing the following Question-Answer pair to make it more helpful and "
        "harmless: Question: {question} | Answer: {answer} ASSISTANT:",
    ),
    PromptTemplate(
        name="pku-code",
        text="BEGINNING OF CONVERSATION: USER: ##Question: {question}\n##Answer: {answer}\n##Correction:  ASSISTANT:",
    ),
    PromptTemplate(
        name="gemma-2b",
        text="BEGINNING OF CONVERSATION: USER: ##Question: {question} ##Answer: {answer} ##Revision:  ASSISTANT:",
    ),
)

TEMPLATES: dict[str, PromptTemplate] = {template.name: template for template in (DEFAULT, *_PUBLISHED)}

# Hub models that are known to need one of them.
KNOWN_MODELS: dict[str, str] = {"aligner/aligner-7b-v1.0": "pku-7b"}


def resolve_template(template: str | PromptTemplate | None, model: str | None = None) -> PromptTemplate:
    """Find a template by name, by its text, or by the model that it belongs to.

    Args:
        template: A template, the name of one, or a text with `{question}` and `{answer}`; `None` for the one that
            `model` is known to need, or else `default`.
        model: Hub id of the model that will read the prompt.

    Raises:
        BuildError: If it is neither a known name nor a text with both placeholders.
    """
    if isinstance(template, PromptTemplate):
        return template
    if template is None:
        return TEMPLATES[KNOWN_MODELS.get(model or "", "default")]
    if template in TEMPLATES:
        return TEMPLATES[template]
    if "{question}" in template and "{answer}" in template:
        return PromptTemplate(name="custom", text=template)
    raise BuildError(
        f"prompt template {template!r} is none of {sorted(TEMPLATES)} and does not hold both {{question}} and {{answer}}"
    )


def encode_prompt(tokenizer: Tokenizer, template: PromptTemplate, question: str, answer: str) -> list[int]:
    """Encode the prompt after which an aligner writes its correction.

    Text between two special tokens is encoded in one piece, as the models' own tokenizers do.

    Raises:
        BuildError: If the tokenizer lacks a special token of the template.
    """
    values = {"{question}": question, "{answer}": answer}
    ids = list(tokenizer.bos_ids) if template.bos else []
    for piece in _split_at_special_tokens(template):
        if piece in template.special_tokens:
            ids.append(special_token_id(tokenizer, template, piece))
        else:
            ids += tokenizer.encode(_PLACEHOLDER.sub(lambda match: values[match.group()], piece))
    return ids


def encode_continuation(tokenizer: Tokenizer, template: PromptTemplate, text: str) -> list[int]:
    """Encode text as it stands right after the prompt: a correction in training, a draft in inference.

    The prompt's last words go along where that leaves their own tokens alone; without them, tokenizers that put a space
    before every text would put one before the correction.
    """
    tail = _PLACEHOLDER.split(_split_at_special_tokens(template)[-1])[-1]
    if tail in template.special_tokens:
        return tokenizer.encode(text)
    head = tokenizer.encode(tail)
    ids = tokenizer.encode(tail + text)
    return ids[len(head) :] if ids[: len(head)] == head else tokenizer.encode(text)


def special_token_id(tokenizer: Tokenizer, template: PromptTemplate, token: str) -> int:
    """Look a template's special token up.

    Raises:
        BuildError: If the tokenizer has no such token.
    """
    try:
        return tokenizer.special[token]
    except KeyError:
        raise BuildError(
            f"prompt template {template.name!r} needs the special token {token!r}, which this tokenizer does not have "
            f"(it has {sorted(tokenizer.special)[:8]}): choose another template, or give one with {{question}} and {{answer}}"
        ) from None


def _split_at_special_tokens(template: PromptTemplate) -> list[str]:
    if not template.special_tokens:
        return [template.text]
    pattern = "|".join(re.escape(token) for token in template.special_tokens)
    return [piece for piece in re.split(f"({pattern})", template.text) if piece]
