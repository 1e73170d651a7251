"""The place of the answer in a prompt: what stands before it and after it."""

from __future__ import annotations

from aligner_middleware.errors import BuildError
from aligner_middleware.text.template import PLACEHOLDER, PromptTemplate, encode_prompt
from aligner_middleware.text.tokenizer import Tokenizer


def tail_length(tokenizer: Tokenizer, template: PromptTemplate) -> int:
    """Count the tokens of a prompt that follow its answer."""
    one, other = (encode_prompt(tokenizer, template, "q", answer)[::-1] for answer in ("a", "b"))
    return next(at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)


def around_answer(tokenizer: Tokenizer, template: PromptTemplate) -> tuple[list[int], list[int]]:
    """Encode the template's own text right before and right after the answer, by which a prompt's answer is found.

    Returns:
        The tokens from the question to the answer, and those from the answer to the prompt's end. Where no special token
        stands between text and answer, the last token before it may be joined with the answer's first one.

    Raises:
        BuildError: If the tokenizer lacks a special token of the template, or its text does not end with words of its own
            after the answer: a prompt's end cannot be found then.
    """
    head, _, tail = template.text.rpartition("{answer}")
    if not tail or PLACEHOLDER.search(tail):
        raise BuildError(
            f"prompt template {template.name!r} does not end with text of its own after {{answer}}: where a prompt ends "
            "cannot be found from its tokens"
        )
    parts = (PLACEHOLDER.split(head)[-1], tail)
    before, after = (
        encode_prompt(tokenizer, template.model_copy(update={"text": text, "bos": False}), "", "") for text in parts
    )
    return before, after
