"""The aligner's correction prompt: question, answer and maybe an instruction in, token ids out.

Training, inference and export all use `encode_prompt` and `encode_continuation`, so an aligner is asked in the tokens that it
was trained on.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from aligner_middleware.errors import BuildError
from aligner_middleware.text.edits import Operation, split_sentences
from aligner_middleware.text.tokenizer import Tokenizer

Verdict = Literal["keep", "edit", "rewrite"]
VERDICTS: tuple[Verdict, ...] = ("keep", "edit", "rewrite")
SpecialToken = Annotated[str, Field(min_length=1, max_length=200)]

PLACEHOLDER = re.compile(r"\{(?:question|answer|instruction)\}")
# Special tokens that chat templates, trainers and tokenizers use themselves.
_COMMON = re.compile(
    r"(?i)endoftext|im_start|im_end|im_sep|start_of|end_of|begin_of|start_header|end_header|eot|eom|python|<s>|</s>|"
    r"bos|eos|pad|unk|mask|user|assistant|system|tool|think|image|audio|video|vision"
)
_INSTRUCTION = "{instruction}"
_OPERATION = re.compile(r"(?s)(\d+)(?: (.*))?")


class PromptTemplate(BaseModel):
    """The form of the prompt that holds a question and an answer, and maybe an instruction.

    Attributes:
        name: Its name in `aligner.json` and on the command line.
        text: The prompt, which holds `{question}` and `{answer}`, each at least once, and before them or between them
            `{instruction}`, at most once, where the aligner was trained with instructions.
        instruction_part: What stands in the place of `{instruction}` where one is given: a text that holds `{instruction}`
            once. Without an instruction nothing stands there. `None` puts the bare instruction there, and each prompt
            needs one.
        special_tokens: Tokens that `text` and `instruction_part` place as such. Everything else in them, and all of a
            question, an answer and an instruction, is plain text.
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
    instruction_part: str | None = Field(default=None, max_length=100_000)
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
        _check_instruction(self.text, self.instruction_part)
        if self.mark and not self.verdicts:
            raise ValueError("a prompt template with a mark has verdicts")
        own = [*(self.verdicts or ()), *([self.mark] if self.mark else []), *self.special_tokens]
        if len(set(own)) < len(own):
            raise ValueError(f"a prompt template's special tokens differ from each other, these do not: {own}")
        return self

    @model_serializer(mode="wrap")
    def _without_absent_part(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave an absent instruction part out: such files, and the names in the cache, stay those of earlier versions."""
        content: dict[str, Any] = serialize(self)
        if self.instruction_part is None:
            content.pop("instruction_part", None)
        return content

    @property
    def takes_instruction(self) -> bool:
        """Whether a prompt may hold an instruction."""
        return _INSTRUCTION in self.text

    @property
    def needs_instruction(self) -> bool:
        """Whether every prompt holds an instruction."""
        return self.takes_instruction and self.instruction_part is None

    def text_for(self, instruction: str) -> str:
        """Give the text of a prompt with an instruction, or without one where it is empty; placeholders stay."""
        part = self.instruction_part
        return self.text if part is None else self.text.replace(_INSTRUCTION, part if instruction else "")


def _check_instruction(text: str, part: str | None) -> None:
    """Refuse a place of the instruction that prompts cannot be made with, by a `ValueError`."""
    if text.count(_INSTRUCTION) > 1 or (_INSTRUCTION in text and text.index(_INSTRUCTION) > text.index("{answer}")):
        raise ValueError(
            f"a prompt template holds {{instruction}} at most once, and before {{answer}}, which is read while it arrives; "
            f"{text!r} does not"
        )
    if part is None:
        return
    if _INSTRUCTION not in text:
        raise ValueError(f"instruction_part needs {{instruction}} in the template's text, which {text!r} lacks")
    if PLACEHOLDER.findall(part) != [_INSTRUCTION]:
        raise ValueError(f"instruction_part holds {{instruction}} once, and no other placeholder; {part!r} does not")


# Special tokens separate its parts. No text can spell them, so a question or an answer cannot end its part.
DEFAULT = PromptTemplate(  # nosec B106  # its end token is no password
    name="default",
    text="<|im_start|>question\n{question}<|im_end|>\n<|im_start|>answer\n{answer}<|im_end|>\n<|im_start|>correction\n",
    special_tokens=("<|im_start|>", "<|im_end|>"),
    bos=False,
    end_token="<|im_end|>",
)


def with_instruction(template: PromptTemplate) -> PromptTemplate:
    """Give a template a place for an instruction, before all else; prompts without an instruction stay the same."""
    if template.takes_instruction:
        return template
    marked = {"<|im_start|>", "<|im_end|>"} <= set(template.special_tokens)
    part = "<|im_start|>instruction\n{instruction}<|im_end|>\n" if marked else "Instruction: {instruction}\n"
    return template.model_copy(update={"text": _INSTRUCTION + template.text, "instruction_part": part})


def encode_prompt(
    tokenizer: Tokenizer, template: PromptTemplate, question: str, answer: str, instruction: str = ""
) -> list[int]:
    """Encode the prompt after which an aligner writes its correction.

    Args:
        tokenizer: The tokenizer.
        template: The template.
        question: The question.
        answer: The answer.
        instruction: How to correct; empty for none. The template must take one then.

    Text between two special tokens is encoded in one piece, as the models' own tokenizers do.

    Raises:
        BuildError: If the tokenizer lacks a special token of the template.
    """
    values = {"{question}": question, "{answer}": answer, _INSTRUCTION: instruction}

    def filled(text: str) -> list[int]:
        return tokenizer.encode(PLACEHOLDER.sub(lambda match: values[match.group()], text))

    ids = list(tokenizer.bos_ids) if template.bos else []
    for piece in _split_at_special_tokens(template, template.text_for(instruction)):
        if piece in template.special_tokens:
            ids.append(special_token_id(tokenizer, template, piece))
        elif template.mark and "{answer}" in piece:
            for at, part in enumerate(piece.split("{answer}")):
                ids += _encode_marked(tokenizer, template, answer) if at else []
                ids += filled(part)
        else:
            ids += filled(piece)
    return ids


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
    tail = PLACEHOLDER.split(_split_at_special_tokens(template, template.text)[-1])[-1]
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


def _split_at_special_tokens(template: PromptTemplate, text: str) -> list[str]:
    if not template.special_tokens:
        return [text]
    pattern = "|".join(re.escape(token) for token in template.special_tokens)
    return [piece for piece in re.split(f"({pattern})", text) if piece]
