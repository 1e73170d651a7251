"""Bodies of requests to OpenAI's API: read, checked as far as the service relies on them, and asked for their question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import Request
from langchain_core.messages import convert_to_messages

from aligner_middleware.data.json_lines import parse_json
from aligner_middleware.errors import MissingQuestionError
from aligner_middleware.langchain.messages import question_or_error
from aligner_middleware.langchain.structured import asks_for_structure
from aligner_middleware.serve.problems import Problem

_ROLES = ("system", "developer", "user", "assistant", "tool", "function")


async def read_object(request: Request) -> tuple[bytes, dict[str, Any]]:
    """Read a JSON object.

    Returns:
        The body as it came, and the object.

    Raises:
        Problem: 400, if it is none.
    """
    raw = await request.body()
    try:
        body = parse_json(raw)
    except ValueError as exc:
        raise Problem(400, f"the body is no JSON: {exc}", code="invalid_json") from None
    if not isinstance(body, dict):
        raise Problem(400, 'the body is no JSON object, such as {"model": …, "messages": […]}', code="invalid_json")
    return raw, body


def wants_stream(body: Mapping[str, Any]) -> bool:
    """Say whether a stream is asked for.

    Raises:
        Problem: 400, if `stream` is neither true nor false: upstreams may differ in how they take it.
    """
    stream = body.get("stream")
    if stream is not None and not isinstance(stream, bool):
        raise Problem(400, f"stream is {stream!r:.80}, expected true or false", code="invalid_value", param="stream")
    return bool(stream)


def is_structured(body: Mapping[str, Any]) -> bool:
    """Say whether a structured answer is asked for, which is not corrected.

    Raises:
        Problem: 400, if the body is nested too deeply to tell.
    """
    try:
        return asks_for_structure(body)
    except RecursionError:
        raise Problem(400, "the body is nested too deeply", code="invalid_json") from None


def chat_question(body: Mapping[str, Any]) -> str | MissingQuestionError:
    """Check the messages of a chat completion, and find the text of the last user message.

    Raises:
        Problem: 400, if `messages` is no list of messages with roles.
    """
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise _wrong("messages", "expected a list of messages, each with 'role' and 'content'")
    for place, message in enumerate(messages):
        if not isinstance(message, dict):
            raise _wrong(f"messages[{place}]", "expected an object with 'role' and 'content'")
        if message.get("role") not in _ROLES:
            given = f"the role is {message.get('role')!r:.80}"
            raise _wrong(f"messages[{place}].role", f"{given}, expected one of {', '.join(_ROLES)}")
    return _last_user_text(messages, "messages")


def response_question(body: Mapping[str, Any]) -> str | MissingQuestionError:
    """Find the text of the last user input of a request to the Responses API.

    Raises:
        Problem: 400, if `input` is neither text nor a list.
    """
    given = body.get("input")
    if given is None or isinstance(given, str):  # none with a stored prompt or conversation
        return _last_user_text([{"role": "user", "content": given}] if given is not None else [], "input")
    if not isinstance(given, list):
        raise _wrong("input", "expected text, or a list of messages and other items")
    users = [item for item in given if isinstance(item, dict) and item.get("role") == "user"]
    return _last_user_text([{**item, "content": _as_chat(item.get("content"))} for item in users[-1:]], "input")


def _last_user_text(messages: Sequence[Mapping[str, Any]], param: str) -> str | MissingQuestionError:
    last = next((message for message in reversed(messages) if message["role"] == "user"), None)
    try:
        given = [] if last is None else [{"role": "user", "content": last.get("content")}]
        return question_or_error(convert_to_messages(given))
    except (ValueError, NotImplementedError):
        reason = "the content of the last user message is neither text nor a list of parts"
        raise _wrong(param, reason) from None


def _as_chat(content: Any) -> Any:
    if not isinstance(content, list):
        return content
    return [
        {**part, "type": "text"} if isinstance(part, dict) and part.get("type") == "input_text" else part
        for part in content
    ]


def _wrong(param: str, reason: str) -> Problem:
    return Problem(400, f"{param}: {reason}", code="invalid_value", param=param)
