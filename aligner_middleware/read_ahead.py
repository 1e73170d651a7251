"""Prompts that go through the model while their answer is still being written."""

from __future__ import annotations

import contextlib
import time
import weakref
from functools import partial

from aligner_middleware.codec import Codec
from aligner_middleware.engine import Prefill
from aligner_middleware.engine.runner import Runner
from aligner_middleware.forks import Lock
from aligner_middleware.text import worker

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
    """

    def __init__(self, scheduler: Runner, codec: Codec, question: str, instruction: str | None = None) -> None:
        self.prefill = Prefill()
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
                if prompt and not self._taken:
                    self.prefill.prompt = prompt
                    self._scheduler.prefill(self.prefill)
                    if self._taken:  # closed meanwhile, by the garbage collector in this very thread
                        self._scheduler.abandon(self.prefill)
        finally:
            self._reading = False

    def take(self) -> Prefill:
        """Read no further, and give the part that the engine has to a correction, which takes it over."""
        with self._lock:
            self._taken = True
        return self.prefill

    def close(self) -> None:
        """Free its place, unless a correction has taken it over."""
        self._scheduler.abandon(self.take())
