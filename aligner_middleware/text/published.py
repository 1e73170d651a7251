"""Prompt templates by name: the default, and those that public aligners were trained with."""

from __future__ import annotations

from pydantic import ValidationError

from aligner_middleware.errors import BuildError, did_you_mean
from aligner_middleware.text.template import DEFAULT, PromptTemplate

# The prompts that public aligners were trained with, byte for byte (arXiv 2402.02416 and its reference code; MetaAligner's
# inference code, whose objectives are the instruction).
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
    PromptTemplate(
        name="metaaligner",
        text='Edit the following Question-Answer pair to make it better considering these aspects "{instruction}" | '
        "Question: {question} | Answer: {answer} | Edit: ",
    ),
    PromptTemplate(
        name="metaaligner-hh-rlhf",
        text="You are an assistant to human. You will be provided with a context and an answer. Consider the context, then "
        "edit the answer to improve it considering these aspects: {instruction} | Context: {question} | Answer: {answer} | "
        "Edit: ",
    ),
    PromptTemplate(
        name="metaaligner-ultrafeedback",
        text="You are an assistant to human. You will be provided with a query and an answer. Consider the query, then edit "
        "the answer to improve it considering these aspects: {instruction} | Query: {question} | Answer: {answer} | Edit: ",
    ),
)

TEMPLATES: dict[str, PromptTemplate] = {template.name: template for template in (DEFAULT, *_PUBLISHED)}

# Hub models that are known to need one of these.
KNOWN_MODELS: dict[str, str] = {
    "aligner/aligner-7b-v1.0": "pku-7b",
    "MetaAligner/MetaAligner-IMHI-7B": "metaaligner",
    "MetaAligner/MetaAligner-IMHI-13B": "metaaligner",
    "MetaAligner/MetaAligner-HH-RLHF-1.1B": "metaaligner-hh-rlhf",
    "MetaAligner/MetaAligner-HH-RLHF-7B": "metaaligner-hh-rlhf",
    "MetaAligner/MetaAligner-HH-RLHF-13B": "metaaligner-hh-rlhf",
    "MetaAligner/MetaAligner-UltraFeedback-1.1B": "metaaligner-ultrafeedback",
    "MetaAligner/MetaAligner-UltraFeedback-7B": "metaaligner-ultrafeedback",
    "MetaAligner/MetaAligner-UltraFeedback-13B": "metaaligner-ultrafeedback",
}


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
