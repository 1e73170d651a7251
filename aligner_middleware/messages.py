"""Chat messages to text and back: what of a message is its answer, and the same message with another one.

Pure functions over messages; they know nothing of aligners.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from langchain_core.messages import BaseMessage, HumanMessage

M = TypeVar("M", bound=BaseMessage)


def text_of(message: BaseMessage) -> str:
    """Join the text of a message: its content, or that of its text blocks, with nothing between them."""
    if isinstance(message.content, str):
        return message.content
    return "".join(_block_text(block) or "" for block in message.content)


def with_text(message: M, text: str) -> M:
    """Copy a message with its text replaced and all else kept: id, tool calls, usage, metadata, other blocks.

    In a list of content blocks the first text block takes the whole text and later ones go; annotations of the old text
    go too, since they point into it.
    """
    if isinstance(message.content, str):
        return message.model_copy(update={"content": text})
    blocks: list[str | dict[str, Any]] = []
    placed = False
    for block in message.content:
        if _block_text(block) is None:
            blocks.append(block)
        elif not placed:
            blocks.append(text if isinstance(block, str) else _without_annotations(block) | {"text": text})
            placed = True
    return message.model_copy(update={"content": blocks})


def with_metadata(message: M, **values: object) -> M:
    """Copy a message with values added to its `response_metadata`."""
    return message.model_copy(update={"response_metadata": {**message.response_metadata, **values}})


def question_of(messages: Sequence[BaseMessage]) -> str | None:
    """Find what a conversation asks: the text of its last human message, or `None` where it has none with text."""
    for message in reversed(messages):
        if isinstance(message, HumanMessage):
            return text_of(message) or None
    return None


def _block_text(block: str | dict[str, Any]) -> str | None:
    if isinstance(block, str):
        return block
    return str(block.get("text", "")) if block.get("type") == "text" else None


def _without_annotations(block: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in block.items() if key != "annotations"}
