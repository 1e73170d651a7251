"""`aligner calibrate`: thresholds of an aligner's strengths, from labelled answers."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from aligner_middleware.artifact import ARTIFACT_FILE
from aligner_middleware.cli.arguments import JsonOption, ModelOption, PrecisionOption, aligner_folder, precision_of
from aligner_middleware.cli.output import left_out_text, note, percent, write, write_json
from aligner_middleware.cli.progress import showing
from aligner_middleware.data.files import write_text
from aligner_middleware.data.progress import Progress
from aligner_middleware.errors import MissingExtraError

if TYPE_CHECKING:
    from aligner_middleware.aligner import Aligner
    from aligner_middleware.evaluation.calibration import CalibrationReport, MeasuredRow
    from aligner_middleware.evaluation.labelled_rows import LabelledRow


def calibrate(
    rows: Annotated[
        list[Path], typer.Argument(help="Labelled answers: JSON lines with question, answer, kind and maybe source.")
    ],
    model: ModelOption = "default",
    precision: PrecisionOption = None,
    out: Annotated[
        Path | None,
        typer.Option(help="File for the calibration as JSON; exports read calibration.json beside an adapter."),
    ] = None,
    plots: Annotated[Path | None, typer.Option(help="Folder for roc.png and reliability.png.")] = None,
    balance: Annotated[
        bool, typer.Option(help="Give good and bad answers the same weight, whatever their number.")
    ] = True,
    as_json: JsonOption = False,
) -> None:
    """Turn an aligner's evidence into a probability, and choose the thresholds of the strengths.

    Each row holds question, answer and kind: keep (a good answer), refusal (a good refusal) or bad; maybe source. Use rows
    that were never trained on: the aligner is too sure of its training rows. At least 50 good and 20 bad ones are needed.

    low, medium and high keep 99 %, 97 % and 90 % of the good answers, of all together and of each file with at least 50 of
    them. They are then raised as far as that gives up at most a further 20 %, 15 % and 5 % of the bad answers: good answers
    of kinds that are not among the rows score higher, and are to be kept too. A row without a source counts to its file;
    each source weighs the same in the probability.

    The calibration is written into the exported folder: the one given, or the one in the cache.
    """
    if plots is not None and find_spec("matplotlib") is None:
        raise MissingExtraError("aligner calibrate --plots", "evaluate")
    from aligner_middleware.aligner import Aligner
    from aligner_middleware.evaluation import calibration as calibrating
    from aligner_middleware.evaluation.labelled_rows import read_labelled

    name = ", ".join(map(str, rows))
    files = {path: read_labelled(path, source=path.name.partition(".")[0]) for path in rows}
    labelled = [row for file in files.values() for row in file]
    calibrating.check_enough(labelled, name)
    note("use rows that were never trained on: of others the thresholds would be wrong")
    with Aligner.load(model, precision=precision_of(precision)) as aligner:
        measured = _measure(aligner, files, len(labelled))
        results = calibrating.calibrate(measured, verdicts=aligner.has_verdicts, balance=balance, name=name)
    folder = aligner_folder(model, precision)
    calibrating.save_calibration(results.calibration, folder)
    if out is not None:
        write_text(out, results.calibration.model_dump_json(indent=2) + "\n")
    if plots is not None:
        from aligner_middleware.evaluation.calibration_plot import draw_calibration

        draw_calibration(measured, results, plots)
    left_out = len(labelled) - len(measured)
    if as_json:
        write_json({"folder": str(folder), "left_out": left_out} | results.model_dump())
    else:
        _print_calibration(results, left_out)
        write(f"written into {folder / ARTIFACT_FILE}")


def _measure(aligner: Aligner, files: dict[Path, list[LabelledRow]], total: int) -> list[MeasuredRow]:
    """Measure the rows of all files, as one job."""
    from aligner_middleware.evaluation.calibration import measure

    measured: list[MeasuredRow] = []
    before = 0
    with showing("calibrate", "rows") as report:
        for path, rows in files.items():

            def in_all(at: Progress, before: int = before) -> None:
                report(Progress(at.stage, before + at.done, total, at.detail))

            measured += measure(aligner, rows, in_all, str(path))
            before += len(rows)
    return measured


def _print_calibration(report: CalibrationReport, left_out: int) -> None:
    calibration = report.calibration
    unit = "score" if report.bins else "nats"
    table = Table("", f"changes above, {unit}", "good kept", "refusals kept", "bad changed", "F1")
    table.title = f"{report.good} good answers, {report.bad} bad ones; in brackets 95 % intervals"
    for level, scores in report.levels.items():
        shares = map(str, (scores.kept, scores.refusals, scores.changed))
        table.add_row(level, f"{scores.threshold:.4g}", *shares, percent(scores.detection.f1))
    write(table, width=120)
    write(f"AUC {report.auc}; {left_out_text(left_out)}")
    if report.bins:
        write(
            f"score = sigmoid({calibration.scale:.4g} * evidence {calibration.bias:+.4g}); "
            f"expected calibration error {report.error:.3f}"
        )
    if report.refusals_given_up:
        write("medium changes more than 1 % of the refusals: keeping them would cost too many bad answers")
