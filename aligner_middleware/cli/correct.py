"""`aligner correct`: one answer, the lines of a file or of standard input as they arrive, or a job that resumes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeGuard, get_args

import typer

from aligner_middleware.cli.arguments import (
    JsonOption,
    ModelOption,
    PrecisionOption,
    RayAddressOption,
    RayWorkersOption,
    UrlModelOption,
    UrlOption,
    aligner_recipe,
    choice,
    strength_of,
)
from aligner_middleware.cli.output import note, note_error, write, write_json
from aligner_middleware.cli.progress import resumable, showing
from aligner_middleware.data.json_lines import open_bytes, parse_json, reading, text_at
from aligner_middleware.data.progress import Progress, Report, ignore
from aligner_middleware.errors import AlignerError, DataError, JobError, MissingExtraError

if TYPE_CHECKING:
    from aligner_middleware.aligner import Aligner
    from aligner_middleware.bulk.correct import Load, Options, Outcome, Pair
    from aligner_middleware.data.journal import Run

_BATCH = 32  # lines that are corrected together
_CHUNK = 2**16  # bytes read at once

_InstructionOption = Annotated[
    str | None,
    typer.Option(
        "--instruction",
        help="How to correct, for an aligner that was trained with instructions, such as 'more empathic'.",
    ),
]


def correct(
    file: Annotated[
        Path | None,
        typer.Argument(
            help="JSON lines with `question` and `answer`, plain or gzipped. By default standard input.",
            show_default=False,
        ),
    ] = None,
    question: Annotated[str | None, typer.Option("--question", "-q", help="The question.")] = None,
    answer: Annotated[str | None, typer.Option("--answer", "-a", help="The answer.")] = None,
    model: ModelOption = "default",
    precision: PrecisionOption = None,
    url: UrlOption = None,
    url_model: UrlModelOption = None,
    strength: Annotated[
        str, typer.Option(help="low, medium or high; or the score above which an answer is corrected.")
    ] = "medium",
    on_doubt: Annotated[
        str,
        typer.Option(
            metavar="passthrough|raise|keep",
            help="Result where a safeguard objects to the correction: the original answer, an error, or the correction.",
        ),
    ] = "passthrough",
    instruction: _InstructionOption = None,
    mode: Annotated[
        str,
        typer.Option(
            metavar="correct|shadow", help="`shadow` changes nothing; with --json it tells what would change."
        ),
    ] = "correct",
    out: Annotated[
        Path | None,
        typer.Option(help="File for the rows, written when all are done; the command, repeated after a kill, resumes."),
    ] = None,
    ray_workers: RayWorkersOption = None,
    ray_address: RayAddressOption = None,
    as_json: JsonOption = False,
) -> None:
    """Correct one answer, or JSON lines with `question` and `answer`.

    Each line that can be corrected gives a line of JSON, in the same order. The others are named on standard error, and the
    exit status is 1 when all are done. With --out the rows become a file, and the job can be interrupted.
    """
    if (question is None) != (answer is None) or (question is not None and (file or out)):
        raise typer.BadParameter("give both --question and --answer, or neither and JSON lines in a file")
    _check_out(out, file, ray_workers)
    from aligner_middleware.bulk.correct import Options, correct_pairs, in_this_process
    from aligner_middleware.strength import OnDoubt

    shadow = choice(mode, ("correct", "shadow"), "--mode") == "shadow"
    options = Options(strength_of(strength), choice(on_doubt, get_args(OnDoubt), "--on-doubt"), shadow)
    load, source = aligner_recipe(model, precision, url, url_model, instruction), None if file == Path("-") else file
    aligner = load()
    _check_score(aligner, options)
    if question is not None and answer is not None:
        _print_one(correct_pairs(aligner, options, [(question, answer)])[0], as_json=as_json)
    elif out is None:
        _correct_lines(source, partial(correct_pairs, aligner, options))
    elif ray_workers is None:
        _correct_to(out, source, in_this_process(aligner, options), aligner.identity, options, as_json=as_json)
    else:
        aligner.close()  # it was built, where it had to be, once for the workers of this machine
        run = _on_ray(load, options, ray_workers, ray_address)
        _correct_to(out, source, run, aligner.identity, options, as_json=as_json)


def _check_score(aligner: Aligner, options: Options) -> None:
    if aligner.has_verdicts and isinstance(options.strength, float) and options.strength > 1:
        raise typer.BadParameter(f"{options.strength:g} is no score from 0 to 1", param_hint="--strength")


def _check_out(out: Path | None, file: Path | None, ray_workers: int | None) -> None:
    if ray_workers is not None and out is None:
        raise typer.BadParameter("needs --out, a file for the rows", param_hint="--ray-workers")
    if file is not None and out is not None and out.resolve() == file.resolve():
        raise typer.BadParameter("is the file that is read: name another one", param_hint="--out")


def _print_one(row: Outcome, *, as_json: bool) -> None:
    if isinstance(row, AlignerError):
        raise row
    if "reason" in row:
        note(f"not aligned: {row['reason']}")
    if as_json:
        write_json(row)
    else:
        write(row["corrected"])


def _correct_lines(file: Path | None, correct: Callable[[list[Pair]], list[Outcome]]) -> None:
    """Print the outcome of each line of a file, or of standard input.

    Raises:
        AlignerError: When all are done, if some could not be corrected.
    """
    name = _name(file)
    lines = bad = 0
    with _opened(file) as (source, total), _line_progress(total) as report:
        for batch in _batches(source, name):
            read = [_pair(name, number, line) for number, line in batch]
            results = iter(correct([pair for pair in read if isinstance(pair, tuple)]))
            for (number, _), pair in zip(batch, read, strict=True):
                outcome = next(results) if isinstance(pair, tuple) else pair
                if _is_row(outcome, f"{name}:{number}"):
                    write_json(outcome)
                else:
                    bad += 1
            lines += len(batch)
            report(Progress("correct", batch[-1][0], total))
    if bad:
        raise AlignerError(f"{bad} of {lines} rows of {name} could not be corrected; the others are")


def _on_ray(load: Load, options: Options, workers: int, address: str | None) -> Run[Pair]:
    from aligner_middleware.bulk.correct import BATCH, correcting

    try:
        from aligner_middleware.bulk.ray import RayWorkers
    except ImportError as exc:
        raise MissingExtraError("aligner correct --ray-workers", "ray") from exc
    return RayWorkers(partial(correcting, load, options), workers, BATCH, address).run


def _correct_to(
    out: Path, file: Path | None, run: Run[Pair], identity: dict[str, Any], options: Options, *, as_json: bool
) -> None:
    """Write the rows of a file, or of standard input, to another file, and tell how many there are.

    Raises:
        AlignerError: When all are done, if some could not be corrected.
    """
    from aligner_middleware.bulk.correct import correct_all

    name = _name(file)
    with _opened(file) as (source, _):
        lines = [
            (f"{name}:{number}", _pair(name, number, line)) for part in _batches(source, name) for number, line in part
        ]
    with resumable(), showing("correct", "answers") as report:
        outcomes = correct_all([row for _, row in lines], out, run, identity, options, report)
    rows = [outcome for (place, _), outcome in zip(lines, outcomes, strict=True) if _is_row(outcome, place)]
    bad, changed = len(lines) - len(rows), sum(outcome["changed"] for outcome in rows)
    if as_json:
        write_json({"rows": len(rows), "changed": changed, "failed": bad})
    else:
        write(f"{out}: {len(rows)} rows, of which {changed} were changed")
    if bad:
        reason = "could not be corrected; the others are, and the same command tries these again"
        raise AlignerError(f"{bad} of {len(lines)} rows of {name} {reason}")


def _name(file: Path | None) -> str:
    return "standard input" if file is None else str(file)


def _is_row(outcome: Outcome, place: str) -> TypeGuard[dict[str, Any]]:
    """Tell whether there is a row; note an error, or a row's reason, with its place."""
    if isinstance(outcome, AlignerError):
        note_error(str(outcome) if isinstance(outcome, DataError) else f"{place}: {outcome}")
        return False
    if "reason" in outcome:
        note(f"{place}: not aligned: {outcome['reason']}")
    return True


@contextmanager
def _opened(file: Path | None) -> Iterator[tuple[Any, int | None]]:
    """Open a file, or standard input, and count its lines where it can be read twice."""
    if file is None:
        if sys.stdin is None:
            raise JobError("standard input", "is closed: give a file, or --question and --answer")
        if sys.stdin.isatty():
            note("reading JSON lines with question and answer; --help lists other ways to give them")
        yield sys.stdin.buffer, None
        return
    total = None
    with reading(file):
        if file.is_file():  # no pipe
            with open_bytes(file) as counted:
                total = sum(1 for _ in counted)
        source = open_bytes(file)
    with source:
        yield source, total


@contextmanager
def _line_progress(total: int | None) -> Iterator[Report]:
    if sys.stdout.isatty():  # the printed rows themselves show it
        yield ignore
        return
    with showing("correct", "lines") as report:
        if total is not None:
            report(Progress("correct", 0, total))
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
            numbered = [(index, line) for index, line in enumerate(lines, number + 1) if line.strip()]
            number += len(lines)
            for start in range(0, len(numbered), _BATCH):
                yield numbered[start : start + _BATCH]


def _pair(name: str, number: int, line: bytes) -> Pair | DataError:
    try:
        row = parse_json(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        if not isinstance(row, dict):
            raise ValueError("it is no JSON object with question and answer")
        return text_at(row, "question"), text_at(row, "answer")
    except ValueError as exc:
        return DataError(name, number, str(exc))
