"""Preference data on more than one machine: the job of `make_preferences` as a Ray Data pipeline; needs the `[ray]` extra.

Workers answer and correct, each with an aligner and a chat model of its own. This process writes down what they made, in the
same journal: a worker that dies is replaced and its prompts are done again, and a job that was killed goes on.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
import ray.data
import ray.exceptions

from aligner_middleware.aligner import Aligner
from aligner_middleware.artifact import Precision
from aligner_middleware.data.prompts import Prompt
from aligner_middleware.data.upstream import chat_model
from aligner_middleware.errors import InputError
from aligner_middleware.rlhf.preferences import Form, Made, Report, Row, collect, correct_prompts


def make_preferences_on_ray(
    prompts: Sequence[Prompt],
    out: Path,
    model: str = "default",
    upstream: str | None = None,
    *,
    precision: Precision | None = None,
    workers: int = 2,
    batch: int = 16,
    form: Form = "messages",
    sft: Path | None = None,
    concurrency: int = 8,
    address: str | None = None,
    report: Report = lambda done, of: None,
) -> Made:
    """Make the rows that `make_preferences` makes.

    Args:
        prompts: What to ask; those with an answer are not asked.
        out: File for the rows, JSON lines, on this machine.
        model: The aligner, by the name that `Aligner.load` takes; each worker's machine must have it, or be able to build it.
        upstream: The model that answers, by the name that `upstream.chat_model` takes.
        precision: Of the aligner, as `Aligner.load` takes it.
        workers: How many.
        batch: Prompts that a worker takes at once.
        form: Rows of `messages` or of plain `text`.
        sft: File for the answers that were left as they are.
        concurrency: Prompts under way at once in each worker.
        address: Of a Ray cluster; `None` for the one that this process is part of, or a new one on this machine.
        report: Called with how many prompts are done, and of how many.

    Raises:
        InputError: If a prompt has no answer and there is no upstream, or if the workers cannot load their models.
        DataError: If a file cannot be read or written.
    """
    if upstream is None and any(prompt.answer is None for prompt in prompts):
        raise InputError("some prompts have no answer, and there is no model to ask: name one as upstream")
    with Aligner.load(model, precision=precision) as aligner:  # also builds it, once, for the workers of this machine
        identity = aligner.identity

    def correct(todo: Sequence[Prompt]) -> Iterator[tuple[Prompt, Row]]:
        if not todo:
            return
        if not ray.is_initialized():
            ray.init(address=address, include_dashboard=False, log_to_driver=False, configure_logging=False)
        ray.data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)  # it tells of every plan, and that it draws no bars
        known = {prompt.key: prompt for prompt in todo}
        blocks = max(workers, -(-len(todo) // batch))
        data = ray.data.from_items(
            [{"prompt": prompt.model_dump_json()} for prompt in todo], override_num_blocks=blocks
        )
        done = data.map_batches(
            _Worker,
            fn_constructor_kwargs={
                "model": model,
                "precision": precision,
                "upstream": upstream,
                "concurrency": concurrency,
            },
            batch_size=batch,
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=1,
        )
        try:
            for made in done.iter_rows():
                row: Row = InputError(made["error"]) if made["error"] else json.loads(made["row"])
                yield known[made["key"]], row
        except ray.exceptions.RayError as exc:  # its text is the worker's traceback, the reason last
            raise InputError(f"the workers on Ray failed: {str(exc).strip().splitlines()[-1]}") from exc

    return collect(prompts, out, correct, identity, upstream, form=form, sft=sft, report=report)


class _Worker:
    """A process of Ray's: loads its models once, and takes batches."""

    def __init__(self, model: str, precision: Precision | None, upstream: str | None, concurrency: int) -> None:
        self._aligner = Aligner.load(model, precision=precision)
        self._upstream = chat_model(upstream) if upstream else None
        self._concurrency = concurrency

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        prompts = [Prompt.model_validate_json(str(text)) for text in batch["prompt"]]
        rows = correct_prompts(prompts, self._aligner, self._upstream, self._concurrency)
        errors = [f"{type(row).__name__}: {row}" if isinstance(row, Exception) else "" for row in rows]
        made = ["" if isinstance(row, Exception) else json.dumps(row) for row in rows]
        return {"key": [prompt.key for prompt in prompts], "row": made, "error": errors}
