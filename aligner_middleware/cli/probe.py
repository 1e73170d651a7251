"""`aligner probe`: where in its layers an aligner decides, and whether it knows more than its verdict says."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from aligner_middleware.cli.arguments import JsonOption
from aligner_middleware.cli.output import left_out_text, percent, write, write_json
from aligner_middleware.cli.progress import showing
from aligner_middleware.cli.rows import labelled_rows
from aligner_middleware.data.files import write_text
from aligner_middleware.errors import MissingExtraError

if TYPE_CHECKING:
    from aligner_middleware.evaluation.hidden_states import ReadRows, StateReader
    from aligner_middleware.evaluation.labelled_rows import LabelledRow
    from aligner_middleware.evaluation.probe import Directions, ProbeReport, TestScores

_SCANNED, _TOKENS = 2, 24  # rows of each class that are drawn, and their last tokens


def probe(
    rows: Annotated[Path, typer.Argument(help="Labelled answers, as `aligner evaluate` reads them, or a public set.")],
    model: Annotated[
        str, typer.Option("--model", "-m", help="`default`, the folder of an adapter or a checkpoint, or a hub id.")
    ] = "default",
    test: Annotated[
        list[Path] | None,
        typer.Option(
            help="Rows of other sources to test on; may be repeated. By default half of ROWS.", show_default=False
        ),
    ] = None,
    plots: Annotated[Path | None, typer.Option(help="Folder for layers.png and scan.png.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="File for the report with the chosen layer's direction, as JSON.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Find the direction of keep against correct in an aligner's hidden states (paper, section 3.4).

    It runs the checkpoint in PyTorch over the prompts of labelled answers, and reads each layer's output at the last token,
    from which the verdict is predicted. A layer's direction is the first principal component of differences between bad
    answers and good ones. Reported are how well it separates answers that it was not found on, layer by layer, where the
    decision first sits, and whether the direction is better than the verdict at changing bad answers and keeping good ones.

    Without --test the rows are split by question: half to find the directions on, half to test them. At least 20 good and 20
    bad answers are needed on each side, and some hundreds of short ones are enough.
    """
    if plots is not None and find_spec("matplotlib") is None:
        raise MissingExtraError("aligner probe --plots", "evaluate")
    if test and rows in test:
        raise typer.BadParameter(f"{rows} is what the directions are found on: name other rows", param_hint="--test")
    found = {path: _labelled(path) for path in [rows, *(test or [])]}
    try:
        from aligner_middleware.evaluation.hidden_states import StateReader
    except ImportError as exc:
        raise MissingExtraError("aligner probe", "build") from exc
    from aligner_middleware.evaluation import probe as probing

    reader = StateReader.load(model)
    read = {path: _read(reader, path, one) for path, one in found.items()}
    fitted = read.pop(rows)
    left_out = fitted.left_out + sum(one.left_out for one in read.values())
    tests = {str(path): one for path, one in read.items()}
    if not tests:
        chosen = probing.halves(fitted.rows)
        fitted, tests = fitted.where(chosen), {f"half of {rows}": fitted.where(~chosen)}
    for name, one in {str(rows): fitted, **tests}.items():
        probing.check_enough(one.unsafe, name)
    directions, report = probing.probe(fitted, tests)
    if out is not None:
        write_text(out, report.model_dump_json(indent=2) + "\n")
    if plots is not None:
        _draw(reader, directions, report, next(iter(tests.values())).rows, plots)
    if as_json:
        write_json({"model": model, "left_out": left_out} | report.model_dump(exclude={"direction"}))
    else:
        _print_probe(model, report, left_out)


def _labelled(path: Path) -> Sequence[LabelledRow]:
    from aligner_middleware.evaluation.public_sets import read_public

    return labelled_rows(path, read_public(path))


def _read(reader: StateReader, path: Path, rows: Sequence[LabelledRow]) -> ReadRows:
    with showing(f"probe {path.name}", "rows") as report:
        return reader.read(rows, report)


def _draw(
    reader: StateReader, directions: Directions, report: ProbeReport, rows: Sequence[LabelledRow], folder: Path
) -> None:
    """Draw the layers, and the maps of the first good and bad rows."""
    from aligner_middleware.evaluation.probe_plot import Scan, draw_layers, draw_scans

    draw_layers(report, folder / "layers.png")
    scans = []
    for unsafe in (False, True):
        for row in [row for row in rows if row.unsafe == unsafe][:_SCANNED]:
            last = reader.read_last(row, _TOKENS)
            if last is not None:
                scans.append(Scan(row.kind, last.tokens, directions.scores(last.states)))
    draw_scans(scans, folder / "scan.png")


def _print_probe(model: str, report: ProbeReport, left_out: int) -> None:
    table = Table("layer", *(test.name for test in report.tests))
    table.title = f"{model}: AUC of each layer's direction; in brackets 95 % intervals"
    for layer, areas in enumerate(zip(*(test.layers for test in report.tests), strict=True), 1):
        table.add_row(str(layer), *map(str, areas))
    table.add_section()
    if any(test.verdict is not None for test in report.tests):
        table.add_row("verdict", *(str(test.verdict) for test in report.tests))
    write(table)
    write(f"found on {report.good} good and {report.bad} bad answers; layer {report.layer} separates these best")
    for test in report.tests:
        _print_test(test, report.layer)
    write(left_out_text(left_out))


def _print_test(test: TestScores, layer: int) -> None:
    write(
        f"{test.name}, {test.good} good and {test.bad} bad answers: the decision sits from layer {test.first} of "
        f"{len(test.layers)} on; where at most 1 % of the good ones are changed, the direction of layer {layer} changes "
        f"{percent(test.changed)} of the bad ones"
        + ("" if test.verdict_changed is None else f", the verdict {percent(test.verdict_changed)}")
    )
    if test.gain is not None:
        outcome = (
            "better than the verdict" if test.better else "not better than the verdict, whose threshold stays the dial"
        )
        write(f"its AUC less the verdict's: {test.gain}: {outcome}")
