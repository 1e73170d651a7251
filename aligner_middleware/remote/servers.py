"""The servers that run the same aligner: which one gets the next answer, and which ones are out of service."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
from collections.abc import AsyncIterator, Sequence

from aligner_middleware.errors import RemoteError
from aligner_middleware.remote.client import Client
from aligner_middleware.remote.detection import Served, Speak, detect

logger = logging.getLogger(__name__)

_PREFIX = 48  # tokens of a prompt's beginning by which equal beginnings go to the same server, whose cache holds them
_SLACK = 2  # answers that a server may have more than the least loaded one, and still be preferred for its cache
_INTERVAL = 1.0  # seconds between two looks at a server that is out of service


class Server:
    """One server.

    Args:
        url: Address of its OpenAI API.
        served: What it serves; `None` while that is not known.
        most: Most requests at once; more wait.

    Attributes:
        url, served: As given.
        running: How many answers it is working on.
        down: Whether it is out of service.
    """

    def __init__(self, url: str, served: Served | None, most: int) -> None:
        self.url = url
        self.served = served
        self.running = 0
        self.down = served is None
        self._places = asyncio.Semaphore(most)

    @property
    def full(self) -> bool:
        """Whether a further request would have to wait."""
        return self._places.locked()

    @contextlib.asynccontextmanager
    async def place(self) -> AsyncIterator[Served]:
        """Wait for a place among its requests, and give what it serves.

        Raises:
            RemoteError: If that is not known, because it has not been reached yet.
        """
        async with self._places:
            if self.served is None:
                raise RemoteError(f"{self.url} has not been reached yet", temporary=True)
            yield self.served


class Servers:
    """All servers, for one event loop.

    Args:
        client: Asks them.
        known: Address of each, and what it serves, `None` where it could not be reached; at least one.
        most: Most requests to each at once.
        speak: As `detect` takes it.
    """

    def __init__(
        self, client: Client, known: Sequence[tuple[str, Served | None]], most: int, speak: Speak | None = None
    ) -> None:
        self._client = client
        self._speak = speak
        self._all = [Server(url, served, most) for url, served in known]
        self._model = next((served.model for _, served in known if served), None)
        self._looking: dict[Server, asyncio.Task[None]] = {}

    def choose(self, prompt: Sequence[int]) -> Server:
        """Choose a server for an answer: one of the least loaded, and of these always the same for equal beginnings."""
        for server in self._all:
            if server.down:
                self._look_for(server)
        up = [server for server in self._all if not server.down] or self._all
        most = min(server.running for server in up) + _SLACK
        beginning = repr(list(prompt[:_PREFIX]))

        def affinity(server: Server) -> bytes:
            return hashlib.sha256(f"{server.url} {beginning}".encode()).digest()

        return max((server for server in up if server.running <= most), key=affinity)

    def failed(self, server: Server) -> bool:
        """Take a server out of service until it is well again; running answers may end. Tell whether others are in it."""
        if not server.down and len(self._all) > 1:
            logger.warning("%s is out of service until it answers again", server.url)
        server.down = True
        self._look_for(server)
        return any(not other.down for other in self._all)

    def _look_for(self, server: Server) -> None:
        if server not in self._looking:
            task = self._looking[server] = asyncio.create_task(self._look(server))
            task.add_done_callback(lambda _: self._looking.pop(server, None))

    async def _look(self, server: Server) -> None:
        """Ask a server until it serves the model again."""
        while server.down:
            try:
                server.served = await detect(self._client, server.url, self._model, self._speak)
                server.down = False
            except RemoteError as exc:
                logger.debug("%s is still out of service: %s", server.url, exc)
                await asyncio.sleep(_INTERVAL)
