"""Server-sent events, read from a stream of bytes."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, AsyncIterator

DONE = "[DONE]"
"""The data of the last event of OpenAI's streams."""

_LONGEST = 16 * 2**20  # bytes of a line
_LINE_END = re.compile(rb"\r\n|\n|\r(?!\Z)")  # at the very end, a \n may follow


async def read_events(chunks: AsyncIterator[bytes]) -> AsyncGenerator[str, None]:
    """Give the data of each event in a stream of bytes; names, ids and comments are skipped.

    Raises:
        ValueError: If a line is too long, or is not UTF-8.
    """
    buffer, data = b"", list[bytes]()
    async for chunk in chunks:
        *lines, buffer = _LINE_END.split(buffer + chunk)
        if len(buffer) > _LONGEST:
            raise ValueError(f"a line has more than {_LONGEST} bytes")
        for line in lines:
            if line.startswith(b"data:"):
                data.append(line[5:].removeprefix(b" "))
            elif not line and data:
                yield _text(data)
                data = []
    if buffer.startswith(b"data:"):
        data.append(buffer[5:].strip())
    if data:
        yield _text(data)


def _text(data: list[bytes]) -> str:
    try:
        return b"\n".join(data).decode()
    except UnicodeDecodeError as exc:
        raise ValueError("it is not UTF-8") from exc
