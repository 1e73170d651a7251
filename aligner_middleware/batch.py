"""Requests that a thread runs at the same time, and waits for."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import closing

from aligner_middleware.codec import Codec
from aligner_middleware.correction import Correction
from aligner_middleware.deadline import Deadline
from aligner_middleware.engine import Generation
from aligner_middleware.engine.runner import Runner
from aligner_middleware.errors import InputError
from aligner_middleware.request import Request
from aligner_middleware.smaller import decode_smallest
from aligner_middleware.steps import run


def submit(scheduler: Runner, request: Request | InputError) -> Future[Generation] | None:
    """Queue a request's generation, if it has one."""
    if isinstance(request, InputError) or request.generation is None:
        return None
    return scheduler.submit(request.generation)


def run_together(
    codec: Codec,
    scheduler: Runner,
    requests: Sequence[Request | InputError],
    deadline: Deadline,
    *,
    return_exceptions: bool,
) -> list[Correction | Exception]:
    """Queue all requests at once, and wait for their corrections or errors, in order.

    Args:
        codec: Decodes the corrections.
        scheduler: Runs the generations.
        requests: What to run; an error becomes its own outcome.
        deadline: For all of them.
        return_exceptions: Whether an error is given in its place, instead of raising the first.
    """
    futures: list[Future[Generation] | None] = []
    outcomes: list[Correction | Exception] = []
    try:
        futures += (submit(scheduler, request) for request in requests)
        for request, future in zip(requests, futures, strict=True):
            outcome = _outcome(codec, scheduler, request, future, deadline)
            if isinstance(outcome, Exception) and not return_exceptions:
                try:
                    raise outcome
                finally:
                    del outcome  # its traceback would refer to itself, and keep the aligner alive
            outcomes.append(outcome)
        return outcomes
    finally:  # after an error, or an interrupt from the keyboard, nobody waits for the others
        for future in filter(None, futures):
            future.cancel()


def _outcome(
    codec: Codec,
    scheduler: Runner,
    request: Request | InputError,
    future: Future[Generation] | None,
    deadline: Deadline,
) -> Correction | Exception:
    if isinstance(request, InputError):
        return request
    try:
        if future is not None:
            deadline.result(future)
        with closing(decode_smallest(codec, scheduler, request, deadline)) as steps:
            return run(steps)
    except Exception as exc:
        return exc
