"""Answers that are decided on sentence by sentence while they are still being written (Stream Aligner, arXiv 2501.05336).

At a sentence's end the aligner gives its verdict on the answer up to there. Where that is to keep it, the text is released:
it is shown, and stays. At the first other verdict nothing more is released, and the whole answer is decided on at its end.
The last sentence always waits for that.

Unlike in the paper, the chat model does not go on from corrected sentences: it has written its own by then.
"""

from __future__ import annotations

import re
import time
from collections.abc import Generator
from functools import partial
from typing import Any

from aligner_middleware.codec import Codec
from aligner_middleware.deadline import Deadline
from aligner_middleware.engine.runner import Runner
from aligner_middleware.read_ahead import ReadAhead
from aligner_middleware.steps import Step, Wait, beside
from aligner_middleware.text.edits import whole_sentences
from aligner_middleware.text.reasoning import apart

_MAY_END = re.compile(r"[.!?…。！？\n\r]")
_PAUSE = 1.0  # after a verdict the next one waits so many times as long as it took: under load there are fewer


class SentenceAhead(ReadAhead):
    """Lets a prompt through the model while its answer is being written, and decides on sentences as they end.

    Args:
        scheduler: What runs the model.
        codec: What encodes the prompt; of an aligner with verdicts.
        question: The question; for a blank one nothing is read.
        timeout: Seconds that one verdict may take. One that fails or takes longer ends the decisions on sentences, and that
            on the whole answer says why.
        instruction: As `Codec.encode` takes it.
        options: As `Codec.encode` takes them.
    """

    def __init__(
        self,
        scheduler: Runner,
        codec: Codec,
        question: str,
        *,
        timeout: float | None = None,
        instruction: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(scheduler, codec, question, instruction)
        self._codec = codec
        self._encode_whole = partial(codec.encode, question, instruction=instruction, **options)
        self._timeout = timeout
        self._whole = ""  # all sentences that have ended
        self._may_end = False
        self._held = False
        self._next = 0.0

    @property
    def waiting(self) -> bool:
        """Whether a sentence waits for a decision."""
        return not self._held and len(self._whole) > len(self.released) and time.monotonic() >= self._next

    def feed(self, chunk: str) -> None:
        """Take in a chunk of the answer; see `ReadAhead.feed`."""
        super().feed(chunk)
        self._may_end = not self._held and (self._may_end or bool(_MAY_END.search(chunk)))
        if self._may_end:
            text = "".join(self._chunks)
            self._whole = _decidable(text)
            self._may_end = bool(_MAY_END.search(text, len(self._whole)))

    def decide(self) -> Generator[str | Step, None, str]:
        """Decide on the sentences that have ended, in steps.

        Returns:
            The text that may be shown now, after all that came before; empty where there is none.
        """
        if not self.waiting:
            return ""
        start, whole = time.monotonic(), self._whole
        try:
            self._held = not (yield from self._keeps(whole))
        except Exception:  # the decision on the whole answer will fail in the same way, and report it
            self._held = True
        now = time.monotonic()
        self._next = now + _PAUSE * (now - start)
        if self._held:
            return ""
        text = whole[len(self.released) :]
        self.released = whole
        return text

    def _keeps(self, answer: str) -> Generator[str | Step, None, bool]:
        deadline, future = Deadline(self._timeout), None
        with self._lock:
            self._deciding = True  # the prompt of this verdict is prefilled, and no other meanwhile
        try:
            request = yield from beside(partial(self._encode_whole, answer, self.prefill), deadline)
            if request.generation is None:
                return False
            request.for_verdict()
            future = self._scheduler.submit(request.generation)
            yield Wait(future, deadline)
            return self._codec.verdict(request) == "keep"
        finally:
            self._deciding = False
            if future is not None:
                future.cancel()


def _decidable(answer: str) -> str:
    """Give the beginning of an unfinished answer that can be decided on: whole sentences, up to any reasoning between them.

    Of JSON there is none: what becomes of half an object can only be told from the whole.
    """
    reasoning, text = apart(answer)[0]
    whole = "" if text.lstrip().startswith(("{", "[")) else whole_sentences(text)
    return reasoning + whole if whole.strip() else ""
