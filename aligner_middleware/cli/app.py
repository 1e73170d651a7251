"""The command line: `aligner correct | export | train | evaluate | calibrate | benchmark | preferences | rounds | info`.

Data goes to standard output, progress to standard error; a failure is one line and a non-zero exit.
"""

from __future__ import annotations

import math
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_args

import typer
from pydantic import BaseModel, ValidationError
from rich.table import Table
from typer.core import TyperGroup

from aligner_middleware import __version__
from aligner_middleware.aligner import Aligner, OnDoubt, Strength
from aligner_middleware.artifact import (
    ARTIFACT_FILE,
    DEFAULT_FOLDER,
    LEVELS,
    MODEL_FILE,
    Artifact,
    Precision,
    cached_folder,
    exported_folder,
    home,
)
from aligner_middleware.cli import progress
from aligner_middleware.cli.output import console, discard, note, note_error, write, write_json
from aligner_middleware.correction import Correction, Usage
from aligner_middleware.data.files import fingerprint, write_lines, write_text
from aligner_middleware.data.json_lines import finite, open_bytes, parse_json, reading, text_at
from aligner_middleware.data.progress import Progress
from aligner_middleware.data.triples import Rows, Triple, read_rows
from aligner_middleware.errors import AlignerError, ArtifactError, DataError, MissingExtraError, UpstreamError

if TYPE_CHECKING:
    from aligner_middleware.evaluation import Evaluation, ScoredRow
    from aligner_middleware.evaluation.calibration import CalibrationReport
    from aligner_middleware.evaluation.detection import Share
    from aligner_middleware.evaluation.guard import GuardEvaluation
    from aligner_middleware.evaluation.pairwise import PairwiseJudge
    from aligner_middleware.evaluation.public_sets import PublicSet
    from aligner_middleware.rlhf.round_results import Rounds

_INTERRUPTED = 130  # exit status, as of a shell's
_BATCH = 32  # answers that `aligner correct` has corrected together
_CHUNK = 2**16  # bytes read at once

Settings = TypeVar("Settings", bound=BaseModel)


class _Commands(TyperGroup):
    """The commands. What ends one early is told in one line."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except AlignerError as exc:
            raise _failed(str(exc)) from exc
        except OSError as exc:
            raise _failed(f"{exc.filename}: {exc.strerror}" if exc.filename else str(exc)) from exc
        except KeyboardInterrupt as exc:
            note("; ".join(["interrupted", *map(str, exc.args)]))
            raise typer.Exit(_INTERRUPTED) from exc


def _failed(reason: str) -> typer.Exit:
    note_error(reason)
    return typer.Exit(1)


app = typer.Typer(
    cls=_Commands,
    help="Correct the answers of any language model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Option("--model", "-m", help="`default`, an exported folder, a checkpoint, or a hub id.")]
PrecisionOption = Annotated[
    str | None,
    typer.Option(
        "--precision", help="float32, float16 (GPU), int8 or int4. [default: int8, or an exported folder's own]"
    ),
]
Template = Annotated[
    str | None, typer.Option("--template", help="A prompt template's name, or a text with {question} and {answer}.")
]
Upstream = Annotated[
    str | None,
    typer.Option(
        help="Chat model that answers: file.py:name, module:name, or as init_chat_model takes it (openai:gpt-5)."
    ),
]
StrengthOption = Annotated[
    str, typer.Option("--strength", help="low, medium or high; or the score above which an answer is corrected.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def main() -> None:
    """Run the command line, and end the process."""
    code = 1
    if sys.stdout is None:  # a file that is opened next would get its number, and whatever is printed
        note_error("standard output is closed: send it to a file, or to /dev/null")
        sys.exit(code)
    try:
        app()
    except SystemExit as exc:
        code = exc.code if isinstance(exc.code, int) else int(exc.code is not None)
    except OSError as exc:  # of --help, which is printed before a command runs
        note_error(f"standard output cannot be written: {exc.strerror}")
    try:
        sys.stdout.flush()
    except OSError:
        discard(sys.stdout)
        code = code or 1
    others = [thread for thread in threading.enumerate() if thread is not threading.main_thread()]
    if code == _INTERRUPTED and not all(thread.daemon for thread in others):
        os._exit(code)  # Python would wait for them, such as for answers of a chat model that are under way
    sys.exit(code)


@app.command()
def correct(
    file: Annotated[
        Path | None,
        typer.Argument(help="JSON lines with `question` and `answer`, plain or gzipped. [default: standard input]"),
    ] = None,
    question: Annotated[str | None, typer.Option("--question", "-q", help="The question.")] = None,
    answer: Annotated[str | None, typer.Option("--answer", "-a", help="The answer.")] = None,
    model: Model = "default",
    precision: PrecisionOption = None,
    strength: StrengthOption = "medium",
    on_doubt: Annotated[
        str,
        typer.Option(help="What a doubtful correction becomes: passthrough (the original answer), raise or keep."),
    ] = "passthrough",
    mode: Annotated[
        str, typer.Option(help="`shadow` prints the answer as it is, and what would become of it with --json.")
    ] = "correct",
    as_json: AsJson = False,
) -> None:
    """Correct one answer, or JSON lines with `question` and `answer`.

    For each line that can be corrected a line of JSON is printed, in the same order. The others are named on standard error,
    and the command fails when all are done.
    """
    if (question is None) != (answer is None) or (question is not None and file is not None):
        raise typer.BadParameter("give both --question and --answer, or neither and JSON lines in a file")
    shadow = _choice(mode, ("correct", "shadow"), "--mode") == "shadow"
    doubt: OnDoubt = _choice(on_doubt, get_args(OnDoubt), "--on-doubt")
    chosen = _strength(strength)
    aligner = Aligner.load(model, precision=_precision(precision))
    if aligner.has_verdicts and isinstance(chosen, float) and chosen > 1:
        raise typer.BadParameter(f"{strength} is no score from 0 to 1", param_hint="--strength")

    def corrected(pairs: list[tuple[str, str]]) -> list[dict[str, Any] | AlignerError]:
        return _corrected(aligner, pairs, chosen, doubt, shadow=shadow)

    if question is None or answer is None:
        _correct_lines(None if file == Path("-") else file, corrected)
        return
    (row,) = corrected([(question, answer)])
    if isinstance(row, AlignerError):
        raise row
    if "reason" in row:
        note(f"not aligned: {row['reason']}")
    if as_json:
        write_json(row)
    else:
        write(row["corrected"])


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="`default`, an adapter's or a checkpoint's folder, or a hub id.")],
    out: Annotated[
        Path | None, typer.Argument(help="Folder to write; by default the cache, where it is found again.")
    ] = None,
    precision: PrecisionOption = None,
    template: Template = None,
    fused: Annotated[bool, typer.Option(help="Fuse what can be fused.")] = True,
    as_json: AsJson = False,
) -> None:
    """Make an aligner folder: merge, export by optimum, fuse, quantise, and check against PyTorch."""
    try:
        from aligner_middleware.export.export import STEPS
        from aligner_middleware.export.store import export_model
    except ImportError as exc:
        raise MissingExtraError("aligner export", "build") from exc
    with progress.steps(f"export {model}", len(STEPS)) as report:
        exported = export_model(
            model,
            out,
            _precision(precision) or "int8",
            template,
            fused=fused,
            verify=True,
            report=lambda at: report(at.stage),
        )
    _print_artifact(exported.folder, as_json)


@app.command()
def train(
    data: Annotated[Path, typer.Argument(help="Rows to train on: JSON lines, plain or gzipped.")],
    out: Annotated[Path, typer.Argument(help="Folder to write the adapter to.")],
    held_out: Annotated[Path | None, typer.Option(help="Rows that are scored, never trained on.")] = None,
    base: Annotated[str | None, typer.Option(help="Model to start from: a hub id or a folder.")] = None,
    start: Annotated[
        str | None, typer.Option(help="Aligner made of that base to go on from, such as `default`; not with lora.")
    ] = None,
    template: Template = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="`lora` trains an adapter, `full` all weights, `difference` all but the embeddings, stored in few bits."
        ),
    ] = None,
    difference_bits: Annotated[int | None, typer.Option(help="Bits a weight of a stored difference.")] = None,
    verdict: Annotated[
        bool | None,
        typer.Option(help="Say keep, edit or rewrite before the correction. [default: with our own template]"),
    ] = None,
    edits: Annotated[
        str | None, typer.Option(help="How an edit is written: `operations` on sentences, or a `copy`.")
    ] = None,
    edit_share: Annotated[
        float | None,
        typer.Option(help="Least share of the answer's words that stays in an edit; below, it is a rewrite."),
    ] = None,
    verdict_weight: Annotated[float | None, typer.Option(help="Weight of the verdict's loss.")] = None,
    verdict_balance: Annotated[
        float | None, typer.Option(help="How much rare verdicts count: their inverse frequency to this power.")
    ] = None,
    warm_up_epochs: Annotated[float | None, typer.Option(help="Epochs of the identity stage; 0 leaves it out.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Epochs of the correction stage.")] = None,
    identity_share: Annotated[
        float | None, typer.Option(help="Share of rows in the correction stage that keep an answer already corrected.")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak learning rate of both stages. [default: 4e-4 with LoRA, 2e-5 without]")
    ] = None,
    schedule: Annotated[str | None, typer.Option(help="cosine, linear or constant.")] = None,
    decision_weight: Annotated[
        float | None, typer.Option(help="Weight in the loss of the token at which a correction parts from the answer.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows in a pass, on each device.")] = None,
    accumulation: Annotated[int | None, typer.Option(help="Passes in a step.")] = None,
    checkpointing: Annotated[
        bool | None, typer.Option("--checkpointing", help="Compute activations anew: slower, far less memory.")
    ] = None,
    bfloat16: Annotated[bool | None, typer.Option(help="[default: where the device has units for it]")] = None,
    max_length: Annotated[int | None, typer.Option(help="Longest row in tokens; longer ones are left out.")] = None,
    lora_rank: Annotated[int | None, typer.Option(help="Rank of the LoRA matrices.")] = None,
    lora_alpha: Annotated[int | None, typer.Option(help="Their scale, times the rank.")] = None,
    lora_dropout: Annotated[float | None, typer.Option(help="Dropout before them.")] = None,
    save_steps: Annotated[int | None, typer.Option(help="Steps between checkpoints, and between evaluations.")] = None,
    patience: Annotated[
        int | None, typer.Option(help="Evaluations without a better held-out loss after which a stage stops.")
    ] = None,
    logs: Annotated[Path | None, typer.Option(help="Folder for TensorBoard's logs.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of weights, order and dropout.")] = None,
) -> None:
    """Train an aligner in two stages: identity warm-up (correction := answer), then correction.

    Each row of DATA is a JSON object in one of these forms, told by its keys:

    - question, answer, correction: ours, and the published Aligner data

    - question, answer, kind (keep, refusal or bad), maybe better: labelled answers; without better a bad one teaches its
      verdict alone

    - prompt, chosen, rejected: TRL's preferences, texts or messages; rejected is the answer, chosen its correction

    - chosen, rejected: whole dialogues, as messages or as "Human: … Assistant: …"

    - prompt, response_0, response_1, is_response_0_safe, …: PKU-SafeRLHF

    - prompt, response, is_safe: BeaverTails; safe responses are kept

    Rows that teach nothing (an empty text, two unsafe responses) are left out and named by line. A line that is no such
    object stops the command before it trains.

    A run that was killed goes on from its last checkpoint when its command is repeated. With several devices or machines,
    put `accelerate launch` before it: accelerate launch -m aligner_middleware train DATA OUT.

    OUT gets peft's adapter (or a difference, or a whole checkpoint) and training.json with the settings, for
    `aligner export OUT`.
    """
    try:
        from aligner_middleware.training import TrainConfig
        from aligner_middleware.training import train as run
    except ImportError as exc:
        raise MissingExtraError("aligner train", "train") from exc
    defaults = TrainConfig()
    both = _given(learning_rate=learning_rate, schedule=schedule)
    config = _validated(
        TrainConfig,
        warm_up=defaults.warm_up.model_dump() | both | _given(epochs=warm_up_epochs),
        correction=defaults.correction.model_dump() | both | _given(epochs=epochs, identity_share=identity_share),
        **_given(
            base=base,
            start=start,
            template=template,
            method=method,
            difference_bits=difference_bits,
            verdict=verdict,
            edits=edits,
            edit_share=edit_share,
            verdict_weight=verdict_weight,
            verdict_balance=verdict_balance,
            decision_weight=decision_weight,
            batch_size=batch_size,
            accumulation=accumulation,
            checkpointing=checkpointing,
            bfloat16=bfloat16,
            max_length=max_length,
            lora_rank=lora_rank,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            save_steps=save_steps,
            patience=patience,
            seed=seed,
        ),
    )
    # Under accelerate the first process speaks for all.
    console.quiet = quiet = os.environ.get("RANK", "0") != "0"
    rows = _named(data, read_rows(data))
    unseen = _named(held_out, read_rows(held_out)) if held_out else []
    note(f"train: {len(rows)} rows")
    with _resumable(), progress.job("steps") as report:
        recipe = run(rows, out, config, held_out=unseen, logs=logs, report=report)
    if not quiet:
        note(f"train: done, {out}")
        write_json({"rows": recipe.rows, "rows_left_out": recipe.rows_left_out, "losses": recipe.losses})


@app.command()
def evaluate(
    data: Annotated[
        Path | None,
        typer.Argument(
            help="Rows never trained on, in any form that `aligner train` reads, by default ours; or labelled answers; "
            "or a public set, as it is published; or prompts."
        ),
    ] = None,
    model: Model = "default",
    precision: PrecisionOption = None,
    out: Annotated[
        Path | None,
        typer.Option(help="File for every row's correction and judgement, as JSON lines; for a comparison its folder."),
    ] = None,
    strength: Annotated[
        str | None,
        typer.Option(
            help="low, medium, high or a number. [default: the aligner's own; for labelled answers all three by name]"
        ),
    ] = None,
    upstream: Upstream = None,
    judge: Annotated[str | None, typer.Option(help="Chat model that judges, named like --upstream.")] = None,
    pairwise: Annotated[
        bool, typer.Option(help="Compare, with the offline judge, answers that the rows hold.")
    ] = False,
    concurrency: Annotated[int, typer.Option(min=1, help="Calls of a chat model under way at once.")] = 8,
    as_json: AsJson = False,
) -> None:
    """Score an aligner on held-out rows, or compare a model's answers with and without it.

    With --upstream, --judge or --pairwise DATA holds prompts (lines of text, or JSON lines with question, maybe answer and
    category). Answers and their corrections are judged in pairs, in both orders: win, tie, loss, (wins - losses) / all with
    its 95 % interval, by category; and what the aligner costs. --out gets report.html, summary.json and rows.jsonl. The
    offline judge knows insults, identifiers of people and likeness; it does not judge honesty. What was killed goes on.

    Where rows hold question, answer and kind (keep, refusal, bad; maybe source and category) and no correction, the aligner
    is scored as a guard: what it keeps byte for byte and what it changes, by source and kind, at each strength; precision,
    recall and F1 of changed as "bad", and the AUC of its score. --out gets what became of every row at medium. So it is on
    the answers of XSTest, JailbreakBench, HarmBench, WildGuardTest, BeaverTails and AlpacaEval, in the files that they are
    published in (CSV, JSON, JSON lines, Parquet; or a folder). Their prompts alone, and those of OR-Bench, need --upstream.

    Otherwise, what it keeps, what it changes, and how often the change is judged better.
    Good answers (those that equal their correction) should be kept byte for byte. Changes of bad ones are judged against
    the reference correction, by rules (what the reference dropped is gone, nothing bad is new) and a sentence encoder. The
    judge knows words and likeness, not truth: read the rows in --out before you trust it.
    """
    if upstream or judge or pairwise:
        if data is None or out is None:
            raise typer.BadParameter("a comparison needs DATA, the prompts, and --out, a folder for its report")
        if strength is not None:
            raise typer.BadParameter("a comparison uses the aligner's own strength", param_hint="--strength")
        _compare(data, out, model, precision, upstream, judge, concurrency, as_json)
        return
    try:
        from aligner_middleware.evaluation import evaluate as run
        from aligner_middleware.evaluation.detection import Auc
        from aligner_middleware.evaluation.labelled_rows import is_labelled
        from aligner_middleware.evaluation.public_sets import read_public
        from aligner_middleware.export.parity import perplexity
    except ImportError as exc:
        raise MissingExtraError("aligner evaluate", "build") from exc
    path = data or DEFAULT_FOLDER / "held_out.jsonl"
    chosen = None if strength is None else _strength(strength)
    public = read_public(path)
    if public is not None or is_labelled(path):
        _guard(path, public, out, model, precision, chosen, as_json)
        return
    rows = _named(path, read_rows(path))
    aligner = Aligner.load(model, precision=_precision(precision))
    with progress.bar(f"evaluate {model}", len(rows), "rows") as report:
        evaluation = run(
            aligner,
            rows,
            strength="medium" if chosen is None else chosen,
            report=lambda at: report(at.done, at.total),
        )
    folder = _aligner_folder(model, precision)
    given = [(one.correction.score, not one.row.keeps) for one in evaluation.scored]
    scores = [(score, bad) for score, bad in given if score is not None]
    auc = Auc.of([score for score, _ in scores], [bad for _, bad in scores])
    summary = {
        "rows": len(rows),
        "strength": "medium" if chosen is None else chosen,
        **evaluation.scores.model_dump(),
        "auc": auc.model_dump(),
        "over_correction": evaluation.over_correction,
        "others_intact": evaluation.others_intact,
        "perplexity": perplexity(folder, [(row.question, row.answer, row.correction) for row in rows]),
        "cut_off": sum(one.correction.finish_reason == "length" for one in evaluation.scored),
    }
    if out is not None:
        write_lines(out, (finite(_as_row(one)) for one in evaluation.scored))
    if as_json:
        categories = {f"{kind}: {name}": scores.model_dump() for (kind, name), scores in evaluation.by_category.items()}
        write_json({"model": model, "precision": aligner.precision} | summary | {"by_category": categories})
    else:
        _print_evaluation(f"{model}, {aligner.precision}", summary, evaluation)
        if str(auc):
            write(f"AUC of the scores: {auc}")


def _guard(
    path: Path,
    public: PublicSet | None,
    out: Path | None,
    model: str,
    precision: str | None,
    strength: Strength | None,
    as_json: bool,
) -> None:
    from aligner_middleware.evaluation.guard import guard
    from aligner_middleware.evaluation.labelled_rows import read_labelled

    if public is not None:
        for reason, count in public.left_out.items():
            note(f"{path}: {count} rows left out, as {reason}")
        for name in public.skipped:
            note(f"{path}: no answers of a public set in {name}")
    rows = public.rows if public is not None else read_labelled(path)
    strengths: tuple[Strength, ...] = LEVELS if strength is None else (strength,)
    with (
        Aligner.load(model, precision=_precision(precision)) as aligner,
        progress.bar("evaluate", len(rows), "rows") as report,
    ):
        evaluation = guard(aligner, rows, strengths, lambda at: report(at.done, at.total))
    if out is not None:
        write_lines(out, map(finite, evaluation.lines("medium" if strength is None else strength)))
    if as_json:
        unjudged = {} if public is None else {"unjudged": dict(public.left_out)}
        write_json({"model": model, "precision": aligner.precision} | evaluation.summary() | unjudged)
    else:
        _print_guard(f"{model}, {aligner.precision}", evaluation)


@app.command()
def calibrate(
    rows: Annotated[
        list[Path], typer.Argument(help="Labelled answers: JSON lines with question, answer, kind and maybe source.")
    ],
    model: Model = "default",
    precision: PrecisionOption = None,
    out: Annotated[
        Path | None,
        typer.Option(help="File for the calibration as JSON; exports read calibration.json beside an adapter."),
    ] = None,
    plots: Annotated[Path | None, typer.Option(help="Folder for roc.png and reliability.png.")] = None,
    balance: Annotated[bool, typer.Option(help="Count good and bad answers the same, however many there are.")] = True,
    as_json: AsJson = False,
) -> None:
    """Turn an aligner's evidence into a probability, and choose the thresholds of the strengths.

    Each row holds question, answer and kind: keep (a good answer), refusal (a good refusal) or bad; maybe source. None of
    them may have been trained on: of those the aligner is too sure. 50 good and 20 bad ones are the least.

    low, medium and high keep 99 %, 97 % and 90 % of the good answers, of all together and of each file with at least 50 of
    them. If medium keeps less than 99 % of the refusals, it is raised until it does, unless more than 2 % of the bad answers
    then go unchanged. A row without a source counts to its file; each source weighs the same in the probability.

    The calibration is written into the exported folder: the one given, or the one in the cache.
    """
    try:
        from aligner_middleware.evaluation import calibration as calibrating
        from aligner_middleware.evaluation.labelled_rows import read_labelled
    except ImportError as exc:
        raise MissingExtraError("aligner calibrate", "build") from exc
    if plots is not None and find_spec("matplotlib") is None:
        raise MissingExtraError("aligner calibrate --plots", "evaluate")
    name = ", ".join(map(str, rows))
    files = {path: read_labelled(path, source=path.name.partition(".")[0]) for path in rows}
    labelled = [row for file in files.values() for row in file]
    calibrating.check_enough(labelled, name)
    note("the rows must not have been trained on: thresholds would be wrong for all others")
    with Aligner.load(model, precision=_precision(precision)) as aligner:
        with progress.bar("calibrate", len(labelled), "rows") as report:
            measured: list[calibrating.MeasuredRow] = []
            for path, file in files.items():
                before = len(measured)

                def done(at: Progress, before: int = before) -> None:
                    report(before + at.done, len(labelled))

                measured += calibrating.measure(aligner, file, done, str(path))
        found = calibrating.calibrate(measured, verdicts=aligner.has_verdicts, balance=balance, name=name)
    folder = _aligner_folder(model, precision)
    calibrating.save_calibration(found.calibration, folder)
    if out is not None:
        write_text(out, found.calibration.model_dump_json(indent=2) + "\n")
    if plots is not None:
        from aligner_middleware.evaluation.calibration_plot import draw_calibration

        draw_calibration(measured, found, plots)
    left_out = len(labelled) - len(measured)
    if as_json:
        write_json({"folder": str(folder), "left_out": left_out} | found.model_dump())
    else:
        _print_calibration(found, left_out)
        write(f"written into {folder / ARTIFACT_FILE}")


def _compare(
    data: Path,
    out: Path,
    model: str,
    precision: str | None,
    upstream: str | None,
    judge: str | None,
    concurrency: int,
    as_json: bool,
) -> None:
    try:
        from aligner_middleware.evaluation import compare, write_report
        from aligner_middleware.evaluation.public_sets import read_public
        from aligner_middleware.evaluation.report import cost_table, verdict_table
    except ImportError as exc:
        raise MissingExtraError("aligner evaluate", "evaluate") from exc
    from aligner_middleware.data.prompts import read_prompts
    from aligner_middleware.data.upstream import chat_model

    public = read_public(data, to_judge=False)
    prompts = read_prompts(data) if public is None else list({one.key: one for one in public.prompts}.values())
    judging = _judge(judge, concurrency)
    answering = chat_model(upstream) if upstream else None
    with (
        Aligner.load(model, precision=_precision(precision)) as aligner,
        _resumable(),
        progress.bar("compare", len(prompts), "prompts") as report,
    ):
        comparison = compare(
            prompts,
            out,
            aligner,
            judging,
            answering,
            upstream_name=upstream,
            concurrency=concurrency,
            report=lambda at: report(at.done, at.total),
        )
    write_report(comparison, out)
    if as_json:
        write_json(comparison.summary())
    else:
        for lines in (verdict_table(comparison), cost_table(comparison)):
            table = Table(*lines[0])
            for line in lines[1:]:
                table.add_row(*line)
            write(table)
        write(f"{out / 'report.html'} shows the changed words")
    if comparison.failed:
        raise UpstreamError(len(comparison.failed), next(iter(comparison.failed.values())))


@app.command()
def preferences(
    prompts: Annotated[
        Path, typer.Argument(help="Lines of text, or JSON lines with question (or prompt), maybe answer.")
    ],
    out: Annotated[Path, typer.Argument(help="File for the rows: prompt, chosen, rejected.")],
    upstream: Upstream = None,
    model: Model = "default",
    precision: PrecisionOption = None,
    form: Annotated[str, typer.Option(help="`messages`, for chat models, or `text`.")] = "messages",
    sft: Annotated[
        Path | None, typer.Option(help="File for answers that were left as they are, as rows for SFT.")
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Prompts under way at once (on Ray: in each worker).")] = 8,
    ray_workers: Annotated[
        int | None, typer.Option(min=1, help="Do it with so many workers on Ray, each with models of its own.")
    ] = None,
    ray_address: Annotated[
        str | None, typer.Option(help="Of a Ray cluster, or `auto`. [default: a new one on this machine]")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make preference data: what a model answers is rejected, what the aligner makes of it is chosen.

    TRL's DPO and reward trainers read the rows. A job that was killed goes on when its command is repeated. Prompts that
    fail three times are named; the rows of the others are written, and the same command asks the failed ones again.
    """
    from aligner_middleware.data.prompts import read_prompts
    from aligner_middleware.data.upstream import chat_model
    from aligner_middleware.rlhf.preferences import Form, make_preferences

    form = _choice(form, get_args(Form), "--form")
    asked = read_prompts(prompts)
    options: dict[str, Any] = {"form": form, "sft": sft, "concurrency": concurrency}
    if ray_workers is not None:
        try:
            from aligner_middleware.rlhf.ray import make_preferences_on_ray
        except ImportError as exc:
            raise MissingExtraError("aligner preferences --ray-workers", "ray") from exc
        options |= {"precision": _precision(precision), "workers": ray_workers, "address": ray_address}
        with _resumable(), progress.job("prompts") as report:
            made = make_preferences_on_ray(asked, out, model, upstream, **options, report=report)
    else:
        answering = chat_model(upstream) if upstream else None
        with (
            Aligner.load(model, precision=_precision(precision)) as aligner,
            _resumable(),
            progress.job("prompts") as report,
        ):
            made = make_preferences(asked, out, aligner, answering, upstream_name=upstream, **options, report=report)
    summary = {"pairs": made.pairs, "kept": made.kept, "repeated": made.repeated, "failed": len(made.failed)}
    if as_json:
        write_json(summary)
    else:
        write(f"{out}: {made.pairs} pairs; {made.kept} answers were left as they are, {made.repeated} were repeated")
    if made.failed:
        raise UpstreamError(len(made.failed), next(iter(made.failed.values())))


@app.command()
def benchmark(
    tasks: Annotated[list[str], typer.Argument(help="Tasks of lm-evaluation-harness, such as gsm8k mmlu.")],
    lm: Annotated[
        str, typer.Option(help="A model type of lm-eval's, such as hf, vllm or local-chat-completions.")
    ] = "hf",
    lm_args: Annotated[str, typer.Option(help="Its arguments, such as pretrained=FOLDER,dtype=bfloat16.")] = "",
    upstream: Upstream = None,
    model: Model = "default",
    precision: PrecisionOption = None,
    include: Annotated[Path | None, typer.Option(help="Folder with tasks of your own, as lm-eval's YAML.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="First rows of each task only.")] = None,
    fewshot: Annotated[int | None, typer.Option(min=0, help="Examples before each question.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Of the model.")] = 8,
    chat: Annotated[bool, typer.Option(help="Write prompts as chat messages.")] = True,
    concurrency: Annotated[int, typer.Option(min=1, help="Calls of --upstream under way at once.")] = 8,
    as_json: AsJson = False,
) -> None:
    """Run tasks of lm-evaluation-harness on a model with and without the aligner.

    Generated answers are corrected. Choices are scored by the combined model: how likely the aligner turns the model's
    choice into each of them. The model is called once for both; its answers are cached, and an interrupted run resumes.
    """
    try:
        from aligner_middleware.evaluation.lm_eval import run_benchmark
        from aligner_middleware.evaluation.lm_eval_models import LangChainLM, load_lm
    except ImportError as exc:
        raise MissingExtraError("aligner benchmark", "harness") from exc
    from aligner_middleware.data.upstream import chat_model

    name = upstream or f"{lm} {lm_args}"
    answering = chat_model(upstream) if upstream else None
    with _resumable(), progress.steps("benchmark", 2) as report:
        report("loading")
        asked = LangChainLM(answering, name, concurrency) if answering else load_lm(lm, lm_args, batch_size)
        report(", ".join(tasks))
        with Aligner.load(model, precision=_precision(precision)) as aligner:
            found = run_benchmark(
                asked,
                aligner,
                tasks,
                home() / f"harness-{fingerprint(name)[:16]}",
                include=include,
                limit=limit,
                fewshot=fewshot,
                chat=chat,
            )
    if as_json:
        write_json(found.model_dump())
        return
    table = Table("task", "metric", "rows", "without", "with aligner", "difference", title=name)
    for row in found.rows:
        without = f"{row.without:.3f}" + (f" ± {row.stderr:.3f}" if row.stderr is not None else "")
        table.add_row(
            row.task, row.metric, str(row.samples), without, f"{row.aligned:.3f}", f"{row.aligned - row.without:+.3f}"
        )
    write(table)
    write(f"{found.changed} generated answers changed; {found.passed} left as they are, too long or blank")


@app.command()
def rounds(
    prompts: Annotated[Path, typer.Argument(help="Prompts to learn from, in the forms of `aligner preferences`.")],
    out: Annotated[Path, typer.Argument(help="Folder of the run.")],
    held_out: Annotated[
        Path | None, typer.Option(help="Prompts that are only scored. [default: every fifth of PROMPTS]")
    ] = None,
    policy: Annotated[str | None, typer.Option(help="The first policy: a hub id or a checkpoint's folder.")] = None,
    model: Model = "default",
    precision: PrecisionOption = None,
    count: Annotated[int, typer.Option("--rounds", min=1, help="How many rounds.")] = 3,
    method: Annotated[
        str | None, typer.Option(help="`dpo` prefers corrections over answers, `sft` imitates them.")
    ] = None,
    judge: Annotated[
        str | None, typer.Option(help="Chat model that judges, named like an upstream. [default: offline]")
    ] = None,
    fixed: Annotated[
        bool, typer.Option("--fixed-preferences", help="The control: every round learns from the first one's pairs.")
    ] = False,
    beside: Annotated[Path | None, typer.Option(help="Folder of another run, to be drawn beside this one.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Epochs of a round.")] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak learning rate. [default: 5e-5 for dpo, 4e-4 for sft]")
    ] = None,
    beta: Annotated[float | None, typer.Option(help="Of DPO: what leaving the round before costs.")] = None,
    nll_weight: Annotated[float | None, typer.Option(help="Of DPO: weight of the corrections' own likelihood.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows in a pass.")] = None,
    accumulation: Annotated[int | None, typer.Option(help="Passes in a step.")] = None,
    checkpointing: Annotated[
        bool | None, typer.Option("--checkpointing", help="Compute activations anew: slower, far less memory.")
    ] = None,
    bfloat16: Annotated[bool | None, typer.Option(help="[default: where the device has units for it]")] = None,
    max_length: Annotated[int | None, typer.Option(help="Longest row in tokens.")] = None,
    lora_rank: Annotated[int | None, typer.Option(help="Rank of the LoRA matrices.")] = None,
    lora_alpha: Annotated[int | None, typer.Option(help="Their scale, times the rank.")] = None,
    answer_tokens: Annotated[int | None, typer.Option(help="Longest answer.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Of the answers that are learnt from.")] = None,
    generation_batch: Annotated[int | None, typer.Option(help="Prompts answered at once.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of sampling, weights and order.")] = None,
    max_kl: Annotated[
        float | None, typer.Option(help="Stop beyond so many nats a token from the first policy.")
    ] = None,
    max_drop: Annotated[float | None, typer.Option(help="Stop when the judge's rate falls by more than this.")] = None,
    min_distinct: Annotated[
        float | None, typer.Option(help="Stop below this share of the first policy's distinct 3-grams.")
    ] = None,
    max_refusals: Annotated[float | None, typer.Option(help="Stop when refusals rise by more than this.")] = None,
    min_pairs: Annotated[int | None, typer.Option(help="Stop when a round has fewer pairs.")] = None,
    as_json: AsJson = False,
) -> None:
    """Multi-round RLHF: a policy answers, the aligner corrects, and the pairs train the next policy.

    Each round's answers, pairs, adapter and scores stay in its folder in OUT; a run that was killed goes on when its command
    is repeated, also with more rounds. Policies are compared with the first one on held-out prompts: by the judge, and by
    KL, length, distinct n-grams and refusals. When one breaks a stop rule the run ends, and the round before is the best.
    """
    try:
        from aligner_middleware.evaluation.policy_metrics import StopRules
        from aligner_middleware.rlhf.plot import draw_rounds
        from aligner_middleware.rlhf.round_results import read_rounds, summary
        from aligner_middleware.rlhf.rounds import run_rounds
        from aligner_middleware.training import PolicyConfig
    except ImportError as exc:
        raise MissingExtraError("aligner rounds", "train") from exc
    from aligner_middleware.data.prompts import read_prompts

    config = _validated(
        PolicyConfig,
        **_given(
            base=policy,
            method=method,
            epochs=epochs,
            learning_rate=learning_rate,
            beta=beta,
            nll_weight=nll_weight,
            batch_size=batch_size,
            accumulation=accumulation,
            checkpointing=checkpointing,
            bfloat16=bfloat16,
            max_length=max_length,
            lora_rank=lora_rank,
            lora_alpha=lora_alpha,
            answer_tokens=answer_tokens,
            temperature=temperature,
            generation_batch=generation_batch,
            seed=seed,
        ),
    )
    rules = _validated(
        StopRules,
        **_given(
            max_kl=max_kl,
            max_drop=max_drop,
            min_distinct=min_distinct,
            max_refusals=max_refusals,
            min_pairs=min_pairs,
        ),
    )
    asked = read_prompts(prompts)
    unseen = read_prompts(held_out) if held_out else asked[::5]
    if not held_out:
        kept_apart = {prompt.question for prompt in unseen}
        asked = [prompt for prompt in asked if prompt.question not in kept_apart]
    other = read_rounds(beside) if beside else None
    judging = _judge(judge)
    with Aligner.load(model, precision=_precision(precision)) as aligner, _resumable(), progress.job() as report:
        run = run_rounds(
            asked, unseen, out, aligner, judging, config, rounds=count, rules=rules, fixed=fixed, report=report
        )
    draw_rounds({str(place): one for place, one in ((out, run), (beside, other)) if one}, out / "rounds.png")
    if as_json:
        write_json(summary(run))
    else:
        _print_rounds(run, out)


@app.command()
def info(model: Model = "default", precision: PrecisionOption = None, as_json: AsJson = False) -> None:
    """Show what is in an exported folder, or in the cache under a model's name."""
    _print_artifact(_aligner_folder(model, precision), as_json)


@app.command()
def version() -> None:
    """Print the version."""
    write(__version__)


def _judge(name: str | None, concurrency: int = 8) -> PairwiseJudge:
    from aligner_middleware.data.upstream import chat_model
    from aligner_middleware.evaluation import ChatJudge, OfflineJudge, SentenceEncoder

    if name is None:
        return OfflineJudge(SentenceEncoder())
    return ChatJudge(chat_model(name), name, home() / "verdicts.sqlite", concurrency)


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _validated(settings: type[Settings], **options: Any) -> Settings:
    try:
        return settings(**options)
    except ValidationError as exc:
        error = exc.errors()[0]
        name = str(error["loc"][-1]).replace("_", "-")
        near = _near(str(error["input"]), re.findall("'(.*?)'", str(error.get("ctx", {}).get("expected", ""))))
        raise typer.BadParameter(f"{error['input']!r}: {error['msg']}{near}", param_hint=f"--{name}") from exc


def _choice(value: str, known: Sequence[Any], option: str) -> Any:
    """Give one of the values that an option may have."""
    if value in known:
        return value
    raise typer.BadParameter(f"{value!r} is none of {', '.join(known)}{_near(value, known)}", param_hint=option)


def _near(value: str, known: Sequence[str]) -> str:
    near = get_close_matches(value, known, 1)
    return f"; did you mean {near[0]}?" if near else ""


def _precision(value: str | None) -> Precision | None:
    chosen: Precision | None = None if value is None else _choice(value, get_args(Precision), "--precision")
    return chosen


def _strength(value: str) -> Strength:
    for known in LEVELS:
        if value == known:
            return known
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise typer.BadParameter(
            f"{value!r} is none of low, medium and high, and no number from 0 on{_near(value, LEVELS)}",
            param_hint="--strength",
        )
    return number


def _aligner_folder(model: str, precision: str | None) -> Path:
    """The exported folder of a model: itself, or in the cache."""
    return exported_folder(model) or cached_folder(model, _precision(precision) or "int8")


def _corrected(
    aligner: Aligner, pairs: list[tuple[str, str]], strength: Strength, on_doubt: OnDoubt, *, shadow: bool
) -> list[dict[str, Any] | AlignerError]:
    """Correct answers together: for each its row, or why there is none. In shadow mode the answers stay as they are."""
    asked: OnDoubt = "passthrough" if shadow and on_doubt == "raise" else on_doubt
    outcomes = aligner.correct_batch(pairs, strength=strength, on_doubt=asked, return_exceptions=True)
    rows: list[dict[str, Any] | AlignerError] = []
    for (question, answer), made in zip(pairs, outcomes, strict=True):
        if isinstance(made, Correction):
            rows.append(_shadow(made) if shadow else _as_dict(made))
        elif not isinstance(made, AlignerError):
            raise made
        elif shadow:
            told = {"mode": "shadow", "would_change": False, "reason": f"{type(made).__name__}: {made}"}
            rows.append(_as_dict(Correction(question, answer, answer, "stop", Usage())) | told)
        else:
            rows.append(made)
    return rows


def _as_dict(correction: Correction) -> dict[str, Any]:
    return asdict(correction) | {"changed": correction.changed}


def _shadow(made: Correction) -> dict[str, Any]:
    """Say what would become of an answer, which stays as it is."""
    written = made.corrected if made.proposed is None else made.proposed
    seen = replace(made, corrected=made.original, proposed=None if written == made.original else written)
    return _as_dict(seen) | {"mode": "shadow", "would_change": made.changed}


def _correct_lines(
    file: Path | None, correct: Callable[[list[tuple[str, str]]], list[dict[str, Any] | AlignerError]]
) -> None:
    """Print what becomes of each line of a file, or of standard input, and fail if there were bad ones."""
    name = "standard input" if file is None else str(file)
    lines = bad = 0
    with _opened(file) as (source, of), _line_progress(of) as report:
        for batch in _batches(source, name):
            read = [_pair(name, number, line) for number, line in batch]
            made = iter(correct([pair for pair in read if isinstance(pair, tuple)]))
            for (number, _), pair in zip(batch, read, strict=True):
                row = next(made) if isinstance(pair, tuple) else pair
                if isinstance(row, AlignerError):
                    bad += 1
                    note_error(str(row if row is pair else DataError(name, number, str(row))))
                else:
                    if "reason" in row:
                        note(f"{name}:{number}: not aligned: {row['reason']}")
                    write_json(row)
            lines += len(batch)
            report(batch[-1][0], of)
    if bad:
        raise AlignerError(f"{bad} of {lines} rows of {name} could not be corrected; the others are")


@contextmanager
def _opened(file: Path | None) -> Iterator[tuple[Any, int | None]]:
    """Open a file, or standard input, and count its lines where it can be read twice."""
    if file is None:
        if sys.stdin is None:
            raise DataError("standard input", 1, "is closed: give a file, or --question and --answer")
        if sys.stdin.isatty():
            note("reading JSON lines with question and answer; --help tells what else can be given")
        yield sys.stdin.buffer, None
        return
    of = None
    with reading(file):
        if file.is_file():  # no pipe
            with open_bytes(file) as counted:
                of = sum(1 for _ in counted)
        source = open_bytes(file)
    with source:
        yield source, of


@contextmanager
def _line_progress(of: int | None) -> Iterator[progress.Report]:
    if sys.stdout.isatty():  # where the lines themselves tell
        yield lambda done, of: None
        return
    with progress.bar("correct", of, "lines") as report:
        yield report


def _batches(source: Any, name: str) -> Iterator[list[tuple[int, bytes]]]:
    """Give lines that are not blank with their numbers: as many at once as have arrived, up to a batch."""
    number, parts, chunk = 0, list[bytes](), b" "
    with reading(name):
        while chunk:
            chunk = source.read1(_CHUNK)  # what is there, rather than waiting for all of it
            parts.append(chunk)
            if chunk and b"\n" not in chunk:
                continue
            lines = b"".join(parts).split(b"\n")
            parts = [lines.pop()] if chunk else []
            numbered = [(at, line) for at, line in enumerate(lines, number + 1) if line.strip()]
            number += len(lines)
            for at in range(0, len(numbered), _BATCH):
                yield numbered[at : at + _BATCH]


def _pair(name: str, number: int, line: bytes) -> tuple[str, str] | DataError:
    try:
        row = parse_json(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        if not isinstance(row, dict):
            raise ValueError("it is no JSON object with question and answer")
        return text_at(row, "question"), text_at(row, "answer")
    except ValueError as exc:
        return DataError(name, number, str(exc))


def _print_artifact(folder: Path, as_json: bool) -> None:
    artifact = Artifact.load(folder)
    device = _device(folder, artifact)
    if as_json:
        write_json({"folder": str(folder), "device": device} | artifact.model_dump())
        return
    table = Table(title=artifact.name, show_header=False)
    megabytes = sum((folder / name).stat().st_size for name in artifact.files) / 1e6
    table.add_row("folder", str(folder))
    table.add_row("size", f"{megabytes:.0f} MB, {artifact.precision}, {artifact.graph} graph")
    table.add_row("runs on", device)
    table.add_row("base", f"{artifact.base.source} {next(iter(artifact.base.sha256.values()), '')[:12]}")
    table.add_row("prompt", artifact.template.name)
    if artifact.parity:
        parity = artifact.parity
        table.add_row("agrees with PyTorch", f"{parity.same_argmax:.1%} of {parity.tokens} tokens")
        table.add_row("largest logit difference", f"{parity.max_logit_difference:.3g}")
        table.add_row("perplexity", f"{parity.perplexity:.3f} (PyTorch {parity.reference_perplexity:.3f})")
    write(table, width=0)


def _device(folder: Path, artifact: Artifact) -> str:
    """What its passes run on here, or why they do not."""
    from aligner_middleware.engine.onnx import OnnxModel

    try:
        return OnnxModel(folder / MODEL_FILE, artifact).device
    except ArtifactError as exc:
        return f"nothing here: {exc}"


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


def _percent(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.1%}"


def _print_guard(title: str, evaluation: GuardEvaluation) -> None:
    """Kept of the good answers, changed of the bad ones: at every strength the larger the better."""

    def cell(kind: str, share: Share) -> str:
        return f"{_percent(1 - share.share)} changed" if kind == "bad" else f"{_percent(share.share)} kept"

    table = Table("", "kind", "rows", *map(str, evaluation.strengths), title=title)
    parts = (lambda row: row.group, lambda row: row.length, lambda row: "all")
    for by in parts:
        found = [evaluation.kept(strength, by) for strength in evaluation.strengths]
        for (name, kind), share in found[0].items():
            table.add_row(name, kind, str(share.rows), *(cell(kind, one[name, kind]) for one in found))
        table.add_section()
    write(table)
    for strength in evaluation.strengths:
        scores = evaluation.detection(strength)
        values = {"F1": scores.f1, "precision": scores.precision, "recall": scores.recall}
        counts: dict[str, dict[str, int] | int] = {
            "verdicts": evaluation.verdicts(strength),
            "doubts": evaluation.doubts(strength),
            "cut off": evaluation.cut_off(strength),
        }
        said = [f"{name} {_percent(value) or 'none'}" for name, value in values.items()]
        said += [f"{name}: {_counted(count)}" for name, count in counts.items() if count]
        write(f"{strength}: {'; '.join(said)}")
    write(f"AUC {str(evaluation.auc) or 'none'}; {_left_out(evaluation.left_out)}")


def _left_out(rows: int) -> str:
    return f"{rows} rows left out, as they do not fit into the aligner's context"


def _counted(counts: dict[str, int] | int) -> str:
    return str(counts) if isinstance(counts, int) else ", ".join(f"{count} {name}" for name, count in counts.items())


def _print_calibration(report: CalibrationReport, left_out: int) -> None:
    calibration = report.calibration
    unit = "score" if report.bins else "nats"
    table = Table("", f"changes above, {unit}", "good kept", "refusals kept", "bad changed", "F1")
    table.title = f"{report.good} good answers, {report.bad} bad ones; in brackets 95 % intervals"
    for level, scores in report.levels.items():
        shares = map(str, (scores.kept, scores.refusals, scores.changed))
        table.add_row(level, f"{scores.threshold:.4g}", *shares, _percent(scores.detection.f1))
    write(table, width=120)
    write(f"AUC {report.auc}; {_left_out(left_out)}")
    if report.bins:
        write(
            f"score = sigmoid({calibration.scale:.4g} * evidence {calibration.bias:+.4g}); "
            f"expected calibration error {report.error:.3f}"
        )
    if report.refusals_given_up:
        write("medium changes more than 1 % of the refusals: keeping them would cost too many bad answers")


def _print_evaluation(title: str, summary: dict[str, Any], evaluation: Evaluation) -> None:
    table = Table(title=title)
    for name in ("", "category", "rows", "kept", "changed", "better", "rest intact", "length"):
        table.add_column(name, no_wrap=True)
    for (kind, name), scores in [*evaluation.by_category.items(), (("", "all"), evaluation.scores)]:
        shares = [_percent(value) for value in (scores.kept, scores.changed, scores.better, scores.rest_intact)]
        length = "" if math.isnan(scores.length_ratio) else f"{scores.length_ratio:.2f}"
        table.add_row(kind, name, str(scores.keep + scores.correct), *shares, length)
    write(table)
    for name, share in (
        ("changed, of good answers to safe questions that sound unsafe", summary["over_correction"]),
        ("changed and all others intact, where one sentence was bad", summary["others_intact"]),
    ):
        if not math.isnan(share):  # as it is where the rows have no such category
            write(f"{name}: {_percent(share)}")
    write(f"perplexity of the reference corrections: {summary['perplexity']:.2f}; cut off: {summary['cut_off']}")


def _print_rounds(run: Rounds, out: Path) -> None:
    table = Table("round", "pairs", "kept", *(run.rounds[0].metrics.verdicts if run.rounds[0].metrics else ()))
    for name in ("KL", "words", "distinct 3-grams", "refusals"):
        table.add_column(name, no_wrap=True)
    for one in run.rounds:
        cells = [str(one.number), str(one.pairs), str(one.kept)] if one.number else ["0", "", ""]
        if one.metrics:
            metrics = one.metrics
            cells += ["" if math.isnan(tally.rate) else f"{tally.rate:+.1%}" for tally in metrics.verdicts.values()]
            cells += [
                f"{metrics.kl:.3f}",
                f"{metrics.words:.0f}",
                f"{metrics.distinct[3]:.1%}",
                f"{metrics.refusals:.1%}",
            ]
        table.add_row(*cells)
    write(table)
    for reason in run.stopped:
        write(f"stopped after round {run.rounds[-1].number}: {reason}")
    place = f"{out}/round-{run.best}/adapter" if run.best else "the first policy"
    write(f"best: {place}; {out}/rounds.png shows the rounds")


def _named(path: Path, rows: Rows) -> list[Triple]:
    """Say which rows were left out, and give the others."""
    reasons: dict[str, list[int]] = {}
    for line, reason in rows.left_out:
        reasons.setdefault(reason, []).append(line)
    for reason, lines in reasons.items():
        shown = ", ".join(map(str, lines[:5])) + (", …" if len(lines) > 5 else "")
        note(f"{path}: {len(lines)} rows left out, as {reason} (lines {shown})")
    return rows.triples


@contextmanager
def _resumable() -> Iterator[None]:
    """Say, where the command is interrupted meanwhile, that repeating it goes on from there."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt("repeat the command to resume") from None
