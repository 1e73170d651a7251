"""Connections of the server: a request's head has to arrive in time, and whoever only listens is let go when it stops."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from aligner_middleware.serve.problems import Problem

# Keys of what the application gives the server in its lifespan's state.
STOPPING = "stopping"  # called when the server begins to stop, before it waits for running requests
PATIENCE = "patience"  # seconds in which a request's head has to arrive

CONNECTION = "aligner_middleware.serve.connections:Connection"


class Connection(H11Protocol):
    """uvicorn's connection, with a time limit of a request's head, and errors of OpenAI's shape.

    uvicorn has no such limit: whoever sends a byte a minute would keep a connection for good.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first request."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Take bytes of a request."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """Begin to wait for the next request."""
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no longer."""
        super().connection_lost(exc)
        self._unwatch()

    def shutdown(self) -> None:
        """Tell the application that the server stops; then end the connection, or let its request end."""
        if stopping := self.app_state.get(STOPPING):
            stopping()
        super().shutdown()

    def send_400_response(self, msg: str) -> None:
        """Refuse bytes that are no HTTP."""
        self._refuse(Problem(400, f"{msg} Expected HTTP/1.1 with at most 64 KiB of headers.", code="invalid_http"))

    def _watch(self) -> None:
        if self.transport.is_closing() or not (self.cycle is None or self.cycle.response_complete):
            self._unwatch()
        elif self._waiting is None and (patience := self.app_state.get(PATIENCE)):
            self._waiting = self.loop.call_later(patience, self._give_up, patience)

    def _unwatch(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def _give_up(self, patience: float) -> None:
        begun, _ = self.conn.trailing_data
        if not begun:  # a client may keep connections for later, and would take an answer for that to its next request
            self.transport.close()
            return
        message = f"the headers did not arrive within {patience:g} seconds"
        self._refuse(Problem(408, message, kind="timeout_error", code="headers_timeout"))

    def _refuse(self, problem: Problem) -> None:
        if self.transport.is_closing():
            return
        if self.conn.our_state is h11.IDLE:  # else a response has begun, or was given before its request was whole
            response = problem.response()
            headers = [*response.raw_headers, (b"connection", b"close")]
            for event in (
                h11.Response(status_code=response.status_code, headers=headers),
                h11.Data(data=bytes(response.body)),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
