"""The last decisions, and those that are just made, for whoever watches: as server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from aligner_middleware.serve.facts import texts
from aligner_middleware.serve.problems import Problem
from aligner_middleware.serve.relay import Relay
from aligner_middleware.serve.service import Decision

_RECENT = 30  # decisions of a client that a new watcher gets
_WAITING = 100  # events that wait for a slow watcher; more are dropped
_WATCHERS = 64
_CHARACTERS = 5_000  # of a text, in an event


@dataclass(eq=False)
class _Watcher:
    client: str
    events: asyncio.Queue[str | None] = field(default_factory=lambda: asyncio.Queue(_WAITING))
    missed: int = 0


class Feed:
    """Tells decisions to watchers, each of which sees those of one client. Use it in the event loop's thread.

    Args:
        silence: Seconds without an event after which a comment is sent, which shows whether a watcher is still there.
        folder: The folder that the processes of one service share, each of which then tells the decisions of all.

    Raises:
        JobError: If no socket can be made in the folder.
    """

    def __init__(self, silence: float, folder: Path | None = None) -> None:
        self._silence = silence
        self._relay = Relay(folder, self._take_from_another) if folder else None
        self._recent: dict[str, deque[str]] = {}
        self._watchers: set[_Watcher] = set()
        self._closed = False

    def __call__(self, decision: Decision) -> None:
        """Tell a decision."""
        client, event = decision.client.name, _event("decision", told(decision))
        self._take(client, event)
        if self._relay is not None:
            self._relay.tell(f"{client}\n{event}")

    def _take_from_another(self, message: str) -> None:
        client, _, event = message.partition("\n")
        self._take(client, event)

    def _take(self, client: str, event: str) -> None:
        self._recent.setdefault(client, deque(maxlen=_RECENT)).append(event)
        for watcher in self._watchers:
            if watcher.client != client:
                continue
            try:
                watcher.events.put_nowait(event)
            except asyncio.QueueFull:
                watcher.missed += 1

    def close(self) -> None:
        """End all streams, so that the server may stop."""
        if self._closed:
            return
        self._closed = True
        if self._relay is not None:
            self._relay.close()
            self._relay = None
        for watcher in self._watchers:
            while watcher.events.full():
                watcher.events.get_nowait()
            watcher.events.put_nowait(None)

    def watch(self, client: str) -> AsyncIterator[str]:
        """Give the last decisions of a client, and then each that is made, as server-sent events.

        Raises:
            Problem: 503, if too many watch already.
        """
        if len(self._watchers) >= _WATCHERS or self._closed:
            message = "the live log has too many readers, or the service is stopping: try again later"
            raise Problem(503, message, kind="server_error", code="too_many_watchers", retry_after=10)
        return self._watched(client)

    async def _watched(self, client: str) -> AsyncIterator[str]:
        watcher = _Watcher(client)
        self._watchers.add(watcher)
        try:
            yield "retry: 2000\n\n" + "".join(self._recent.get(client, ()))
            while not self._closed:
                try:
                    event = await asyncio.wait_for(watcher.events.get(), self._silence)
                except TimeoutError:
                    yield ": still here\n\n"
                    continue
                if watcher.missed:
                    missed, watcher.missed = watcher.missed, 0
                    yield _event("missed", {"count": missed})
                if event is not None:
                    yield event
        finally:
            self._watchers.discard(watcher)


def told(decision: Decision) -> dict[str, Any]:
    """Give what the live log tells of a decision: its texts only where the client's policy keeps them, and cut."""
    made = asdict(decision.facts)
    if decision.client.policy.keep_texts:
        for name, text in texts(decision)._asdict().items():
            made[name] = text if text is None or len(text) <= _CHARACTERS else text[:_CHARACTERS] + " …"
    return made


def _event(name: str, data: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"
