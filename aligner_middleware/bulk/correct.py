"""Corrections as rows of JSON: of some answers at once, or of a job whose rows a file gets when all are done."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from aligner_middleware.aligner import Aligner
from aligner_middleware.correction import Correction, Usage
from aligner_middleware.data.files import fingerprint, write_lines
from aligner_middleware.data.journal import Journal, Run, journal_of
from aligner_middleware.data.progress import Report, ignore
from aligner_middleware.errors import AlignerError
from aligner_middleware.strength import OnDoubt, Strength

BATCH = 32  # answers that are corrected together

Pair = tuple[str, str]
Outcome = dict[str, Any] | AlignerError
Load = Callable[[], Aligner]


@dataclass(frozen=True)
class Options:
    """How answers are corrected.

    Attributes:
        strength: A level, or the score above which an answer is corrected.
        on_doubt: Result where a safeguard objects to a correction.
        shadow: Whether the answers stay as they are, and their rows tell what would change.
    """

    strength: Strength = "medium"
    on_doubt: OnDoubt = "passthrough"
    shadow: bool = False


def correct_pairs(aligner: Aligner, options: Options, pairs: Sequence[Sequence[str]]) -> list[Outcome]:
    """Correct answers together: for each question and answer its row, or its error."""
    asked: OnDoubt = "passthrough" if options.shadow and options.on_doubt == "raise" else options.on_doubt
    together = [(question, answer) for question, answer in pairs]
    results = aligner.correct_batch(together, strength=options.strength, on_doubt=asked, return_exceptions=True)
    rows: list[Outcome] = []
    for (question, answer), result in zip(together, results, strict=True):
        if isinstance(result, Correction):
            rows.append(_shadow(result) if options.shadow else _as_dict(result))
        elif not isinstance(result, AlignerError):
            raise result
        elif options.shadow:
            failure = {"mode": "shadow", "would_change": False, "reason": f"{type(result).__name__}: {result}"}
            rows.append(_as_dict(Correction(question, answer, answer, "stop", Usage())) | failure)
        else:
            rows.append(result)
    return rows


def correcting(load: Load, options: Options) -> Callable[[Sequence[Sequence[str]]], list[Outcome]]:
    """Make the function that corrects a batch, with an aligner of its own: what a worker on Ray does first.

    Args:
        load: Gives the aligner, such as `functools.partial(Aligner.load, "default")`.
        options: How it corrects.
    """
    aligner = load()
    return lambda pairs: correct_pairs(aligner, options, pairs)


def in_this_process(aligner: Aligner, options: Options) -> Run[Pair]:
    """Make the function that corrects a job's answers here, batch by batch."""

    def run(items: Mapping[str, Pair]) -> Iterator[dict[str, Outcome]]:
        keys = list(items)
        for start in range(0, len(keys), BATCH):
            part = keys[start : start + BATCH]
            yield dict(zip(part, correct_pairs(aligner, options, [items[key] for key in part]), strict=True))

    return run


def correct_all(
    rows: Sequence[Pair | AlignerError],
    out: Path,
    run: Run[Pair],
    identity: Mapping[str, Any],
    options: Options,
    report: Report = ignore,
) -> list[Outcome]:
    """Correct the answers of a job, wherever that is done, and write the rows in their order when all are done.

    Finished answers are kept by their text in a journal beside `out`: an interrupted job resumes, equal answers to equal
    questions are corrected once, and a job whose rows were mended corrects only those.

    Args:
        rows: Question and answer of each row, or why it could not be read.
        out: File for the rows that could be corrected, JSON lines.
        run: Corrects the answers that are not done, as `in_this_process` and `RayWorkers.run` do.
        identity: Of the aligner; with `options` it is what an interrupted job must have been begun with.
        options: How answers are corrected.
        report: Called after each batch, with the stage `correct`.

    Returns:
        What became of each row: its correction, or its error. If there is an error, the journal stays.

    Raises:
        ConfigError: If the journal was begun with another aligner or other options.
        JobError: If a file cannot be read or written, or another process works on the job.
    """
    keys = ["" if isinstance(row, AlignerError) else fingerprint(json.dumps(row)) for row in rows]
    items = {key: row for key, row in zip(keys, rows, strict=True) if not isinstance(row, AlignerError)}
    with Journal(journal_of(out), {"aligner": dict(identity), "options": asdict(options)}) as journal:
        failed = journal.finish(items, run, "correct", report)
        found = {**journal.done, **failed}
        outcomes = [row if isinstance(row, AlignerError) else found[key] for key, row in zip(keys, rows, strict=True)]
        write_lines(out, [outcome for outcome in outcomes if isinstance(outcome, dict)])
        if not any(isinstance(outcome, AlignerError) for outcome in outcomes):
            journal.remove()
    return outcomes


def _as_dict(correction: Correction) -> dict[str, Any]:
    return asdict(correction) | {"changed": correction.changed}


def _shadow(correction: Correction) -> dict[str, Any]:
    """Give the row of an answer that stays as it is, with the correction as a proposal."""
    text = correction.corrected if correction.proposed is None else correction.proposed
    proposal = None if text == correction.original else text
    unchanged = replace(correction, corrected=correction.original, proposed=proposal)
    return _as_dict(unchanged) | {"mode": "shadow", "would_change": correction.changed}
