"""What comes along a chain: where its answer is, and the same value with another one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from langchain_core.messages import AIMessage, BaseMessage, convert_to_messages
from langchain_core.prompt_values import PromptValue

from aligner_middleware.errors import InputError, MissingQuestionError
from aligner_middleware.langchain.alignment import Aligned
from aligner_middleware.langchain.messages import question_or_error, text_of, with_metadata, with_text


@dataclass(frozen=True)
class Answer:
    """An answer in the value that holds it.

    Attributes:
        value: The value, to give back where nothing is done.
        text: Its text; empty where there is none, as in a bare tool call.
        message: The message that it came in, if it came in one.
        question: What was asked, where the value itself says so; an error where it shows why that is not known.
        put: Makes the same value with what became of the answer.
    """

    value: Any
    text: str
    message: AIMessage | None
    question: str | MissingQuestionError | None
    put: Callable[[Aligned], Any]

    @property
    def report(self) -> dict[str, Any]:
        """What an aligner has said of it before."""
        report = self.message.response_metadata.get("aligner") if self.message else None
        return report if isinstance(report, dict) else {}


def locate(value: Any, *, dialogue: bool = False, update: bool = False) -> Answer:
    """Find the answer in a value.

    Args:
        value: Text, an `AIMessage`, a dict with `question` and `answer`, a state with `messages` that end with the
            answer, or what one node of a graph made of such a state.
        dialogue: Whether the question of a state is its whole conversation.
        update: Whether a state is wanted back as an update of itself, its changed message alone.

    Raises:
        InputError: If the value is nothing that holds an answer.
    """
    if isinstance(value, str):
        return Answer(value, value, None, None, lambda aligned: aligned.text)
    if isinstance(value, AIMessage):
        return Answer(value, text_of(value), value, None, lambda aligned: aligned_message(value, aligned))
    if isinstance(value, Mapping):
        if "question" in value and "answer" in value:
            if value["answer"] is None:
                raise InputError("'answer' is None, expected text or an AIMessage")
            inner = locate(value["answer"])
            asked = _asked(value["question"], dialogue)
            return Answer(
                value, inner.text, inner.message, asked, lambda aligned: {**value, "answer": inner.put(aligned)}
            )
        if isinstance(value.get("messages"), list):
            return _locate_in_state(value, dialogue, update)
        if is_update(value):
            ((node, state),) = value.items()
            inner = locate(state)
            return Answer(value, inner.text, inner.message, None, lambda aligned: {node: inner.put(aligned)})
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


def aligned_message(message: AIMessage, aligned: Aligned) -> AIMessage:
    """Give the message with what became of its answer."""
    return with_metadata(with_text(message, aligned.text), aligner=aligned.report)


def _locate_in_state(state: Mapping[str, Any], dialogue: bool, update: bool) -> Answer:
    same = {"messages": []} if update else state
    *before, last = state["messages"] or [None]
    if not isinstance(last, AIMessage):  # it is not the model's turn
        return Answer(same, "", None, None, lambda aligned: same)

    def put(aligned: Aligned) -> Any:
        message = aligned_message(last, aligned)
        return {"messages": [message]} if update else {**state, "messages": [*before, message]}

    return Answer(same, text_of(last), last, question_or_error(before, dialogue=dialogue), put)


def _asked(question: Any, dialogue: bool) -> str | MissingQuestionError | None:
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
