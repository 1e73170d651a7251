"""Finds the answer in a value that comes along a chain, and makes the same value with another answer.

Text, messages, dicts and states of a graph; nothing is corrected here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from langchain_core.messages import AIMessage, BaseMessage, convert_to_messages
from langchain_core.prompt_values import PromptValue

from aligner_middleware.errors import InputError, MissingQuestionError
from aligner_middleware.langchain.messages import question_or_error, text_of, with_metadata, with_text
from aligner_middleware.langchain.metadata import aligner_metadata
from aligner_middleware.langchain.outcome import Aligned


@dataclass(frozen=True)
class Answer:
    """An answer in the value that holds it.

    Attributes:
        value: The value, to return where nothing is done.
        text: The answer's text; empty where there is none, as in a bare tool call.
        message: The message that it came in, if it came in one.
        question: The question, where the value itself has it; an error where the value shows why it is not known.
        replace: Makes the same value with an aligned answer.
    """

    value: Any
    text: str
    message: AIMessage | None
    question: str | MissingQuestionError | None
    replace: Callable[[Aligned], Any]

    @property
    def metadata(self) -> dict[str, Any]:
        """The metadata that an aligner has left on its message."""
        return aligner_metadata(self.message)

    @property
    def message_id(self) -> str | None:
        """The id of its message, if it came in one."""
        return self.message.id if self.message else None


def find_answer(value: Any, *, dialogue: bool = False, update: bool = False) -> Answer:
    """Find the answer in a value.

    Args:
        value: Text, an `AIMessage`, a dict with `question` and `answer`, a state whose `messages` end with the answer, or
            the update that one node of a graph made of such a state.
        dialogue: Whether the question of a state is its whole conversation.
        update: Whether a state is wanted back as an update of itself, its changed message alone.

    Raises:
        InputError: If the value holds no answer.
    """
    if isinstance(value, str):
        return Answer(value, value, None, None, lambda aligned: aligned.text)
    if isinstance(value, AIMessage):
        return Answer(value, text_of(value), value, None, lambda aligned: _aligned_message(value, aligned))
    if isinstance(value, Mapping):
        if "question" in value and "answer" in value:
            return _find_beside_question(value, dialogue)
        if isinstance(value.get("messages"), list):
            return _find_in_state(value, dialogue, update)
        if is_update(value):
            ((node, state),) = value.items()
            inner = find_answer(state)
            return Answer(value, inner.text, inner.message, None, lambda aligned: {node: inner.replace(aligned)})
    raise InputError(
        "AlignerRunnable takes an answer: text, an AIMessage, a dict with 'question' and 'answer', or a state with "
        f"'messages', not {type(value).__name__}; it stands to the right of the model, as in llm | AlignerRunnable()"
    )


def is_update(value: Any) -> bool:
    """Say whether a value is what a graph streams: one node's name, and its update of the messages."""
    if not isinstance(value, Mapping) or len(value) != 1:
        return False
    (state,) = value.values()
    return isinstance(state, Mapping) and isinstance(state.get("messages"), list)


def _find_beside_question(value: Mapping[str, Any], dialogue: bool) -> Answer:
    if value["answer"] is None:
        raise InputError("'answer' is None, expected text or an AIMessage")
    inner = find_answer(value["answer"])

    def replace(aligned: Aligned) -> dict[str, Any]:
        return {**value, "answer": inner.replace(aligned)}

    return Answer(value, inner.text, inner.message, _given_question(value["question"], dialogue), replace)


def _find_in_state(state: Mapping[str, Any], dialogue: bool, update: bool) -> Answer:
    same = {"messages": []} if update else state
    *before, last = state["messages"] or [None]
    if not isinstance(last, AIMessage):  # it is not the model's turn
        return Answer(same, "", None, None, lambda aligned: same)

    def replace(aligned: Aligned) -> Any:
        message = _aligned_message(last, aligned)
        return {"messages": [message]} if update else {**state, "messages": [*before, message]}

    return Answer(same, text_of(last), last, question_or_error(before, dialogue=dialogue), replace)


def _aligned_message(message: AIMessage, aligned: Aligned) -> AIMessage:
    return with_metadata(with_text(message, aligned.text), aligner=aligned.metadata)


def _given_question(question: Any, dialogue: bool) -> str | MissingQuestionError | None:
    """Give the text of the question that a dict holds; an error where it has none, `None` where there is none."""
    if question is None or isinstance(question, str):
        return question
    if isinstance(question, BaseMessage) and (text := text_of(question)).strip():
        return text
    try:
        messages = (
            question.to_messages()
            if isinstance(question, PromptValue)
            else convert_to_messages(question if isinstance(question, list) else [question])
        )
    except (ValueError, NotImplementedError) as exc:
        kind = type(question).__name__
        raise InputError(
            f"'question' is of type {kind}, expected text, a message, a list of messages, or a prompt"
        ) from exc
    return question_or_error(messages, dialogue=dialogue)
