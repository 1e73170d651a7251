"""Chat messages to text and back: the text of a message, the same message with another text, and its question.

Pure functions over messages; they know nothing of aligners.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, ToolMessage

from aligner_middleware.diff import compare
from aligner_middleware.errors import MissingQuestionError
from aligner_middleware.text.reasoning import apart

M = TypeVar("M", bound=BaseMessage)
Block = str | dict[str, Any]

_MARKS = ("annotations", "citations")  # a provider's notes on places of a text
_SPEAKERS = {HumanMessage: "User", AIMessage: "Assistant", ToolMessage: "Tool"}


def text_of(message: BaseMessage) -> str:
    """Join the text of a message: its content, or that of its text blocks, with nothing between them."""
    if isinstance(message.content, str):
        return message.content
    return "".join(_block_text(block) or "" for block in message.content)


def with_text(message: M, text: str) -> M:
    """Copy a message with its text replaced and all else kept: id, tool calls, usage, metadata, other blocks.

    In a list of content blocks each text block gets the corrected form of its own text; a block left without text is dropped.
    Citations and annotations stay on text that did not change: those with places in the text are moved along with it,
    those without stay where all of their block is the same. On changed text they are dropped, since the
    source may not say what the correction says. So are log-probabilities, which are of the old text's tokens.
    """
    old = text_of(message)
    if text == old:
        return message.model_copy()
    metadata = {key: value for key, value in message.response_metadata.items() if key != "logprobs"}
    content: str | list[Block] = text
    if not isinstance(message.content, str):
        content = list(_rewritten_blocks(message.content, _Places(old, text)))
    return message.model_copy(update={"content": content, "response_metadata": metadata})


def with_metadata(message: M, **values: object) -> M:
    """Copy a message with values added to its `response_metadata`."""
    return message.model_copy(update={"response_metadata": {**message.response_metadata, **values}})


def question_of(messages: Sequence[BaseMessage], *, dialogue: bool = False, tool_results: bool = False) -> str | None:
    """Find the question of a conversation: the text of its last human message.

    Args:
        messages: The conversation, up to the answer.
        dialogue: Whether the turns before it are part of the question, as lines of User and Assistant.
        tool_results: Whether the results of tools are part of it: with `dialogue` all, else those since the question.

    Returns:
        The question, or `None` where there is no human message; where the last one has no text; or, with `dialogue`, where
        no message has any.
    """
    last = _last_question(messages)
    if last is None:
        return None
    if not dialogue:
        question = text_of(messages[last])
        if not question.strip():
            return None
        results = [text_of(turn) for turn in messages[last:] if isinstance(turn, ToolMessage)] if tool_results else []
        return "\n\n".join([question, *(f"Tool: {result}" for result in results if result)])
    kinds = (HumanMessage, AIMessage, ToolMessage) if tool_results else (HumanMessage, AIMessage)
    texts = [(turn, _said(turn)) for turn in messages if isinstance(turn, kinds)]
    said = [(turn, text) for turn, text in texts if text.strip()]
    if len(said) == 1 and isinstance(said[0][0], HumanMessage):
        return said[0][1]
    return "\n\n".join(f"{_speaker(turn)}: {text}" for turn, text in said) or None


def question_or_error(
    messages: Sequence[BaseMessage], *, dialogue: bool = False, tool_results: bool = False
) -> str | MissingQuestionError:
    """Find the question of a conversation, as `question_of` does; where there is none, an error says why."""
    question = question_of(messages, dialogue=dialogue, tool_results=tool_results)
    if question is not None:
        return question
    last = _last_question(messages)
    if last is None:
        return MissingQuestionError("there is no human message in the conversation")
    blocks = messages[last].content
    kinds = (
        {str(block.get("type")) for block in blocks if isinstance(block, dict)} if isinstance(blocks, list) else set()
    )
    has = f"no text, only {', '.join(sorted(kinds))}" if kinds - {"text"} else "no text"
    hint = (
        "" if dialogue or not question_of(messages, dialogue=True) else " (dialogue=True takes what was said before it)"
    )
    return MissingQuestionError(f"the human message that it answers has {has}{hint}")


def _last_question(messages: Sequence[BaseMessage]) -> int | None:
    human = [index for index, message in enumerate(messages) if isinstance(message, HumanMessage)]
    return max((index for index in human if not _is_summary(messages[index])), default=human[-1] if human else None)


def _is_summary(message: BaseMessage) -> bool:
    # LangChain's summary of earlier turns comes as a human message. It is the question only where there is no other.
    return message.additional_kwargs.get("lc_source") == "summarization"


def _said(message: BaseMessage) -> str:
    text = text_of(message)
    return "".join(said for _, said in apart(text)).strip() if isinstance(message, AIMessage) and "<" in text else text


def _speaker(message: BaseMessage) -> str:
    return next(name for kind, name in _SPEAKERS.items() if isinstance(message, kind))


class _Places:
    """Maps places of an old text to places of a new one."""

    def __init__(self, old: str, new: str) -> None:
        self.new = new
        self._runs: list[tuple[int, int, int, int, bool]] = []
        at = to = 0
        for same, before, after in compare(old, new):
            self._runs.append((at, at + len(before), to, to + len(after), same))
            at, to = at + len(before), to + len(after)

    def end(self, place: int) -> int:
        """Find where the text before a place ends in the new text, with its replacement."""
        runs = ((run[2] + place - run[0] if run[4] else run[3]) for run in self._runs if run[0] < place <= run[1])
        return next(runs, 0)

    def span(self, start: int, stop: int) -> tuple[int, int] | None:
        """Find a span that did not change, or `None`."""
        for first, last, to, _, same in self._runs:
            if same and first <= start and stop <= last:
                return start + to - first, stop + to - first
        return None


def _rewritten_blocks(blocks: Sequence[Block], places: _Places) -> Iterator[Block]:
    last = max((at for at, block in enumerate(blocks) if _block_text(block) is not None), default=-1)
    at = to = 0
    for number, block in enumerate(blocks):
        old = _block_text(block)
        if old is None:
            yield block
            continue
        until = len(places.new) if number == last else max(to, places.end(at + len(old)))
        new = places.new[to:until]
        if new == old:
            yield block
        elif new:
            yield _moved({**block, "text": new}, places, at, to) if isinstance(block, dict) else new
        at, to = at + len(old), until


def _moved(block: dict[str, Any], places: _Places, at: int, to: int) -> dict[str, Any]:
    """Move the marks on a block's text, which was at `at` in the old text and is at `to` in the new one."""
    for key in _MARKS:
        marks = [_moved_mark(mark, places, at, to) for mark in block.pop(key, None) or []]
        if any(marks):
            block[key] = [mark for mark in marks if mark]
    return block


def _moved_mark(mark: Any, places: _Places, at: int, to: int) -> dict[str, Any] | None:
    if not isinstance(mark, dict) or not all(isinstance(mark.get(key), int) for key in ("start_index", "end_index")):
        return None
    span = places.span(at + mark["start_index"], at + mark["end_index"])
    return {**mark, "start_index": span[0] - to, "end_index": span[1] - to} if span else None


def _block_text(block: Block) -> str | None:
    if isinstance(block, str):
        return block
    text = block.get("text") if block.get("type") == "text" else None
    return text if isinstance(text, str) else None  # providers send text blocks whose text is null
