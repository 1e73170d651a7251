"""Aligns values that come along a chain. A value's job is its answer, and the question that the answer belongs to.

The question is the value's own, then the option `question`, then the recorded one (`question_record.py`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForChainRun, CallbackManagerForChainRun
from langchain_core.messages import BaseMessage

from aligner_middleware.langchain.alignment import Alignment
from aligner_middleware.langchain.answers import Answer, find_answer
from aligner_middleware.langchain.events import adispatch_event, dispatch_event
from aligner_middleware.langchain.outcome import Aligned
from aligner_middleware.langchain.piecewise import QuestionOrError
from aligner_middleware.langchain.question_record import RECORD

logger = logging.getLogger("aligner_middleware")

ChainRun = CallbackManagerForChainRun | AsyncCallbackManagerForChainRun


@dataclass(frozen=True)
class Job:
    """One answer to correct, and its question."""

    answer: Answer
    question: QuestionOrError


def align_values(alignment: Alignment, values: Sequence[Any], runs: Sequence[CallbackManagerForChainRun]) -> list[Any]:
    """Align values together, in their order.

    Args:
        alignment: The aligner and its options.
        values: Values that hold an answer.
        runs: The run of each value, which its event is dispatched from.

    Returns:
        The aligned values; a value whose correction fails becomes its exception, and the others are not held up.
    """
    jobs = [make_job(alignment, value, run) for value, run in zip(values, runs, strict=True)]
    outcomes = iter(alignment.align_pairs([(job.question, job.answer.text) for job in jobs if isinstance(job, Job)]))
    results = []
    for job, run in zip(jobs, runs, strict=True):
        result = next(outcomes) if isinstance(job, Job) else job
        if isinstance(job, Job) and isinstance(result, Aligned):
            dispatch_event(run, result.metadata)
            result = job.answer.replace(result)
        results.append(result)
    return results


async def aalign_values(
    alignment: Alignment, values: Sequence[Any], runs: Sequence[AsyncCallbackManagerForChainRun]
) -> list[Any]:
    """Give the same as `align_values`, and leave the event loop free."""
    calls = (_aalign_value(alignment, value, run) for value, run in zip(values, runs, strict=True))
    return list(await asyncio.gather(*calls))


async def _aalign_value(alignment: Alignment, value: Any, run: AsyncCallbackManagerForChainRun) -> Any:
    job = await amake_job(alignment, value, run)
    if not isinstance(job, Job):
        return job
    outcome = await alignment.aalign_pair(job.question, job.answer.text)
    if not isinstance(outcome, Aligned):
        return outcome
    await adispatch_event(run, outcome.metadata)
    return job.answer.replace(outcome)


def make_job(alignment: Alignment, value: Any, run: ChainRun) -> Any:
    """Make the job of a value.

    Args:
        alignment: The aligner and its options.
        value: The value that holds the answer.
        run: The run that the value came to.

    Returns:
        A `Job`; or at once the result: the value itself where there is nothing to correct, or an exception.
    """
    try:
        answer = find_answer(value, dialogue=alignment.dialogue, update="langgraph_node" in run.metadata)
        if not answer.text.strip() or alignment.has_aligned(answer.text, answer.metadata):
            return answer.value
        if RECORD.gave_structure(answer.text, answer.message_id, run.parent_run_id):
            return answer.value
        return Job(answer, _question(alignment, value, answer, run))
    except Exception as exc:
        if alignment.mode == "correct":
            return exc
        logger.warning("an answer was not aligned: %s", exc)
        return value


async def amake_job(alignment: Alignment, value: Any, run: ChainRun) -> Any:
    """Give the same as `make_job`, and leave the event loop free."""
    return await alignment.aquestion(make_job, alignment, value, run)


def early_question(alignment: Alignment, chunk: Any, run: ChainRun) -> str | None:
    """Find the question before the answer is whole; it only decides what is read ahead."""
    if isinstance(alignment.question, str):
        return alignment.question
    if alignment.question is not None:
        return None
    message_id = chunk.id if isinstance(chunk, BaseMessage) else None
    return RECORD.likely_question(message_id, run.parent_run_id, dialogue=alignment.dialogue)


def _question(alignment: Alignment, value: Any, answer: Answer, run: ChainRun) -> QuestionOrError:
    if isinstance(answer.question, str):
        return answer.question
    if isinstance(alignment.question, str):
        return alignment.question
    if alignment.question is not None:
        return alignment.ask(alignment.question, value)
    recorded = RECORD.find(answer.text, answer.message_id, run.parent_run_id, dialogue=alignment.dialogue)
    return recorded if isinstance(recorded, str) else answer.question or recorded
