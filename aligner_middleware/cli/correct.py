"""`aligner correct`: one answer, or the lines of a file or of standard input as they arrive."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from aligner_middleware.cli.arguments import (
    JsonOption,
    ModelOption,
    PrecisionOption,
    UrlOption,
    aligner_of,
    choice,
    strength_of,
)
from aligner_middleware.cli.output import note, note_error, write, write_json
from aligner_middleware.cli.progress import showing
from aligner_middleware.correction import Correction, Usage
from aligner_middleware.data.json_lines import open_bytes, parse_json, reading, text_at
from aligner_middleware.data.progress import Progress, Report, ignore
from aligner_middleware.errors import AlignerError, DataError, JobError

if TYPE_CHECKING:
    from aligner_middleware.aligner import Aligner
    from aligner_middleware.strength import OnDoubt, Strength

_BATCH = 32  # answers that are corrected together
_CHUNK = 2**16  # bytes read at once

_InstructionOption = Annotated[
    str | None,
    typer.Option(
        "--instruction",
        help="How to correct, for an aligner that was trained with instructions, such as 'more empathic'.",
    ),
]

Pair = tuple[str, str]
Outcome = dict[str, Any] | AlignerError


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
    as_json: JsonOption = False,
) -> None:
    """Correct one answer, or JSON lines with `question` and `answer`.

    Each line that can be corrected gives a line of JSON, in the same order. The others are named on standard error, and the
    exit status is 1 when all are done.
    """
    if (question is None) != (answer is None) or (question is not None and file is not None):
        raise typer.BadParameter("give both --question and --answer, or neither and JSON lines in a file")
    from aligner_middleware.strength import OnDoubt

    shadow = choice(mode, ("correct", "shadow"), "--mode") == "shadow"
    doubt: OnDoubt = choice(on_doubt, get_args(OnDoubt), "--on-doubt")
    chosen = strength_of(strength)
    aligner = aligner_of(model, precision, url, instruction)
    if aligner.has_verdicts and isinstance(chosen, float) and chosen > 1:
        raise typer.BadParameter(f"{strength} is no score from 0 to 1", param_hint="--strength")

    def outcomes(pairs: list[Pair]) -> list[Outcome]:
        return _outcomes(aligner, pairs, chosen, doubt, shadow=shadow)

    if question is None or answer is None:
        _correct_lines(None if file == Path("-") else file, outcomes)
        return
    (row,) = outcomes([(question, answer)])
    if isinstance(row, AlignerError):
        raise row
    if "reason" in row:
        note(f"not aligned: {row['reason']}")
    if as_json:
        write_json(row)
    else:
        write(row["corrected"])


def _outcomes(
    aligner: Aligner, pairs: list[Pair], strength: Strength, on_doubt: OnDoubt, *, shadow: bool
) -> list[Outcome]:
    """Correct answers together: for each its row, or its error. In shadow mode the answers stay as they are."""
    asked: OnDoubt = "passthrough" if shadow and on_doubt == "raise" else on_doubt
    results = aligner.correct_batch(pairs, strength=strength, on_doubt=asked, return_exceptions=True)
    rows: list[Outcome] = []
    for (question, answer), result in zip(pairs, results, strict=True):
        if isinstance(result, Correction):
            rows.append(_shadow(result) if shadow else _as_dict(result))
        elif not isinstance(result, AlignerError):
            raise result
        elif shadow:
            failure = {"mode": "shadow", "would_change": False, "reason": f"{type(result).__name__}: {result}"}
            rows.append(_as_dict(Correction(question, answer, answer, "stop", Usage())) | failure)
        else:
            rows.append(result)
    return rows


def _as_dict(correction: Correction) -> dict[str, Any]:
    return asdict(correction) | {"changed": correction.changed}


def _shadow(correction: Correction) -> dict[str, Any]:
    """Give the row of an answer that stays as it is, with the correction as a proposal."""
    text = correction.corrected if correction.proposed is None else correction.proposed
    proposal = None if text == correction.original else text
    unchanged = replace(correction, corrected=correction.original, proposed=proposal)
    return _as_dict(unchanged) | {"mode": "shadow", "would_change": correction.changed}


def _correct_lines(file: Path | None, correct: Callable[[list[Pair]], list[Outcome]]) -> None:
    """Print the outcome of each line of a file, or of standard input.

    Raises:
        AlignerError: When all are done, if some could not be corrected.
    """
    name = "standard input" if file is None else str(file)
    lines = bad = 0
    with _opened(file) as (source, total), _line_progress(total) as report:
        for batch in _batches(source, name):
            read = [_pair(name, number, line) for number, line in batch]
            results = iter(correct([pair for pair in read if isinstance(pair, tuple)]))
            for (number, _), pair in zip(batch, read, strict=True):
                bad += not _print_outcome(f"{name}:{number}", next(results) if isinstance(pair, tuple) else pair)
            lines += len(batch)
            report(Progress("correct", batch[-1][0], total))
    if bad:
        raise AlignerError(f"{bad} of {lines} rows of {name} could not be corrected; the others are")


def _print_outcome(place: str, outcome: Outcome) -> bool:
    """Print a row, or note an error with its place; tell whether there was a row."""
    if isinstance(outcome, AlignerError):
        note_error(str(outcome) if isinstance(outcome, DataError) else f"{place}: {outcome}")
        return False
    if "reason" in outcome:
        note(f"{place}: not aligned: {outcome['reason']}")
    write_json(outcome)
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
