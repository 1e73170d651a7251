"""Preference data on several machines: the job of `make_preferences` by workers on Ray; needs the `[ray]` extra.

Workers answer and correct, each with an aligner and a chat model of its own (`bulk/ray.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from aligner_middleware.aligner import Aligner
from aligner_middleware.bulk.ray import RayWorkers, Work
from aligner_middleware.data.journal import Row
from aligner_middleware.data.progress import Report, ignore
from aligner_middleware.data.prompts import Prompt
from aligner_middleware.data.upstream import chat_model
from aligner_middleware.errors import InputError
from aligner_middleware.rlhf.preferences import Form, PreferenceSummary, collect, correct_prompts


def make_preferences_on_ray(
    prompts: Sequence[Prompt],
    out: Path,
    load: Callable[[], Aligner] = Aligner.load,
    upstream: str | None = None,
    *,
    workers: int = 2,
    batch: int = 16,
    form: Form = "messages",
    sft: Path | None = None,
    concurrency: int = 8,
    address: str | None = None,
    report: Report = ignore,
) -> PreferenceSummary:
    """Make the rows that `make_preferences` makes.

    Args:
        prompts: What to ask; those with an answer are not asked.
        out: File for the rows, JSON lines, on this machine.
        load: Gives the aligner, here once and in each worker; it is pickled, so take `functools.partial(Aligner.load, …)`.
            Each worker's machine must have the aligner, or be able to build it.
        upstream: The model that answers, by the name that `upstream.chat_model` takes.
        workers: How many.
        batch: Prompts that a worker takes at once.
        form: Rows of `messages` or of plain `text`.
        sft: File for the answers that were left as they are.
        concurrency: Prompts under way at once in each worker.
        address: Of a Ray cluster; `None` for the one that this process is part of, or a new one on this machine.
        report: Called after each batch of prompts, with the stage `preferences`.

    Raises:
        InputError: If a prompt has no answer and there is no upstream, or if the workers cannot load their models.
        ConfigError: If the journal was begun with other prompts or models.
        JobError: If a file cannot be read or written, or another process works on the job.
    """
    if upstream is None and any(prompt.answer is None for prompt in prompts):
        raise InputError("some prompts have no answer, and there is no model to ask: name one as upstream")
    with load() as aligner:  # also builds it, once, for the workers of this machine
        identity = aligner.identity
    on_ray = RayWorkers(partial(_prepare, load, upstream, concurrency), workers, batch, address)

    def run(todo: Mapping[str, Prompt]) -> Any:
        return on_ray.run({key: prompt.model_dump() for key, prompt in todo.items()})

    return collect(prompts, out, run, identity, upstream, form=form, sft=sft, report=report)


def _prepare(load: Callable[[], Aligner], upstream: str | None, concurrency: int) -> Work:
    """Load a worker's models."""
    aligner = load()
    answering = chat_model(upstream) if upstream else None

    def work(items: Sequence[Mapping[str, Any]]) -> list[Row]:
        return correct_prompts([Prompt.model_validate(item) for item in items], aligner, answering, concurrency)

    return work
