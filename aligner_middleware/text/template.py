"""The aligner's correction prompt: question and answer in, token ids out.

Training, inference and export all use `encode_prompt` and `encode_continuation`, so an aligner is asked in the tokens that it
was trained on.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from aligner_middleware.errors import BuildError, did_you_mean
from aligner_middleware.text.edits import Operation, split_sentences
from aligner_middleware.text.tokenizer import Tokenizer

Verdict = Literal["keep", "edit", "rewrite"]
VERDICTS: tuple[Verdict, ...] = ("keep", "edit", "rewrite")
SpecialToken = Annotated[str, Field(min_length=1, max_length=200)]

_PLACEHOLDER = re.compile(r"\{question\}|\{answer\}")
# Special tokens that chat templates, trainers and tokenizers use themselves.
_COMMON = re.compile(
    r"(?i)endoftext|im_start|im_end|im_sep|start_of|end_of|begin_of|start_header|end_header|eot|eom|python|<s>|</s>|"
    r"bos|eos|pad|unk|mask|user|assistant|system|tool|think|image|audio|video|vision"
)
_OPERATION = re.compile(r"(?s)(\d+)(?: (.*))?")


class PromptTemplate(BaseModel):
    """The form of the prompt that holds a question and an answer.

    Attributes:
        name: Its name in `aligner.json` and on the command line.
        text: The prompt, which holds `{question}` and `{answer}`, each at least once.
        special_tokens: Tokens that `text` places as such. Everything else in `text`, and all of a question and an
            answer, is plain text.
        bos: Whether the tokenizer's own first tokens go before it.
        end_token: Ends a correction; `None` for the model's own end-of-text token.
        verdicts: Special tokens for keep, edit and rewrite, one of which stands between the prompt and the correction;
            `None` for an aligner without verdicts.
        mark: Special token that goes, with a number, before each sentence of the answer; an edit is then written as
            operations on sentences. `None` for edits that are written as copies.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1, max_length=300, pattern=r"^[^\x00-\x1f\x7f-\x9f]*$")
    text: str = Field(max_length=100_000)
    special_tokens: tuple[SpecialToken, ...] = Field(default=(), max_length=100)
    bos: bool = True
    end_token: SpecialToken | None = None
    verdicts: tuple[SpecialToken, SpecialToken, SpecialToken] | None = None
    mark: SpecialToken | None = None

    @model_validator(mode="after")
    def _has_both_placeholders(self) -> Self:
        missing = [part for part in ("{question}", "{answer}") if part not in self.text]
        if missing:
            raise ValueError(f"a prompt template holds {{question}} and {{answer}}; {self.text!r} lacks {missing}")
        if self.mark and not self.verdicts:
            raise ValueError("a prompt template with a mark has verdicts")
        own = [*(self.verdicts or ()), *([self.mark] if self.mark else []), *self.special_tokens]
        if len(set(own)) < len(own):
            raise ValueError(f"a prompt template's special tokens differ from each other, these do not: {own}")
        return self


# Special tokens separate its parts. No text can spell them, so a question or an answer cannot end its part.
DEFAULT = PromptTemplate(  # nosec B106  # its end token is no password
    name="default",
    text="<|im_start|>question\n{question}<|im_end|>\n<|im_start|>answer\n{answer}<|im_end|>\n<|im_start|>correction\n",
    special_tokens=("<|im_start|>", "<|im_end|>"),
    bos=False,
    end_token="<|im_end|>",
)

# The prompts that public aligners were trained with, byte for byte (arXiv 2402.02416 and its reference code).
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

# Hub models that are known to need one of these.
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
        + did_you_mean(template, TEMPLATES)
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
        elif template.mark and "{answer}" in piece:
            for at, part in enumerate(piece.split("{answer}")):
                ids += _encode_marked(tokenizer, template, answer) if at else []
                ids += tokenizer.encode(part.replace("{question}", question))
        else:
            ids += tokenizer.encode(_PLACEHOLDER.sub(lambda match: values[match.group()], piece))
    return ids


def tail_length(tokenizer: Tokenizer, template: PromptTemplate) -> int:
    """Count the tokens of a prompt that follow its answer."""
    one, other = (encode_prompt(tokenizer, template, "q", answer)[::-1] for answer in ("a", "b"))
    return next(at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)


def _encode_marked(tokenizer: Tokenizer, template: PromptTemplate, answer: str) -> list[int]:
    """Encode an answer with a mark and a number before each sentence. The mark stands for a single space before it."""
    sentences = (piece.removesuffix(" ") for piece in split_sentences(answer))
    return encode_operations(tokenizer, template, [Operation(at, piece) for at, piece in enumerate(sentences, 1)])


def encode_operations(tokenizer: Tokenizer, template: PromptTemplate, operations: Sequence[Operation]) -> list[int]:
    """Encode operations as they stand after the verdict `edit`: mark, number and new text of each sentence."""
    ids: list[int] = []
    mark = special_token_id(tokenizer, template, template.mark or "")
    for sentence, text in operations:
        ids += [mark, *tokenizer.encode(f"{sentence} {text}" if text else str(sentence))]
    return ids


def decode_operations(tokenizer: Tokenizer, template: PromptTemplate, ids: Sequence[int]) -> list[Operation]:
    """Decode tokens that a model wrote as operations.

    Raises:
        ValueError: If these are no operations.
    """
    mark = special_token_id(tokenizer, template, template.mark or "")
    starts = [at for at, token in enumerate(ids) if token == mark]
    if not starts or starts[0] != 0:
        raise ValueError("operations begin with a mark")
    found = []
    for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
        match = _OPERATION.fullmatch(tokenizer.decode(ids[start + 1 : end]))
        if match is None:
            raise ValueError("an operation begins with a number")
        found.append(Operation(int(match[1]), (match[2] or "").strip()))
    return found


def with_verdicts(template: PromptTemplate, tokenizer: Tokenizer, *, marks: bool) -> PromptTemplate:
    """Choose special tokens of a tokenizer that the template does not use yet for verdicts, and for marks.

    Raises:
        BuildError: If the tokenizer has not enough of them to spare.
    """
    used = {*template.special_tokens, template.end_token}
    spare = [
        token
        for token, id in sorted(tokenizer.special.items(), key=lambda item: item[1])
        if token not in used and id not in tokenizer.bos_ids and not _COMMON.search(token)
    ]
    if len(spare) < 3 + marks:
        raise BuildError(
            f"verdicts need {3 + marks} special tokens that the base model does not use, its tokenizer has "
            f"{len(spare)} ({', '.join(spare) or 'none'}): train without verdicts, or from another base model"
        )
    keep, edit, rewrite, *rest = spare
    return template.model_copy(update={"verdicts": (keep, edit, rewrite), "mark": rest[0] if marks else None})


def verdict_ids(tokenizer: Tokenizer, template: PromptTemplate) -> tuple[int, int, int] | None:
    """Give the ids of keep, edit and rewrite; `None` for a template without verdicts."""
    if template.verdicts is None:
        return None
    keep, edit, rewrite = (special_token_id(tokenizer, template, token) for token in template.verdicts)
    return keep, edit, rewrite


def encode_continuation(tokenizer: Tokenizer, template: PromptTemplate, text: str) -> list[int]:
    """Encode text as it stands right after the prompt: a correction in training, a draft in inference.

    It is encoded together with the prompt's last words, unless that changes their tokens: some tokenizers put a space before
    every text, and would put one before a correction that is encoded alone.
    """
    tail = _PLACEHOLDER.split(_split_at_special_tokens(template)[-1])[-1]
    if tail in template.special_tokens:
        return tokenizer.encode(text)
    head = tokenizer.encode(tail)
    ids = tokenizer.encode(tail + text)
    return ids[len(head) :] if ids[: len(head)] == head else tokenizer.encode(text)


def special_token_id(tokenizer: Tokenizer, template: PromptTemplate, token: str) -> int:
    """Look up the id of a template's special token.

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
