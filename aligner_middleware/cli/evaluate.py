"""`aligner evaluate`: scores of an aligner on held-out rows, on labelled answers, and on public sets of them."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from aligner_middleware.cli.arguments import (
    JsonOption,
    ModelOption,
    PrecisionOption,
    aligner_folder,
    precision_of,
    strength_of,
)
from aligner_middleware.cli.output import left_out_text, note_error, percent, write, write_json
from aligner_middleware.cli.progress import showing
from aligner_middleware.cli.rows import labelled_rows, usable_rows
from aligner_middleware.data.files import write_lines
from aligner_middleware.data.json_lines import finite
from aligner_middleware.locations import DEFAULT_FOLDER
from aligner_middleware.strength import LEVELS

if TYPE_CHECKING:
    from aligner_middleware.evaluation import Evaluation, ScoredRow
    from aligner_middleware.evaluation.detection import Auc, Share
    from aligner_middleware.evaluation.guard import GuardEvaluation
    from aligner_middleware.evaluation.public_sets import PublicSet
    from aligner_middleware.strength import Strength

_Moved = Annotated[str | None, typer.Option(hidden=True)]


def evaluate(
    data: Annotated[
        Path | None,
        typer.Argument(
            help="Rows that were never trained on, in any form that `aligner train` reads; or labelled answers; or a public "
            "set, as it is published. By default the default aligner's held-out rows.",
            show_default=False,
        ),
    ] = None,
    model: ModelOption = "default",
    precision: PrecisionOption = None,
    out: Annotated[
        Path | None, typer.Option(help="File for every row with its correction and scores, as JSON lines.")
    ] = None,
    strength: Annotated[
        str | None,
        typer.Option(help="low, medium, high or a number. By default medium; for labelled answers all three by name."),
    ] = None,
    as_json: JsonOption = False,
    upstream: _Moved = None,
    judge: _Moved = None,
    pairwise: Annotated[bool, typer.Option("--pairwise", hidden=True)] = False,
    concurrency: _Moved = None,
) -> None:
    """Score an aligner on held-out rows, or as a guard on labelled answers.

    Held-out rows: the share of good answers (those that equal their correction) that it keeps byte for byte, the share of bad
    ones that it changes, and how often a change is judged better. A change is judged against the reference correction, by
    rules (what the reference dropped is gone, nothing bad is new) and a sentence encoder. The judge knows words and
    likeness, not truth: read the rows in --out before you trust it.

    Labelled answers hold question, answer and kind (keep, refusal, bad; maybe source and category) and no correction. The
    scores are the shares kept byte for byte and changed, by source and kind, at each strength; precision, recall and F1 of
    changes as a sign of bad answers; and the AUC of the score. --out gets every row at medium. The answers of XSTest,
    JailbreakBench, HarmBench, WildGuardTest, BeaverTails, Do-Not-Answer and AlpacaEval are read from the files that they are
    published in (CSV, JSON, JSON lines, Parquet; or a folder). For prompts without answers use `aligner compare`.
    """
    if upstream or judge or pairwise or concurrency:
        note_error(
            "comparisons are a command of their own: aligner compare DATA --out FOLDER, with --upstream or --judge"
        )
        raise typer.Exit(2)
    from aligner_middleware.evaluation.labelled_rows import is_labelled
    from aligner_middleware.evaluation.public_sets import read_public

    path = data or DEFAULT_FOLDER / "held_out.jsonl"
    chosen = None if strength is None else strength_of(strength)
    public = read_public(path)
    if public is not None or is_labelled(path):
        _evaluate_guard(path, public, out, model, precision, chosen, as_json)
    else:
        _evaluate_held_out(path, out, model, precision, "medium" if chosen is None else chosen, as_json)


def _evaluate_held_out(
    path: Path, out: Path | None, model: str, precision: str | None, strength: Strength, as_json: bool
) -> None:
    from aligner_middleware.aligner import Aligner
    from aligner_middleware.evaluation import evaluate as run
    from aligner_middleware.export.parity import perplexity

    rows = usable_rows(path)
    aligner = Aligner.load(model, precision=precision_of(precision))
    with showing(f"evaluate {model}", "rows") as report:
        evaluation = run(aligner, rows, strength=strength, report=report)
    auc = _auc(evaluation)
    folder = aligner_folder(model, precision)
    summary = {
        "rows": len(rows),
        "strength": strength,
        **evaluation.scores.model_dump(),
        "auc": auc.model_dump(),
        "over_correction": evaluation.over_correction,
        "others_intact": evaluation.others_intact,
        "perplexity": perplexity(
            folder, [(row.question, row.answer, row.correction, row.instruction or "") for row in rows]
        ),
        "cut_off": sum(one.correction.finish_reason == "length" for one in evaluation.scored),
    }
    if out is not None:
        write_lines(out, (finite(_as_row(one)) for one in evaluation.scored))
    if as_json:
        categories = {f"{kind}: {name}": scores.model_dump() for (kind, name), scores in evaluation.by_category.items()}
        write_json({"model": model, "precision": aligner.precision} | summary | {"by_category": categories})
    else:
        _print_held_out(f"{model}, {aligner.precision}", summary, evaluation)
        if str(auc):
            write(f"AUC of the scores: {auc}")


def _auc(evaluation: Evaluation) -> Auc:
    from aligner_middleware.evaluation.detection import Auc

    given = [(one.correction.score, not one.row.keeps) for one in evaluation.scored]
    scores = [(score, bad) for score, bad in given if score is not None]
    return Auc.of([score for score, _ in scores], [bad for _, bad in scores])


def _as_row(scored: ScoredRow) -> dict[str, Any]:
    row, correction = scored.row, scored.correction
    return {
        "kind": "keep" if row.keeps else "correct",
        "category": row.category,
        "question": row.question,
        "answer": row.answer,
        "reference": row.correction,
        "correction": correction.corrected,
        "changed": correction.changed,
        "passes": correction.usage.passes,
        "judgement": asdict(scored.judgement) | {"better": scored.judgement.better} if scored.judgement else None,
    }


def _print_held_out(title: str, summary: dict[str, Any], evaluation: Evaluation) -> None:
    table = Table(title=title)
    for name in ("", "category", "rows", "kept", "changed", "better", "rest intact", "length"):
        table.add_column(name, no_wrap=True)
    for (kind, name), scores in [*evaluation.by_category.items(), (("", "all"), evaluation.scores)]:
        shares = [percent(value) for value in (scores.kept, scores.changed, scores.better, scores.rest_intact)]
        length = "" if math.isnan(scores.length_ratio) else f"{scores.length_ratio:.2f}"
        table.add_row(kind, name, str(scores.keep + scores.correct), *shares, length)
    write(table)
    for name, share in (
        ("changed, of good answers to safe questions that sound unsafe", summary["over_correction"]),
        ("changed and all others intact, where one sentence was bad", summary["others_intact"]),
    ):
        if not math.isnan(share):  # as it is where the rows have no such category
            write(f"{name}: {percent(share)}")
    write(f"perplexity of the reference corrections: {summary['perplexity']:.2f}; cut off: {summary['cut_off']}")


def _evaluate_guard(
    path: Path,
    public: PublicSet | None,
    out: Path | None,
    model: str,
    precision: str | None,
    strength: Strength | None,
    as_json: bool,
) -> None:
    from aligner_middleware.aligner import Aligner
    from aligner_middleware.evaluation.guard import guard

    rows = labelled_rows(path, public)
    strengths: tuple[Strength, ...] = LEVELS if strength is None else (strength,)
    with Aligner.load(model, precision=precision_of(precision)) as aligner, showing("evaluate", "rows") as report:
        evaluation = guard(aligner, rows, strengths, report)
    if out is not None:
        write_lines(out, map(finite, evaluation.lines("medium" if strength is None else strength)))
    if as_json:
        unjudged = {} if public is None else {"unjudged": dict(public.left_out)}
        write_json({"model": model, "precision": aligner.precision} | evaluation.summary() | unjudged)
    else:
        _print_guard(f"{model}, {aligner.precision}", evaluation)


def _print_guard(title: str, evaluation: GuardEvaluation) -> None:
    """Print the shares kept of good answers and changed of bad ones: at every strength the larger the better."""

    def cell(kind: str, share: Share) -> str:
        return f"{percent(1 - share.share)} changed" if kind == "bad" else f"{percent(share.share)} kept"

    table = Table("", "kind", "rows", *map(str, evaluation.strengths), title=title)
    for part in (lambda row: row.group, lambda row: row.length, lambda row: "all"):
        shares = [evaluation.kept(strength, part) for strength in evaluation.strengths]
        for (name, kind), share in shares[0].items():
            table.add_row(name, kind, str(share.rows), *(cell(kind, one[name, kind]) for one in shares))
        table.add_section()
    write(table)
    for strength in evaluation.strengths:
        _print_strength(strength, evaluation)
    write(f"AUC {str(evaluation.auc) or 'none'}; {left_out_text(evaluation.left_out)}")


def _print_strength(strength: Strength, evaluation: GuardEvaluation) -> None:
    scores = evaluation.detection(strength)
    values = {"F1": scores.f1, "precision": scores.precision, "recall": scores.recall}
    counts: dict[str, dict[str, int] | int] = {
        "verdicts": evaluation.verdicts(strength),
        "doubts": evaluation.doubts(strength),
        "cut off": evaluation.cut_off(strength),
    }
    parts = [f"{name} {percent(value) or 'none'}" for name, value in values.items()]
    parts += [f"{name}: {_counted(count)}" for name, count in counts.items() if count]
    write(f"{strength}: {'; '.join(parts)}")


def _counted(counts: dict[str, int] | int) -> str:
    return str(counts) if isinstance(counts, int) else ", ".join(f"{count} {name}" for name, count in counts.items())
