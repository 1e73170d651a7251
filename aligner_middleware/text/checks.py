"""Refuses blank questions and invalid Unicode before anything is encoded."""

from __future__ import annotations

from aligner_middleware.errors import InputError


def check_question(question: str) -> None:
    """Refuse a question that is blank or not valid text.

    Raises:
        InputError: If it is.
    """
    check_text("question", question)
    if not question.strip():
        raise InputError("the question is blank: an answer can only be judged against what was asked")


def check_text(name: str, text: str) -> None:
    """Refuse a value that is not a string, or not valid Unicode.

    Args:
        name: Its name in the message.
        text: The text.

    Raises:
        InputError: If it is.
    """
    if not isinstance(text, str):
        raise InputError(f"the {name} is a {type(text).__name__}, expected text")
    try:
        text.encode()
    except UnicodeEncodeError as exc:
        raise InputError(
            f"the {name} holds a lone surrogate, {text[exc.start]!r} at character {exc.start}, which is not valid text: "
            "replace it, for example by text.encode('utf-8', 'replace').decode()"
        ) from exc
