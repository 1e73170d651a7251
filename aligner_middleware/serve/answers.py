"""The answers in a whole response of OpenAI's API: each aligned, all else kept."""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any

import httpx2
from fastapi import Response
from langchain_core.messages import AIMessage

from aligner_middleware.langchain.messages import text_of, with_text
from aligner_middleware.langchain.metadata import KEY
from aligner_middleware.langchain.outcome import Aligned
from aligner_middleware.serve.exchange import Exchange
from aligner_middleware.serve.upstream import headers_of, unreadable
from aligner_middleware.steps import together

Align = Callable[[str], Awaitable[Aligned]]


def parse_response(content: bytes) -> dict[str, Any]:
    """Read the upstream's JSON.

    Raises:
        Problem: 502, if it is no JSON object.
    """
    try:
        parsed = json.loads(content)
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        raise unreadable("it is no JSON object")
    return parsed


def json_response(body: Mapping[str, Any], upstream: httpx2.Response, seconds: float) -> Response:
    """Make the response to the client, with the headers that tell the first decision.

    Args:
        body: The upstream's, aligned.
        upstream: The upstream's response.
        seconds: That the alignment took.
    """
    headers = headers_of(upstream) | {
        "x-aligner-verdict": str(body.get(KEY, {}).get("verdict", "none")),
        "x-aligner-duration-ms": f"{seconds * 1000:.0f}",
    }
    # ASCII: the answer may hold half of a surrogate pair, which UTF-8 has no form for.
    return Response(json.dumps(body), 200, headers, media_type="application/json")


async def align_completion(exchange: Exchange, completion: dict[str, Any], upstream: httpx2.Response) -> Response:
    """Align every choice of a chat completion.

    Raises:
        Problem: 502, if it has no choices; and as of `Exchange.align`.
    """
    choices = completion.get("choices")
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise unreadable("it has no list of choices")
    start = time.perf_counter()
    aligned = await together([_aligned_choice(exchange, choice) for choice in choices])
    body = completion | {"choices": aligned} | ({KEY: aligned[0][KEY]} if aligned else {})
    return json_response(body, upstream, time.perf_counter() - start)


async def align_response(exchange: Exchange, response: dict[str, Any], upstream: httpx2.Response) -> Response:
    """Align every message in the output of the Responses API.

    Raises:
        Problem: 502, if it has no output; and as of `Exchange.align`.
    """
    start = time.perf_counter()
    body = await aligned_output(response, lambda index, item: aligned_item(item, exchange.align))
    return json_response(body, upstream, time.perf_counter() - start)


async def aligned_output(
    response: dict[str, Any], align: Callable[[int, Any], Coroutine[Any, Any, Any]]
) -> dict[str, Any]:
    """Align the output of a response of the Responses API.

    Args:
        response: The response.
        align: Aligns an item of its output; gets the item's index, too.

    Raises:
        Problem: 502, if it has no output; and as of `align`.
    """
    output = response.get("output")
    if not isinstance(output, list):
        raise unreadable("it has no list 'output'")
    items = await together([align(index, item) for index, item in enumerate(output)])
    body = response | {"output": items}
    first = next((item[KEY] for item in items if isinstance(item, dict) and KEY in item), None)
    body |= {KEY: first} if first else {}
    if isinstance(response.get("output_text"), str):  # the same texts once more
        body["output_text"] = "".join(output_text(item) for item in items)
    return body


async def _aligned_choice(exchange: Exchange, choice: dict[str, Any]) -> dict[str, Any]:
    message = choice.get("message")
    if not isinstance(message, dict):
        raise unreadable("a choice has no message")
    content, aligned, changed = await _aligned_content(message.get("content"), exchange.align)
    if changed:  # the source that is cited may not say what the correction says
        message = {key: value for key, value in message.items() if key != "annotations"} | {"content": content}
        choice = choice | {"message": message} | ({"logprobs": None} if "logprobs" in choice else {})
    return choice | {KEY: aligned.metadata}


async def aligned_item(item: Any, align: Align) -> Any:
    """Align an item of the output of the Responses API, where it is a message; others stay.

    Args:
        item: The item.
        align: Aligns its text.

    Raises:
        Problem: 502, if it is a message without a list of parts; and as of `align`.
    """
    if not isinstance(item, dict) or item.get("type") != "message":
        return item
    parts = item.get("content")
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise unreadable("a message has no list of parts")
    blocks = [part | {"type": "text"} if part.get("type") == "output_text" else part for part in parts]
    content, aligned, changed = await _aligned_content(blocks, align)
    if changed:
        content = [
            {key: value for key, value in block.items() if key != "logprobs"} | {"type": "output_text"}
            if block.get("type") == "text"
            else block
            for block in content
        ]
        item = item | {"content": content}
    return item | {KEY: aligned.metadata}


async def _aligned_content(content: Any, align: Align) -> tuple[Any, Aligned, bool]:
    """Align the content of a message: text, or parts; tell whether its text has changed."""
    try:
        message = AIMessage(content=content or "")
    except ValueError:
        raise unreadable("the content of a message is neither text nor a list of parts") from None
    text = text_of(message)
    aligned = await align(text)
    if aligned.text == text:
        return content, aligned, False
    return with_text(message, aligned.text).content, aligned, True


def output_text(item: Any) -> str:
    """Give the text of an item of the output of the Responses API; empty where it is no message."""
    if not isinstance(item, dict) or item.get("type") != "message":
        return ""
    parts = [part.get("text") for part in item.get("content") or () if part.get("type") == "output_text"]
    return "".join(text for text in parts if isinstance(text, str))
