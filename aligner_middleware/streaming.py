"""A correction as a stream of text, for threads and for tasks.

What happens is written once, in `CorrectionFlow`: a generator that gives pieces of text, and steps that take time. A thread
runs a step, a task awaits it; `CorrectionStream` does either.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

from aligner_middleware.codec import Codec
from aligner_middleware.correction import Correction
from aligner_middleware.deadline import Deadline
from aligner_middleware.engine import Generation
from aligner_middleware.engine.runner import Runner
from aligner_middleware.read_ahead import Chunks, Gather, ReadAhead
from aligner_middleware.request import Request
from aligner_middleware.rest import decode_with_rest, encode_rest
from aligner_middleware.smaller import decode_smallest
from aligner_middleware.steps import EngineProgress, Step, Wait, arun, beside, run
from aligner_middleware.text.tokenizer import TextStream


class CorrectionStream(Iterator[str], AsyncIterator[str]):
    """The pieces of a corrected text, as soon as nothing can take them back. `Aligner.stream` makes one.

    Iterate it with `for` or with `async for`, once; then read `correction`. Nothing is done before that. Closing a stream,
    dropping it, or an error frees its place in the engine.

    Args:
        flow: What it does.
    """

    def __init__(self, flow: Flow) -> None:
        self._flow = flow
        self._steps = flow.steps()  # it does not refer to the stream: a dropped stream is collected at once
        self._active = False

    @property
    def correction(self) -> Correction:
        """The correction; its text is all pieces joined.

        Raises:
            RuntimeError: If the stream has not been iterated to its end.
        """
        if self._flow.correction is None:
            raise RuntimeError("this stream has no correction yet: iterate it to its end first")
        return self._flow.correction

    def __next__(self) -> str:
        """Give the next piece of text.

        Raises:
            AlignerError: As `Aligner.correct` does.
            TypeError: If the answer is an async iterator, which needs `async for`.
            RuntimeError: If another thread or task is iterating it.
            Exception: From the iterator of the answer's chunks.
        """
        with self._turn():
            text = run(self._steps)
        if text is None:
            raise StopIteration
        return text

    async def __anext__(self) -> str:
        """Give the next piece of text, and leave the event loop free; see `__next__`."""
        with self._turn():
            text = await arun(self._steps)
        if text is None:
            raise StopAsyncIteration
        return text

    def close(self) -> None:
        """End it, and free its place. It may be repeated.

        Raises:
            RuntimeError: If another thread or task is iterating it.
        """
        if self._active:
            raise RuntimeError("this stream is being iterated: it cannot be closed meanwhile")
        self._free()

    async def aclose(self) -> None:
        """Do as `close` does, and close the answer's async iterator."""
        self.close()
        await self._flow.aclose()

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """Let one thread or task iterate at a time, and free the place after an error."""
        if self._active:
            raise RuntimeError("this stream is being iterated already")
        self._active = True
        try:
            yield
        except BaseException:
            self._free()
            raise
        finally:
            self._active = False

    def _free(self) -> None:
        self._steps.close()
        self._flow.free()


class Flow(Protocol):
    """What a `CorrectionStream` does."""

    correction: Correction | None
    """The correction, at the end."""

    def steps(self) -> Generator[str | Step, None, None]:
        """Give pieces of text, and steps that are done before it goes on."""

    def free(self) -> None:
        """Give up what is under way."""

    async def aclose(self) -> None:
        """Close the answer's async iterator, if there is one."""


class CorrectionFlow:
    """Gathers an answer, encodes it, lets the engine run, and gives the text; see `Aligner.stream` for the arguments."""

    def __init__(
        self,
        codec: Codec,
        scheduler: Runner,
        question: str,
        answer: str | Chunks,
        *,
        read_ahead: Callable[[str], ReadAhead],
        ahead: ReadAhead | None,
        released: str,
        timeout: float | None,
        **options: Any,
    ) -> None:
        self.correction: Correction | None = None
        self._codec = codec
        self._scheduler = scheduler
        self._question = question
        self._answer = answer
        self._ahead = ahead
        self._read_ahead = read_ahead  # the aligner's own, which also keeps the aligner open as long as the stream
        self._released = released
        self._timeout = timeout
        self._options = options
        self._gather: Gather | None = None
        self._future: Future[Generation] | None = None
        self._progress = EngineProgress()

    def steps(self) -> Generator[str | Step, None, None]:
        """See `Flow`."""
        try:
            answer = yield from self._gathered()
            deadline = Deadline(self._timeout)
            prefill = self._ahead.take() if self._ahead else None
            options = {"released": self._released, **self._options}
            request = yield from beside(
                partial(self._codec.encode, self._question, answer, prefill, **options), deadline
            )
            rest: Request | None = None
            if request.generation is not None:
                moved = self._progress.next
                self._future = self._scheduler.submit(request.generation, self._progress.notify)
                if request.decodes_final_text or request.released:
                    yield Wait(moved, deadline)
                if request.decodes_final_text and not self._future.done():
                    # Where one pass is enough, the text is decoded as a whole.
                    yield from self._decode_gradually(request, request.generation, self._future, deadline)
                    return
                if request.released:
                    rest = yield from self._submit_rest(request, deadline)
                if self._future is not None:
                    yield Wait(self._future, deadline)
            if rest:
                self.correction = yield from beside(partial(decode_with_rest, self._codec, request, rest), deadline)
            else:
                self.correction = yield from decode_smallest(self._codec, self._scheduler, request, deadline)
            if text := self.correction.corrected[len(self._released) :]:
                yield text
        finally:
            self.free()

    def free(self) -> None:
        """See `Flow`."""
        if self._future is not None:
            self._future.cancel()
        if self._ahead is not None:
            self._ahead.close()

    async def aclose(self) -> None:
        """See `Flow`."""
        if self._gather is not None:
            await self._gather.aclose()

    def _gathered(self) -> Generator[str | Step, None, str]:
        """Read the answer's chunks. Those that have arrived go through the model while the rest is on its way."""
        if isinstance(self._answer, str):
            return self._answer
        self._ahead = ahead = self._ahead or self._read_ahead(self._question)
        self._gather = gather = Gather(self._answer, ahead)
        while not gather.ended:
            yield gather
            if text := (yield from ahead.decide()):
                yield text
        self._released = ahead.released
        return "".join(gather.chunks)

    def _submit_rest(self, request: Request, deadline: Deadline) -> Generator[str | Step, None, Request | None]:
        """Have the rest corrected in place of the whole, where the verdict asks for it."""
        rest = yield from beside(partial(encode_rest, self._codec, request), deadline)
        if rest is not None and self._future is not None:
            self._future.cancel()
            self._future = None if rest.generation is None else self._scheduler.submit(rest.generation)
        return rest

    def _decode_gradually(
        self, request: Request, generation: Generation, future: Future[Generation], deadline: Deadline
    ) -> Generator[str | Step, None, None]:
        """Give the text of a copy as it is decoded."""
        stream, pieces, read, done = self._codec.tokenizer.decode_stream(), [request.reasoning], 0, False
        if request.reasoning:
            yield request.reasoning
        while not done:
            moved, done = self._progress.next, future.done()  # before it is read: no progress from now on is missed
            if done:
                future.result()
            tokens = generation.tokens[read:]
            read += len(tokens)
            pieces.append((yield from beside(partial(_decode, stream, tokens, last=done), deadline)))
            if pieces[-1]:
                yield pieces[-1]
            if not done:
                yield Wait(moved, deadline)
        correction = yield from beside(partial(self._codec.decode, request), deadline)
        self.correction = replace(correction, corrected="".join(pieces))


def _decode(stream: TextStream, tokens: Sequence[int], *, last: bool) -> str:
    return stream.add(tokens) + (stream.rest() if last else "")
