"""`aligner compare`: a model's answers with and without the aligner, judged in pairs."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from aligner_middleware.cli.arguments import (
    ConcurrencyOption,
    JsonOption,
    JudgeOption,
    ModelOption,
    PrecisionOption,
    UpstreamOption,
    judge_named,
    precision_of,
)
from aligner_middleware.cli.output import note, write, write_json
from aligner_middleware.cli.progress import resumable, showing
from aligner_middleware.errors import MissingExtraError, UpstreamError

if TYPE_CHECKING:
    from aligner_middleware.data.prompts import Prompt
    from aligner_middleware.evaluation.comparison import Comparison


def compare(
    data: Annotated[
        Path,
        typer.Argument(
            help="Prompts: lines of text, or JSON lines with question, maybe answer and category; or a public set."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the report.")],
    upstream: UpstreamOption = None,
    judge: JudgeOption = None,
    model: ModelOption = "default",
    precision: PrecisionOption = None,
    concurrency: ConcurrencyOption = 8,
    as_json: JsonOption = False,
) -> None:
    """Compare a model's answers with and without the aligner, judged in pairs.

    Prompts with an answer keep it; the others are answered by --upstream. A judge compares each answer with its correction
    in both orders: win, tie, loss, and (wins - losses) / all with a 95 % interval, by category. The costs of the aligner are
    measured, too. The offline judge knows insults, identifiers of people and likeness; it does not judge honesty.

    --out gets report.html, summary.json, rows.jsonl, and journal.jsonl, from which a repeated command resumes.
    """
    if find_spec("matplotlib") is None:
        raise MissingExtraError("aligner compare", "evaluate")
    from aligner_middleware.aligner import Aligner
    from aligner_middleware.data.upstream import chat_model
    from aligner_middleware.evaluation import compare as run
    from aligner_middleware.evaluation import write_report

    prompts = _prompts(data)
    judging = judge_named(judge, concurrency)
    answering = chat_model(upstream) if upstream else None
    if judge is None:
        note("no --judge: the offline judge sees insults and identifiers, and no other harm")
    with (
        Aligner.load(model, precision=precision_of(precision)) as aligner,
        resumable(),
        showing("compare", "prompts") as report,
    ):
        comparison = run(
            prompts, out, aligner, judging, answering, upstream_name=upstream, concurrency=concurrency, report=report
        )
    write_report(comparison, out)
    if as_json:
        write_json(comparison.summary())
    else:
        _print_comparison(comparison)
        write(f"{out / 'report.html'} shows the changed words")
    if comparison.failed:
        raise UpstreamError(len(comparison.failed), next(iter(comparison.failed.values())))


def _prompts(data: Path) -> list[Prompt]:
    """Read prompts, or those of a public set, each once."""
    from aligner_middleware.data.prompts import read_prompts
    from aligner_middleware.evaluation.public_sets import read_public

    public = read_public(data, to_judge=False)
    return read_prompts(data) if public is None else list({one.key: one for one in public.prompts}.values())


def _print_comparison(comparison: Comparison) -> None:
    from aligner_middleware.evaluation.report import cost_table, verdict_table

    for lines in (verdict_table(comparison), cost_table(comparison)):
        table = Table(*lines[0])
        for line in lines[1:]:
            table.add_row(*line)
        write(table)
