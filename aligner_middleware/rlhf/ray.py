"""Preference data on several machines: the job of `make_preferences` as a Ray Data pipeline; needs the `[ray]` extra.

Workers answer and correct, each with an aligner and a chat model of its own. This process records their rows in the same
journal: a worker that dies is replaced and its prompts are repeated, and an interrupted job resumes.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.data
import ray.exceptions

from aligner_middleware.aligner import Aligner
from aligner_middleware.artifact import Precision
from aligner_middleware.data.progress import Report, ignore
from aligner_middleware.data.prompts import Prompt
from aligner_middleware.data.upstream import chat_model
from aligner_middleware.errors import InputError
from aligner_middleware.rlhf.preferences import Form, PreferenceSummary, Row, collect, correct_prompts


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
    report: Report = ignore,
) -> PreferenceSummary:
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
        report: Called after each prompt, with the stage `preferences`.

    Raises:
        InputError: If a prompt has no answer and there is no upstream, or if the workers cannot load their models.
        ConfigError: If the journal was begun with other prompts or models.
        JobError: If a file cannot be read or written, or another process works on the job.
    """
    if upstream is None and any(prompt.answer is None for prompt in prompts):
        raise InputError("some prompts have no answer, and there is no model to ask: name one as upstream")
    with Aligner.load(model, precision=precision) as aligner:  # also builds it, once, for the workers of this machine
        identity = aligner.identity
    pool = _Workers(_Models(model, precision, upstream, concurrency), workers, batch, address)
    return collect(prompts, out, pool.correct, identity, upstream, form=form, sft=sft, report=report)


@dataclass(frozen=True)
class _Models:
    """The arguments of a worker.

    Attributes:
        model, precision: Of the aligner.
        upstream: The chat model's name.
        concurrency: Prompts under way at once.
    """

    model: str
    precision: Precision | None
    upstream: str | None
    concurrency: int


@dataclass(frozen=True)
class _Workers:
    """Processes of Ray that correct prompts.

    Attributes:
        models: Loaded by each.
        count: How many.
        batch: Prompts that one takes at once.
        address: Of the cluster.
    """

    models: _Models
    count: int
    batch: int
    address: str | None

    def correct(self, prompts: Sequence[Prompt]) -> Iterator[tuple[Prompt, Row]]:
        """Yield each prompt with its row or its error, in any order."""
        if not prompts:
            return
        self._connect()
        by_key = {prompt.key: prompt for prompt in prompts}
        try:
            for result in self._dataset(prompts).iter_rows():
                row: Row = InputError(result["error"]) if result["error"] else json.loads(result["row"])
                yield by_key[result["key"]], row
        except ray.exceptions.RayError as exc:  # its text is the worker's traceback, the reason last
            raise InputError(f"the workers on Ray failed: {str(exc).strip().splitlines()[-1]}") from exc

    def _connect(self) -> None:
        if not ray.is_initialized():
            ray.init(address=self.address, include_dashboard=False, log_to_driver=False, configure_logging=False)
        ray.data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)  # it logs every plan, and that it draws no bars

    def _dataset(self, prompts: Sequence[Prompt]) -> Any:
        blocks = max(self.count, -(-len(prompts) // self.batch))
        rows = [{"prompt": prompt.model_dump_json()} for prompt in prompts]
        return ray.data.from_items(rows, override_num_blocks=blocks).map_batches(
            _Worker,
            fn_constructor_args=(self.models,),
            batch_size=self.batch,
            compute=ray.data.ActorPoolStrategy(size=self.count),
            num_cpus=1,
        )


class _Worker:
    """A process of Ray: loads its models once, and corrects batches."""

    def __init__(self, models: _Models) -> None:
        self._aligner = Aligner.load(models.model, precision=models.precision)
        self._upstream = chat_model(models.upstream) if models.upstream else None
        self._concurrency = models.concurrency

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        prompts = [Prompt.model_validate_json(str(text)) for text in batch["prompt"]]
        rows = correct_prompts(prompts, self._aligner, self._upstream, self._concurrency)
        errors = [f"{type(row).__name__}: {row}" if isinstance(row, Exception) else "" for row in rows]
        texts = ["" if isinstance(row, Exception) else json.dumps(row) for row in rows]
        return {"key": [prompt.key for prompt in prompts], "row": texts, "error": errors}
