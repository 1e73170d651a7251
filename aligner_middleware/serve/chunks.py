"""A chat completion that arrives in chunks: its text is held back and read ahead, decided, and sent in chunks again.

Roles, tool calls, reasoning and all else that is not the answer's text pass at once. In shadow mode, and where nothing is to
be decided, the text passes, too. By the policy's `by_sentence` sentences are sent as they are decided.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from aligner_middleware.langchain.metadata import KEY
from aligner_middleware.langchain.outcome import Aligned
from aligner_middleware.remote.sse import DONE
from aligner_middleware.serve.answers import parse_response
from aligner_middleware.serve.exchange import Arriving, Exchange
from aligner_middleware.serve.problems import Problem, upstream_failed, upstream_problem
from aligner_middleware.serve.sse import Put, event
from aligner_middleware.serve.upstream import unreadable

# Fields of a chunk that say which response it is of.
_IDENTITY = ("id", "object", "created", "model", "system_fingerprint", "service_tier", "provider")
# Fields of a choice that some upstreams repeat the whole text in.
_COPIES = ("message", "text")


class _Answer(Arriving):
    """The answer of one choice, and what is held back beside its text."""

    def __init__(self, exchange: Exchange) -> None:
        super().__init__(exchange)
        self.annotations: list[Any] = []
        self.logprobs: list[Any] = []


class AlignedChunks:
    """Aligns the chunks of one chat completion. Use it once.

    Args:
        exchange: The request.
        events: The data of the upstream's events.
    """

    def __init__(self, exchange: Exchange, events: AsyncIterator[str]) -> None:
        self._exchange = exchange
        self._events = events
        self._open: dict[int, _Answer] = {}  # by index of its choice
        self._all: list[_Answer] = []
        self._last: list[dict[str, Any]] = []  # chunks of usage, after all answers
        self._identity: dict[str, Any] = {}

    async def run(self, put: Put) -> None:
        """Put the aligned events.

        Raises:
            Problem: If the upstream fails or breaks off, or a correction fails and the policy says `raise`.
        """
        try:
            async with asyncio.TaskGroup() as group:
                await self._read(put, group)
        except ExceptionGroup as errors:
            raise _first(errors) from None
        finally:
            for answer in self._all:
                answer.close()
        for chunk in self._last:
            await put(event(chunk))
        await put(event(DONE))

    def failed(self, problem: Problem) -> bytes:
        """Make the event of an error."""
        return event(problem.body)

    async def _read(self, put: Put, group: asyncio.TaskGroup) -> None:
        done = False
        async for data in self._events:
            if done := data.strip() == DONE:
                break
            chunk = parse_response(data.encode())
            if error := chunk.get("error"):
                raise upstream_problem(error)
            self._identity = {key: chunk[key] for key in _IDENTITY if key in chunk}
            await self._take(chunk, put, group)
            await self._release(put)
        if not done and (self._open or not self._all):
            raise upstream_failed("the upstream broke off before its answer was whole")
        for index, answer in self._open.items():  # upstreams that give no reason for the end
            group.create_task(self._finish(put, self._chunk(index, {}), answer))

    async def _take(self, chunk: dict[str, Any], put: Put, group: asyncio.TaskGroup) -> None:
        choices = chunk.get("choices")
        if not choices:
            if chunk.get("usage"):
                self._last.append(chunk)
            else:
                await put(event(chunk))
            return
        if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
            raise unreadable("its choices are no list of objects")
        passing, ending = [], []
        for choice in choices:
            choice = self._without_text(choice)
            finish = choice.get("finish_reason")
            if any(choice["delta"].values()):
                passing.append(choice | {"finish_reason": None} if finish else choice)
            if finish:
                ending.append(choice | {"delta": {}})
        if passing or (chunk.get("usage") and not ending):
            shared = {key: value for key, value in chunk.items() if key != "usage"} if ending else chunk
            await put(event(shared | {"choices": passing}))
        for place, choice in enumerate(ending):
            shared = {key: value for key, value in chunk.items() if key != "usage"} if place else chunk
            answer = self._open.pop(_index(choice))
            group.create_task(self._finish(put, shared | {"choices": [choice]}, answer))

    def _without_text(self, choice: dict[str, Any]) -> dict[str, Any]:
        """Take the text of a choice into its answer, and give what passes at once."""
        index = _index(choice)
        if index not in self._open:
            self._open[index] = _Answer(self._exchange)
            self._all.append(self._open[index])
        answer, delta = self._open[index], choice.get("delta")
        if delta is not None and not isinstance(delta, dict):
            raise unreadable("a delta is no object")
        delta = dict(delta or {})
        text, rest = _apart(delta.get("content"))
        answer.add(text)
        if not self._exchange.holds:
            return choice | {"delta": delta}
        if text:
            delta.pop("content")
            delta |= {"content": rest} if rest else {}
        answer.annotations += _list(delta.pop("annotations", None))
        choice = {key: value for key, value in choice.items() if key not in _COPIES} | {"delta": delta}
        if isinstance(logprobs := choice.get("logprobs"), dict):
            answer.logprobs += _list(logprobs.get("content"))
            choice["logprobs"] = None
        return choice

    async def _release(self, put: Put) -> None:
        """By the policy's `by_sentence`, decide on the sentences that have ended, and send those that are kept."""
        for index, answer in self._open.items():
            if text := await answer.release():
                await put(event(self._chunk(index, {"content": text})))

    async def _finish(self, put: Put, chunk: dict[str, Any], answer: _Answer) -> None:
        """Decide an answer, send its text, and then the last chunk of its choice with the decision."""
        (choice,), text = chunk["choices"], answer.text
        async with aclosing(answer.aligned(text)) as pieces:
            async for piece in pieces:
                if isinstance(piece, Aligned):
                    aligned = piece
                elif self._exchange.holds:
                    await put(event(self._chunk(_index(choice), {"content": piece})))
        if aligned.text == text:  # else these are about another text
            choice |= {"logprobs": {"content": answer.logprobs}} if answer.logprobs else {}
            choice["delta"] |= {"annotations": answer.annotations} if answer.annotations else {}
        await put(event(chunk | {"choices": [choice | {KEY: aligned.metadata}]}))

    def _chunk(self, index: int, delta: dict[str, Any]) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        return self._identity | {"choices": [choice]}


def _index(choice: dict[str, Any]) -> int:
    index = choice.get("index", 0)
    if not isinstance(index, int):
        raise unreadable("the index of a choice is no number")
    return index


def _apart(content: Any) -> tuple[str, list[Any]]:
    """Split the content of a delta into its text, and the parts that are none."""
    if content is None or isinstance(content, str):
        return content or "", []
    if not isinstance(content, list):
        raise unreadable("the content of a delta is neither text nor a list of parts")
    texts, rest = [], []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict) and part.get("type") == "text":
            texts.append(str(part.get("text") or ""))
        else:
            rest.append(part)
    return "".join(texts), rest


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _first(errors: BaseExceptionGroup[Any]) -> Any:
    error = errors.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
