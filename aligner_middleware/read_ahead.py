"""Prompts that go through the model while their answer is still being written."""

from __future__ import annotations

import asyncio
import contextlib
import time
import weakref
from collections.abc import AsyncIterable, AsyncIterator, Generator, Iterable, Iterator
from functools import partial
from typing import cast

from aligner_middleware.closing import aclosing
from aligner_middleware.codec import Codec
from aligner_middleware.engine import Prefill
from aligner_middleware.engine.runner import Runner
from aligner_middleware.forks import Lock
from aligner_middleware.steps import Step
from aligner_middleware.text import worker

Chunks = Iterable[str] | AsyncIterable[str]

_AHEAD, _AHEAD_SHARE = 32, 1 / 32  # characters of an answer that go through together; at least this share of it
_ENCODING_INTERVAL = 0.02  # seconds at least between two encodings of an unfinished answer


class ReadAhead:
    """Lets a prompt through the model while its answer is still being written. `Aligner.read_ahead` makes one.

    Args:
        scheduler: What runs the model.
        codec: What encodes the prompt.
        question: The question; for a blank one nothing is read.
        instruction: The instruction, as `Aligner.correct` takes it.

    Attributes:
        prefill: The part of the prompt that the engine has.
        released: The beginning of the answer that was decided on, and has been shown; empty, unless sentences are decided on
            (`sentences.py`).
    """

    def __init__(self, scheduler: Runner, codec: Codec, question: str, instruction: str | None = None) -> None:
        self.prefill = Prefill()
        self.released = ""
        self._scheduler = scheduler
        self._encode = partial(codec.encode_unfinished, question, instruction)
        blank = not isinstance(question, str) or not question.strip()  # the stream refuses it, at the answer's end
        self._most_characters = 0 if blank else codec.max_characters - len(question)
        self._chunks: list[str] = []
        self._length = 0
        self._read = 0
        self._encoded = 0.0
        self._reading = False
        self._lock = Lock()
        self._taken = False
        self._deciding = False
        weakref.finalize(self, scheduler.abandon, self.prefill).atexit = False  # a dropped one frees its place

    def feed(self, chunk: str) -> None:
        """Take in a chunk of the answer. It is encoded in another thread."""
        self._length += len(chunk)
        if self._length > self._most_characters:
            self._chunks.clear()
            return
        self._chunks.append(chunk)
        if self._reading:
            return
        now = time.monotonic()
        enough = self._length - self._read >= max(_AHEAD, self._read * _AHEAD_SHARE)
        if enough and now >= self._encoded + _ENCODING_INTERVAL:
            self._read, self._encoded, self._reading = self._length, now, True
            self._chunks = ["".join(self._chunks)]
            with contextlib.suppress(RuntimeError):  # Python is ending: the correction itself will say so
                worker.submit(partial(self._submit, self._chunks[0]))

    def _submit(self, answer: str) -> None:
        try:
            # An error, such as for half of a surrogate pair, is raised at the answer's end.
            prompt = self._encode(answer)
            with self._lock:
                if prompt and not self._taken and not self._deciding:
                    self.prefill.prompt = prompt
                    self._scheduler.prefill(self.prefill)
                    if self._taken:  # closed meanwhile, by the garbage collector in this very thread
                        self._scheduler.abandon(self.prefill)
        finally:
            self._reading = False

    @property
    def waiting(self) -> bool:
        """Whether there is something to decide on."""
        return False

    def decide(self) -> Generator[str | Step, None, str]:
        """Decide on what waits, in steps, and give the text that may be shown now."""
        yield from ()
        return ""

    def take(self) -> Prefill:
        """Read no further, and give the part that the engine has to a correction, which takes it over."""
        with self._lock:
            self._taken = True
        return self.prefill

    def close(self) -> None:
        """Free its place, unless a correction has taken it over."""
        self._scheduler.abandon(self.take())


class Gather:
    """Reads the chunks of an answer: up to one after which there is something to decide on, or to the end.

    Attributes:
        chunks: Those read so far.
        ended: Whether these are all.
    """

    def __init__(self, source: Chunks, ahead: ReadAhead) -> None:
        self.chunks: list[str] = []
        self.ended = False
        self._source = source
        self._ahead = ahead
        self._iterator: Iterator[str] | None = None
        self._aiterator: AsyncIterator[str] | None = None
        self._open = contextlib.AsyncExitStack()

    def run(self) -> None:
        """See `Step`."""
        if not isinstance(self._source, Iterable):
            raise TypeError("this answer is an async iterator: iterate its correction with `async for`")
        if self._iterator is None:
            self._iterator = iter(self._source)
        for chunk in self._iterator:
            self._add(chunk)
            if self._ahead.waiting:
                return
        self.ended = True

    async def arun(self) -> None:
        """See `Step`."""
        if self._aiterator is None:
            source = self._source if isinstance(self._source, AsyncIterable) else _beside_loop(self._source)
            self._aiterator = await self._open.enter_async_context(aclosing(source))
        async with contextlib.AsyncExitStack() as unless_paused:
            unless_paused.push_async_callback(self.aclose)
            async for chunk in self._aiterator:
                self._add(chunk)
                if self._ahead.waiting:
                    unless_paused.pop_all()
                    return
        self.ended = True

    async def aclose(self) -> None:
        """Close an async source, which no step does where the reader stops between two of them."""
        await self._open.aclose()

    def _add(self, chunk: str) -> None:
        self._ahead.feed(chunk)
        self.chunks.append(chunk)


async def _beside_loop(chunks: Iterable[str]) -> AsyncIterator[str]:
    """Iterate in other threads: the next chunk may take long."""
    iterator, end = iter(chunks), object()
    while (chunk := await asyncio.to_thread(next, iterator, cast(str, end))) is not end:
        yield chunk
