"""`aligner benchmark`: tasks of lm-evaluation-harness on a model with and without the aligner."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from aligner_middleware.cli.arguments import (
    ConcurrencyOption,
    JsonOption,
    ModelOption,
    PrecisionOption,
    UpstreamOption,
    precision_of,
)
from aligner_middleware.cli.output import write, write_json
from aligner_middleware.cli.progress import resumable, showing
from aligner_middleware.data.files import fingerprint
from aligner_middleware.data.progress import Progress
from aligner_middleware.errors import MissingExtraError
from aligner_middleware.locations import cache_dir

if TYPE_CHECKING:
    from aligner_middleware.evaluation.lm_eval import BenchmarkResult


def benchmark(
    tasks: Annotated[list[str], typer.Argument(help="Tasks of lm-evaluation-harness, such as gsm8k mmlu.")],
    lm: Annotated[str, typer.Option(help="Model type of lm-eval, such as hf, vllm or local-chat-completions.")] = "hf",
    lm_args: Annotated[
        str, typer.Option(help="Arguments of that type, such as pretrained=FOLDER,dtype=bfloat16.")
    ] = "",
    upstream: UpstreamOption = None,
    model: ModelOption = "default",
    precision: PrecisionOption = None,
    include: Annotated[Path | None, typer.Option(help="Folder with tasks of your own, as lm-eval's YAML.")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Use only this many rows of each task, the first ones.")
    ] = None,
    fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples before each question. By default the task's number.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Batch size of the --lm model.")] = 8,
    chat: Annotated[bool, typer.Option(help="Write prompts as chat messages.")] = True,
    concurrency: ConcurrencyOption = 8,
    as_json: JsonOption = False,
) -> None:
    """Run tasks of lm-evaluation-harness on a model with and without the aligner: does it harm ability?

    Generated answers are corrected. Choices are scored by the combined model: how likely the aligner turns the model's
    choice into each of them. The model is called once for both; its answers are cached, and an interrupted run resumes.
    """
    try:
        from aligner_middleware.evaluation.lm_eval import run_benchmark
        from aligner_middleware.evaluation.lm_eval_models import LangChainLM, load_lm
    except ImportError as exc:
        raise MissingExtraError("aligner benchmark", "harness") from exc
    from aligner_middleware.aligner import Aligner
    from aligner_middleware.data.upstream import chat_model

    name = upstream or f"{lm} {lm_args}"
    answering = chat_model(upstream) if upstream else None
    with resumable(), showing("benchmark", "runs") as report:
        report(Progress("loading", 0, None))
        asked = LangChainLM(answering, name, concurrency) if answering else load_lm(lm, lm_args, batch_size)
        with Aligner.load(model, precision=precision_of(precision)) as aligner:
            results = run_benchmark(
                asked,
                aligner,
                tasks,
                cache_dir() / f"harness-{fingerprint(name)[:16]}",
                include=include,
                limit=limit,
                fewshot=fewshot,
                chat=chat,
                report=report,
            )
    if as_json:
        write_json(results.model_dump())
    else:
        _print_results(name, results)


def _print_results(name: str, results: BenchmarkResult) -> None:
    table = Table("task", "metric", "rows", "without", "with aligner", "difference", title=name)
    for row in results.rows:
        without = f"{row.without:.3f}" + (f" ± {row.stderr:.3f}" if row.stderr is not None else "")
        scores = (without, f"{row.aligned:.3f}", f"{row.aligned - row.without:+.3f}")
        table.add_row(row.task, row.metric, str(row.samples), *scores)
    write(table)
    write(f"{results.changed} generated answers changed; {results.passed} left as they are, too long or blank")
