"""What one of a service's processes tells the others: each has a socket in a folder that all of them share."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable
from pathlib import Path

from aligner_middleware.errors import JobError

_LONGEST = 2**20  # bytes of a message; the system may allow less
_SUFFIX = ".relay"


class Relay:
    """Tells messages to the other processes, and takes theirs. Use it in the event loop's thread.

    It never waits: a message is lost to a process that cannot keep up, or has ended.

    Args:
        folder: The folder, which belongs to the service's user alone.
        take: Called with each message of another process.

    Raises:
        JobError: If the socket cannot be made, such as where the folder's path is too long for one.
    """

    def __init__(self, folder: Path, take: Callable[[str], None]) -> None:
        self._folder = folder
        self._take = take
        self._own = folder / f"{os.getpid()}{_SUFFIX}"
        self._own.unlink(missing_ok=True)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        try:
            self._socket.bind(str(self._own))
        except OSError as exc:
            self._socket.close()
            raise JobError(self._own, f"no socket can be made there ({exc}): set TMPDIR to another folder") from exc
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._socket, self._read)

    def tell(self, message: str) -> None:
        """Tell a message to all other processes."""
        data = message.encode()
        for path in self._folder.glob(f"*{_SUFFIX}"):
            if path == self._own:
                continue
            try:
                self._socket.sendto(data, str(path))
            except (ConnectionRefusedError, FileNotFoundError):  # its process was killed
                path.unlink(missing_ok=True)
            except OSError:  # it cannot keep up
                continue

    def close(self) -> None:
        """Take no more."""
        self._loop.remove_reader(self._socket)
        self._socket.close()
        self._own.unlink(missing_ok=True)

    def _read(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                self._take(self._socket.recv(_LONGEST).decode())
