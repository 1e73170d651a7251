"""The calls that correct: one pair, several, or one as a stream, each for threads and for tasks.

They share a codec and a scheduler; `aligner.py` makes both.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable
from functools import partial
from typing import Any, Literal, get_args, overload

from aligner_middleware.batch import run_together, submit
from aligner_middleware.codec import Codec
from aligner_middleware.correction import Correction
from aligner_middleware.deadline import Deadline, check_timeout
from aligner_middleware.engine.runner import Runner
from aligner_middleware.errors import InputError
from aligner_middleware.read_ahead import Chunks, ReadAhead
from aligner_middleware.request import Request
from aligner_middleware.sentences import SentenceAhead
from aligner_middleware.settings import check_choice, check_released, check_verdicts, limits
from aligner_middleware.smaller import decode_smallest
from aligner_middleware.steps import arun, together
from aligner_middleware.streaming import CorrectionFlow, CorrectionStream
from aligner_middleware.strength import OnDoubt, Strength
from aligner_middleware.text import worker


class Corrector:
    """Corrects answers. It may be shared between threads and tasks: calls at the same time share passes of the model.

    Args:
        codec: Encodes pairs, and decodes corrections.
        scheduler: Runs the model.
    """

    def __init__(self, codec: Codec, scheduler: Runner) -> None:
        self._codec = codec
        self._scheduler = scheduler

    def correct(
        self,
        question: str,
        answer: str,
        *,
        timeout: float | None = None,
        strength: Strength = "medium",
        on_doubt: OnDoubt = "passthrough",
        instruction: str | None = None,
    ) -> Correction:
        """Correct one answer.

        A blank answer comes back as it is: an aligner corrects answers, it does not invent them. A block of reasoning at
        its beginning (`<think>…</think>`) stays as it is.

        Args:
            question: What was asked.
            answer: What was answered.
            timeout: Seconds after which it is given up; `None` waits for as long as it takes.
            strength: How willingly it corrects: a level, or the score above which it does. Of an aligner without verdicts a
                number is a tolerance: a token of the answer stays where its log probability is within so many nats of the
                best one's.
            on_doubt: What becomes of a correction that a safeguard objects to: `passthrough` gives the original answer,
                `raise` a `DoubtError`, `keep` the correction.
            instruction: How to correct, in words that the aligner was trained with, such as "more empathic" (paper, C.2.3);
                `None` for the aligner's own, an empty text for none. An aligner that was trained without instructions
                refuses one.

        Raises:
            InputError: If the question is blank, a text is not valid Unicode (it holds a lone surrogate), or an option is
                misspelt, out of range or not this aligner's.
            PromptTooLongError: If they do not fit into the aligner's context.
            CorrectionTimeoutError: If it took longer than `timeout`.
            DoubtError: If a safeguard objects and `on_doubt` is `raise`.
            ClosedError: If the aligner was closed.
        """
        pairs = [(question, answer)]
        return self.correct_batch(
            pairs, timeout=timeout, strength=strength, on_doubt=on_doubt, instruction=instruction
        )[0]

    @overload
    def correct_batch(
        self,
        pairs: Iterable[tuple[str, str]],
        *,
        timeout: float | None = None,
        strength: Strength = "medium",
        on_doubt: OnDoubt = "passthrough",
        instruction: str | None = None,
        return_exceptions: Literal[False] = False,
    ) -> list[Correction]: ...

    @overload
    def correct_batch(
        self,
        pairs: Iterable[tuple[str, str]],
        *,
        timeout: float | None = None,
        strength: Strength = "medium",
        on_doubt: OnDoubt = "passthrough",
        instruction: str | None = None,
        return_exceptions: Literal[True],
    ) -> list[Correction | Exception]: ...

    def correct_batch(
        self,
        pairs: Iterable[tuple[str, str]],
        *,
        timeout: float | None = None,
        strength: Strength = "medium",
        on_doubt: OnDoubt = "passthrough",
        instruction: str | None = None,
        return_exceptions: bool = False,
    ) -> list[Correction] | list[Correction | Exception]:
        """Correct several answers together, which costs less than one after the other.

        Args:
            pairs: Questions and answers.
            timeout: Seconds for all of them; what is not done by then is given up.
            strength: As `correct` takes it.
            on_doubt: As `correct` takes it.
            instruction: As `correct` takes it.
            return_exceptions: Whether a pair that cannot be corrected becomes its exception, instead of raising it.

        Returns:
            Corrections in the order of the pairs.

        Raises:
            AlignerError: As `correct` does, and InputError before anything is run, unless `return_exceptions`.
            ClosedError: In any case, if the aligner was closed.
            InputError: In any case, if an option is misspelt or out of range; no pair is read then.
        """
        options = self._options(timeout, strength, on_doubt, instruction)
        deadline = Deadline(timeout)
        encode = self._encode_or_error if return_exceptions else self._codec.encode
        requests = [encode(*pair, **options) for pair in pairs]
        return run_together(self._codec, self._scheduler, requests, deadline, return_exceptions=return_exceptions)

    async def acorrect(
        self,
        question: str,
        answer: str,
        *,
        timeout: float | None = None,
        strength: Strength = "medium",
        on_doubt: OnDoubt = "passthrough",
        instruction: str | None = None,
    ) -> Correction:
        """Correct one answer; the event loop stays free, and a task that is cancelled leaves its place to others.

        Raises:
            AlignerError: As `correct` does.
        """
        options = self._options(timeout, strength, on_doubt, instruction)
        deadline = Deadline(timeout)
        async with deadline.limit():
            encode = partial(self._codec.encode, question, answer, **options)
            request = await worker.run(encode)
            if future := submit(self._scheduler, request):
                await asyncio.wrap_future(future)
        with contextlib.closing(decode_smallest(self._codec, self._scheduler, request, deadline)) as steps:
            return await arun(steps)

    async def acorrect_batch(
        self,
        pairs: Iterable[tuple[str, str]],
        *,
        timeout: float | None = None,
        strength: Strength = "medium",
        on_doubt: OnDoubt = "passthrough",
        instruction: str | None = None,
    ) -> list[Correction]:
        """Correct several answers together, in the order of the pairs; raises what the first of them raises."""
        options = self._options(timeout, strength, on_doubt, instruction)
        return await together(self.acorrect(*pair, timeout=timeout, **options) for pair in pairs)

    def stream(
        self,
        question: str,
        answer: str | Chunks,
        *,
        by_sentence: bool = False,
        ahead: ReadAhead | None = None,
        released: str = "",
        timeout: float | None = None,
        strength: Strength = "medium",
        on_doubt: OnDoubt = "passthrough",
        instruction: str | None = None,
    ) -> CorrectionStream:
        """Correct one answer and give the corrected text as soon as nothing can take it back.

        An answer that is kept is given at once. A correction is given when it is whole and no safeguard objects; where
        `on_doubt` is `keep`, a copy is given as it is decoded.

        Args:
            question: The question.
            answer: The answer, or its chunks as they arrive: those that have arrived go through the model while the rest
                is on its way. Chunks of an async iterator need `async for`.
            by_sentence: Whether sentences are given as soon as the answer up to their end is kept. They stay, whatever comes
                later (docs/verdicts.md). An answer that is given as a whole, or with `ahead`, is not concerned.
            ahead: What has read the answer already, from `read_ahead`.
            released: The beginning of a whole answer that has been shown. It stays, and only what follows it is given.
            timeout: Seconds, from when the answer is there, after which the correction is given up.
            strength: As `correct` takes it.
            on_doubt: As `correct` takes it.
            instruction: As `correct` takes it; `ahead` has the same.

        Returns:
            The pieces of the text, to be iterated by `for` or by `async for`, which raise what `correct` raises; after
            them its `correction`.

        Raises:
            InputError: At once, if an option is misspelt, out of range, or needs verdicts that the aligner does not give; no
                chunk is read then.
        """
        options = self._options(timeout, strength, on_doubt, instruction) | {"released": released}
        check_released(released, answer)
        check_verdicts(self._codec.verdict_ids is not None, by_sentence=by_sentence, released=released)
        read_ahead = partial(
            self.read_ahead, by_sentence=by_sentence, timeout=timeout, strength=strength, instruction=instruction
        )
        options |= {"read_ahead": read_ahead, "ahead": ahead, "timeout": timeout}
        flow = CorrectionFlow(self._codec, self._scheduler, question, answer, **options)
        return CorrectionStream(flow)

    astream = stream

    def read_ahead(
        self,
        question: str,
        *,
        by_sentence: bool = False,
        timeout: float | None = None,
        strength: Strength = "medium",
        instruction: str | None = None,
    ) -> ReadAhead:
        """Get ready to read an answer that is still being written; `stream` takes it up when all is there.

        A wrong question or instruction costs time and nothing else, unless it decides.

        Args:
            question: The question.
            by_sentence: Whether it decides on sentences as they end, for at most `timeout` seconds each, by `strength`.
            timeout: As `correct` takes it.
            strength: As `correct` takes it.
            instruction: As `correct` takes it.

        Raises:
            InputError: If it should decide, and the aligner gives no verdicts, or an option is out of range.
        """
        if not by_sentence:
            return ReadAhead(self._scheduler, self._codec, question, instruction)
        self._options(timeout, strength, "passthrough", instruction)
        check_verdicts(self._codec.verdict_ids is not None, by_sentence=by_sentence)
        options: dict[str, Any] = {"timeout": timeout, "strength": strength, "instruction": instruction}
        return SentenceAhead(self._scheduler, self._codec, question, **options)

    def instruction_for(self, given: str | None) -> str | None:
        """Give the instruction that a call with `instruction=given` corrects by; `None` for none.

        Raises:
            InputError: If this aligner cannot correct by it, or needs one.
        """
        return self._codec.instruction_for(given) or None

    def _options(
        self, timeout: float | None, strength: Strength, on_doubt: OnDoubt, instruction: str | None
    ) -> dict[str, Any]:
        """Give the options of a call that its prompts depend on, after a check of all, before it reads anything."""
        check_timeout(timeout)
        limits(strength, self._codec.calibration, has_verdicts=self._codec.verdict_ids is not None)
        check_choice("on_doubt", on_doubt, get_args(OnDoubt))
        self._codec.instruction_for(instruction)
        return {"strength": strength, "on_doubt": on_doubt, "instruction": instruction}

    def _encode_or_error(self, question: str, answer: str, **options: Any) -> Request | InputError:
        try:
            return self._codec.encode(question, answer, **options)
        except InputError as exc:
            return exc
