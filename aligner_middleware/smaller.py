"""The smallest edit that suffices: sentences that an edit names without need come back.

A small model names a neighbour of the bad sentence with it at times, and of a sentence that lacks its end mark it removes the
good one that follows, too. The verdict knows better: each smaller edit is asked for its own, and the one that changes least
of those that are clearly kept takes the edit's place. Where none is, the edit stays. Only edits that can be smaller are asked
for, and all at once.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from functools import partial

from aligner_middleware.codec import Codec
from aligner_middleware.correction import Correction, Usage
from aligner_middleware.deadline import Deadline
from aligner_middleware.engine import Generation
from aligner_middleware.engine.runner import Runner
from aligner_middleware.errors import AlignerError
from aligner_middleware.request import Request
from aligner_middleware.steps import Step, Wait, beside
from aligner_middleware.text.edits import apply, share_kept, smaller_edits
from aligner_middleware.text.safeguards import doubts

_CLEAR = 0.1  # score up to which an edited answer is clearly kept; verdicts are sharp


def decode_smallest(
    codec: Codec, scheduler: Runner, request: Request, deadline: Deadline
) -> Generator[Step, None, Correction]:
    """Make a correction of a request whose generation is done, in steps.

    The edit is there by then: where smaller ones cannot be asked for, or take too long, it stands.

    Args:
        codec: What has encoded it.
        scheduler: Runs the verdicts on smaller edits.
        request: The request.
        deadline: For all steps.

    Raises:
        AlignerError: As `Aligner.correct` does.
    """
    generation = request.generation
    if codec.verdict(request) == "edit" and not codec.copies and generation and generation.finish_reason == "stop":
        try:
            smaller = yield from beside(partial(_encode, codec, request), deadline)
            yield from _decided(scheduler, smaller.values(), deadline)
        except AlignerError:
            return codec.decode(request)  # at once: the time may be over
        if smaller:
            return (yield from beside(partial(_choose, codec, request, smaller), deadline))
    return (yield from beside(partial(codec.decode, request), deadline))


def _decided(scheduler: Runner, generations: Iterable[Generation], deadline: Deadline) -> Generator[Step, None, None]:
    """Have all verdicts given at the same time."""
    futures: list[Future[Generation]] = []
    try:
        futures += map(scheduler.submit, generations)
        for future in futures:
            yield Wait(future, deadline)
    finally:
        for future in futures:
            future.cancel()


def _encode(codec: Codec, request: Request) -> dict[str, Generation]:
    """Encode each smaller edit of an answer that no safeguard objects to, for its verdict alone; by its text."""
    assert request.generation is not None
    try:
        found = codec.operations(request.generation, request.released_sentences)
        apply(request.text, found)
    except ValueError:  # they are no operations on this answer
        return {}
    texts = dict.fromkeys(apply(request.text, edit) for edit in smaller_edits(request.text, found))
    smaller = {}
    for text in texts:
        if not doubts(request.text, text, question=request.question):
            one = codec.encode(request.question, text, instruction=request.instruction or "").for_verdict()
            if one.generation is not None and not one.reasoning:  # a block that the verdict would not read
                smaller[text] = one.generation
    return smaller


def _choose(codec: Codec, request: Request, smaller: Mapping[str, Generation]) -> Correction:
    """Take the text that keeps most of the answer's words and is clearly kept itself, or the edit."""
    assert request.generation is not None and request.generation.rule is not None
    most = min(request.generation.rule.threshold, codec.calibration.log_odds(_CLEAR))
    kept, cost, seconds = list[str](), Usage(), 0.0
    for text, generation in smaller.items():
        cost += Usage(prompt_tokens=len(generation.prompt), passes=generation.passes)
        seconds = max(seconds, generation.seconds)  # they run at the same time
        if generation.log_odds is not None and generation.log_odds <= most:
            kept.append(text)
    best = max(kept, key=partial(share_kept, request.text), default=None)
    made = codec.decode(request) if best is None else codec.conclude(request, best, ())
    return replace(made, usage=made.usage + replace(cost, seconds=seconds))
