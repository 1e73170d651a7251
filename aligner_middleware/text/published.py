"""Prompt templates by name: the default, and those that public aligners were trained with."""

from __future__ import annotations

from pydantic import ValidationError

from aligner_middleware.errors import BuildError, did_you_mean
from aligner_middleware.text.template import DEFAULT, PromptTemplate

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
        template: A template, the name of one, or a text with `{question}` and `{answer}`, and maybe `{instruction}`, which
            then every prompt has; `None` for the one that `model` is known to need, or else `default`.
        model: Hub id of the model that will read the prompt.

    Raises:
        BuildError: If it is neither a known name nor a text with both placeholders, or its `{instruction}` is misplaced.
    """
    if isinstance(template, PromptTemplate):
        return template
    if template is None:
        return TEMPLATES[KNOWN_MODELS.get(model or "", "default")]
    if template in TEMPLATES:
        return TEMPLATES[template]
    if "{question}" in template and "{answer}" in template:
        try:
            return PromptTemplate(name="custom", text=template)
        except ValidationError as exc:
            raise BuildError(exc.errors()[0]["msg"].removeprefix("Value error, ")) from None
    raise BuildError(
        f"prompt template {template!r} is none of {sorted(TEMPLATES)} and does not hold both {{question}} and {{answer}}"
        + did_you_mean(template, TEMPLATES)
    )
