"""A response of the Responses API that arrives in events: the text of its messages is held back, decided, and sent.

Events of a message are held back from its first part to its end. A message that is kept is sent as it came, one that is
changed as a part with one piece of text. All else passes at once, such as reasoning and tool calls; in shadow mode, and where
nothing is to be decided, messages pass, too.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing
from typing import Any

from aligner_middleware.langchain.outcome import Aligned
from aligner_middleware.remote.sse import DONE
from aligner_middleware.serve.answers import aligned_item, aligned_output, output_text, parse_response
from aligner_middleware.serve.exchange import Arriving, Exchange
from aligner_middleware.serve.problems import Problem, upstream_failed, upstream_problem
from aligner_middleware.serve.sse import Put, event
from aligner_middleware.serve.upstream import unreadable

_NAME = re.compile(r"[\w.-]+")
_BEGINS = ("response.created", "response.queued", "response.in_progress")
_ENDS = ("response.completed", "response.incomplete", "response.failed")
_ADDED, _DONE = "response.output_item.added", "response.output_item.done"
_DELTA = "response.output_text.delta"
_BLANK = {"text": "", "annotations": []}
# Events of these kinds are of a message, also where the upstream has not announced it.
_OF_MESSAGES = ("response.output_text.", "response.content_part.", "response.refusal.")


class _Message(Arriving):
    """A message that is arriving, and its events that are held back."""

    def __init__(self, exchange: Exchange) -> None:
        super().__init__(exchange)
        self.held: list[dict[str, Any]] = []

    async def decided(self, text: str) -> Aligned:
        """Align its text, as its end has it."""
        async with aclosing(self.aligned(text)) as pieces:
            return [piece async for piece in pieces if isinstance(piece, Aligned)][-1]


class AlignedEvents:
    """Aligns the events of one response. Use it once.

    Args:
        exchange: The request.
        events: The data of the upstream's events.
    """

    def __init__(self, exchange: Exchange, events: AsyncIterator[str]) -> None:
        self._exchange = exchange
        self._events = events
        self._kinds: dict[int, Any] = {}  # of the items, by their index in the output
        self._open: dict[int, _Message] = {}
        self._aligned: dict[int, Any] = {}  # messages that were decided
        self._number = 0  # of the next event

    async def run(self, put: Put) -> None:
        """Put the aligned events.

        Raises:
            Problem: If the upstream fails or breaks off, or a correction fails and the policy says `raise`.
        """
        ended = False
        try:
            async for data in self._events:
                if data.strip() == DONE:  # which OpenAI's own API does not send here
                    continue
                given = parse_response(data.encode())
                kind = _kind(given)
                async with aclosing(self._taken(kind, given)) as events:
                    async for made in events:
                        await put(self._event(made))
                if ended := kind in _ENDS:
                    break
        finally:
            for message in self._open.values():
                message.close()
        if not ended:
            raise upstream_failed("the upstream broke off before its response was whole")

    def failed(self, problem: Problem) -> bytes:
        """Make the event of an error: as the Responses API has it, and with `error` as all other routes do."""
        error = problem.body["error"]
        fields = {name: error.get(name) for name in ("code", "message", "param")}
        return self._event({"type": "error"} | fields | {"error": error})

    def _event(self, content: dict[str, Any]) -> bytes:
        number, self._number = self._number, self._number + 1
        return event(content | {"sequence_number": number}, content["type"])

    async def _taken(self, kind: str, given: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """Take an event, and give those that can be sent now."""
        if kind in _BEGINS:
            yield self._begun(given)
        elif kind in _ENDS:
            response = {"output": []} | _object(given, "response")
            yield given | {"response": await aligned_output(response, self._align_output)}
        elif kind == _ADDED:
            yield self._added(given)
        elif kind == _DONE:
            async for made in self._done(given):
                yield made
        elif (message := self._message(kind, given)) is None:
            yield given
        else:
            if kind == _DELTA:
                message.add(_text(given, "delta"))
            if self._exchange.holds:
                message.held.append(given)
            else:
                yield given

    def _begun(self, given: dict[str, Any]) -> dict[str, Any]:
        response = _object(given, "response")
        if not self._exchange.holds or not response.get("output"):
            return given
        return given | {"response": response | {"output": []}}

    def _added(self, given: dict[str, Any]) -> dict[str, Any]:
        item = _object(given, "item")
        self._kinds[_index(given)] = item.get("type")
        if item.get("type") != "message":
            return given
        self._open[_index(given)] = _Message(self._exchange)
        return given | {"item": item | {"content": []}} if self._exchange.holds else given

    def _message(self, kind: str, given: dict[str, Any]) -> _Message | None:
        """Find the message that an event is of; `None` where it is of something else."""
        if "output_index" not in given and not kind.startswith(_OF_MESSAGES):
            return None
        index = _index(given)
        if self._kinds.get(index, "message" if kind.startswith(_OF_MESSAGES) else None) != "message":
            return None
        return self._open.setdefault(index, _Message(self._exchange))

    async def _done(self, given: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        item, index = _object(given, "item"), _index(given)
        if item.get("type") != "message":
            yield given
            return
        message = self._open.pop(index, None) or _Message(self._exchange)
        try:
            aligned = await aligned_item(item, message.decided)
        finally:
            message.close()
        self._aligned[index] = aligned
        if self._exchange.holds:
            as_it_came = aligned["content"] == item["content"] and output_text(item) == message.text
            for made in message.held if as_it_came else _events_of(aligned, given):
                yield made
        yield given | {"item": aligned}

    async def _align_output(self, index: int, item: Any) -> Any:
        """Give an item of the whole response as it was sent; one that was not sent is aligned."""
        return self._aligned[index] if index in self._aligned else await aligned_item(item, self._exchange.align)


def _events_of(item: dict[str, Any], given: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Make the events of a message whose text has changed, each part in one piece."""
    for place, part in enumerate(item["content"]):
        at = {"item_id": item.get("id"), "output_index": given["output_index"], "content_index": place}
        is_text = part.get("type") == "output_text"
        yield {"type": "response.content_part.added"} | at | {"part": part | _BLANK if is_text else part}
        if is_text:
            yield {"type": _DELTA} | at | {"delta": part["text"], "logprobs": []}
            yield {"type": "response.output_text.done"} | at | {"text": part["text"], "logprobs": []}
        yield {"type": "response.content_part.done"} | at | {"part": part}


def _kind(given: dict[str, Any]) -> str:
    kind = given.get("type")
    if kind == "error" or (kind is None and given.get("error")):
        raise upstream_problem(given.get("error") or given)
    if not isinstance(kind, str) or not _NAME.fullmatch(kind):
        raise unreadable("an event has no type")
    return kind


def _object(given: dict[str, Any], name: str) -> dict[str, Any]:
    value = given.get(name)
    if not isinstance(value, dict):
        raise unreadable(f"the {name} of an event is no object")
    return value


def _text(given: dict[str, Any], name: str) -> str:
    value = given.get(name)
    if not isinstance(value, str):
        raise unreadable(f"the {name} of an event is no text")
    return value


def _index(given: dict[str, Any]) -> int:
    index = given.get("output_index")
    if not isinstance(index, int):
        raise unreadable("the output_index of an event is no number")
    return index
