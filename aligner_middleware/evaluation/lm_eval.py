"""Runs tasks of lm-evaluation-harness on a model with and without an aligner. Needs the `[harness]` extra."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.model import LM, CachingLM
from lm_eval.tasks import TaskManager
from pydantic import BaseModel, ConfigDict

from aligner_middleware.aligner import Aligner
from aligner_middleware.data.disk import disk_errors
from aligner_middleware.data.progress import Progress, Report, ignore
from aligner_middleware.data.upstream import brief
from aligner_middleware.errors import AlignerError, InputError, did_you_mean
from aligner_middleware.evaluation.lm_eval_models import AlignedLM
from aligner_middleware.locations import HOME_ADVICE

_RESAMPLES = 1000  # of lm-eval's bootstrap, for standard errors


class BenchmarkRow(BaseModel):
    """A metric of a task, without and with the aligner.

    Attributes:
        task, metric: Their names in lm-eval.
        samples: Number of rows of the task.
        without, aligned: The metric without and with the aligner.
        stderr: Standard error of `without`, as lm-eval gives it; `None` where it gives none.
    """

    model_config = ConfigDict(frozen=True)

    task: str
    metric: str
    samples: int
    without: float
    aligned: float
    stderr: float | None


class BenchmarkResult(BaseModel):
    """The results of some tasks.

    Attributes:
        rows: Every metric of every task.
        changed: Number of generated answers that the aligner changed.
        passed: Number of inputs left uncorrected, because they are blank or do not fit into the aligner's context.
    """

    model_config = ConfigDict(frozen=True)

    rows: list[BenchmarkRow]
    changed: int
    passed: int


def run_benchmark(
    lm: LM,
    aligner: Aligner,
    tasks: Sequence[str],
    cache: Path,
    *,
    include: Path | None = None,
    limit: int | None = None,
    fewshot: int | None = None,
    chat: bool = True,
    seed: int = 0,
    report: Report = ignore,
) -> BenchmarkResult:
    """Run tasks of lm-eval on a model with and without an aligner. The model is called once for both.

    Args:
        lm: The model.
        aligner: The aligner.
        tasks: Names of tasks or groups, of lm-eval's own or in `include`.
        cache: SQLite file of the answers of this model, and no other; an interrupted run resumes from it.
        include: Folder of further tasks, as lm-eval's YAML.
        limit: Number of rows of each task to run, the first ones; `None` for all.
        fewshot: Number of examples before each question; `None` for the task's own number.
        chat: Whether prompts are written as chat messages, with the examples as turns.
        seed: Of the choice of examples.
        report: Told of runs done, 2 in all, at the stage "benchmark".

    Raises:
        InputError: If there is no such task, a task needs likelihoods that the model does not give, or lm-eval fails.
        UpstreamError: If a chat model fails.
        BuildError: If the cache cannot be written.
    """
    options = {
        **_options(chat, seed),
        "tasks": list(tasks),
        "limit": limit,
        "num_fewshot": fewshot,
        "task_manager": _task_manager(tasks, include),
    }
    with disk_errors(cache.parent, HOME_ADVICE):
        cache.parent.mkdir(parents=True, exist_ok=True)
    report(Progress("benchmark", 0, 2, "without the aligner"))
    without = _evaluate(lm, use_cache=str(cache), **options)
    report(Progress("benchmark", 1, 2, "with the aligner"))
    aligned = AlignedLM(CachingLM(lm, f"{cache}_rank0.db"), aligner)  # the name that lm-eval gives the cache
    rows = _rows(without, _evaluate(aligned, **options))
    report(Progress("benchmark", 2, 2))
    return BenchmarkResult(rows=rows, changed=aligned.changed, passed=aligned.passed)


def _task_manager(tasks: Sequence[str], include: Path | None) -> TaskManager:
    manager = TaskManager(include_path=str(include) if include else None)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise InputError(
            f"lm-eval has no task {', '.join(unknown)}: see `lm-eval ls tasks`, or name the folder of your own tasks"
            + did_you_mean(unknown[0], manager.all_tasks)
        )
    return manager


def _options(chat: bool, seed: int) -> dict[str, Any]:
    return {
        "apply_chat_template": chat,
        "fewshot_as_multiturn": chat,
        "bootstrap_iters": _RESAMPLES,
        "log_samples": False,
        "random_seed": seed,
        "numpy_random_seed": seed,
        "torch_random_seed": seed,
        "fewshot_random_seed": seed,
    }


def _evaluate(lm: LM, **options: Any) -> Any:
    try:
        return simple_evaluate(model=lm, **options)
    except AlignerError:
        raise
    except Exception as exc:  # such as a broken task file, or a provider without a key
        raise InputError(f"lm-eval failed: {brief(exc)}") from exc


def _rows(without: dict[str, Any], aligned: dict[str, Any]) -> list[BenchmarkRow]:
    """Pair the metrics of two results of lm-eval, whose names are `metric,filter`."""
    rows = []
    for task, metrics in without["results"].items():
        samples = int(without.get("n-samples", {}).get(task, {}).get("effective", 0))
        for name, value in metrics.items():
            metric, _, key = name.partition(",")
            if not isinstance(value, float | int) or not key or metric.endswith("_stderr"):
                continue
            stderr = metrics.get(f"{metric}_stderr,{key}")
            rows.append(
                BenchmarkRow(
                    task=task,
                    metric=metric if key == "none" else f"{metric}, {key}",
                    samples=samples,
                    without=value,
                    aligned=aligned["results"][task][name],
                    stderr=stderr if isinstance(stderr, float) else None,
                )
            )
    return rows
