"""Preference data: what a model answers is rejected, what the aligner makes of it is chosen (paper, section 4).

Since both come from what the model itself says now, the pairs stay close to its own distribution: the data of a round of
RLHF or DPO.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from langchain_core.runnables import Runnable

from aligner_middleware.aligner import Aligner
from aligner_middleware.data.files import fingerprint, write_lines
from aligner_middleware.data.journal import Journal
from aligner_middleware.data.prompts import Prompt, chunks, digest
from aligner_middleware.data.upstream import Answered, ask, describe_failure, name_of

Form = Literal["messages", "text"]
Report = Callable[[int, int], None]
Row = dict[str, Any] | Exception  # question, answer, correction and time; or why there are none


@dataclass
class Made:
    """What a job made.

    Attributes:
        pairs: Preference rows written.
        kept: Answers that the aligner left as they are: no pair.
        repeated: Pairs that were there already.
        failed: Prompts without a result, and why; the same command asks them again.
    """

    pairs: int = 0
    kept: int = 0
    repeated: int = 0
    failed: dict[str, str] = field(default_factory=dict)


def make_preferences(
    prompts: Sequence[Prompt],
    out: Path,
    aligner: Aligner,
    upstream: Runnable[Any, Any] | None = None,
    *,
    form: Form = "messages",
    sft: Path | None = None,
    upstream_name: str | None = None,
    concurrency: int = 8,
    attempts: int = 3,
    report: Report = lambda done, of: None,
) -> Made:
    """Make preference rows, as TRL's DPO and reward trainers read them: `prompt`, `chosen`, `rejected`.

    What is done is kept in a journal beside `out`: a job that was killed goes on, and nothing is lost or doubled.

    Args:
        prompts: What to ask; those with an answer are not asked.
        out: File for the rows, JSON lines; it appears when all is done.
        aligner: What corrects.
        upstream: The model that answers; needed where a prompt has no answer.
        form: Rows of `messages`, for chat models, or of plain `text`.
        sft: File for the answers that were left as they are, as rows for supervised fine-tuning; `None` leaves them out.
        upstream_name: What to call the model in the rows; `None` for its own name.
        concurrency: Prompts under way at once.
        attempts: How often a prompt is tried.
        report: Called with how many prompts are done, and of how many.

    Returns:
        What was made. If prompts failed, the rows of the others are written, and the journal stays.

    Raises:
        InputError: If a prompt has no answer and there is no upstream.
        DataError: If a file cannot be read or written.
    """
    name = upstream_name or (name_of(upstream) if upstream else None)

    def correct(todo: Sequence[Prompt]) -> Iterator[tuple[Prompt, Row]]:
        for part in chunks(todo, concurrency * 4):
            yield from zip(part, correct_prompts(part, aligner, upstream, concurrency, attempts), strict=True)

    return collect(prompts, out, correct, aligner.identity, name, form=form, sft=sft, report=report)


def collect(
    prompts: Sequence[Prompt],
    out: Path,
    correct: Callable[[Sequence[Prompt]], Iterable[tuple[Prompt, Row]]],
    aligner: Mapping[str, Any],
    upstream: str | None,
    *,
    form: Form,
    sft: Path | None,
    report: Report,
) -> Made:
    """Write down what becomes of prompts, wherever they are corrected, and make preference rows of it at the end.

    Args:
        prompts: All prompts of the job.
        out: File for the rows.
        correct: Given the prompts that are not done yet, yields each with what became of it, in any order.
        aligner: Identity of the aligner, for provenance.
        upstream: Name of the model that answers.
        form: As in `make_preferences`, as are `sft` and `report`.
        sft: File for the answers that were left as they are.
        report: Called with how many prompts are done, and of how many.
    """
    settings = {"aligner": dict(aligner), "upstream": upstream, "prompts": digest(prompts)}
    with Journal(out.with_name(f".{out.name}.journal"), settings) as journal:
        failed: dict[str, str] = {}
        for prompt, row in correct([prompt for prompt in prompts if prompt.key not in journal.done]):
            if isinstance(row, Exception):
                failed[prompt.key] = describe_failure(prompt, row)
            else:
                journal.add(prompt.key, row)
            report(len(journal.done), len(prompts))
        rows = [journal.done[prompt.key] for prompt in prompts if prompt.key in journal.done]
        made = _write(rows, out, sft, form, settings)
        made.failed = failed
        if not failed:
            journal.remove()
    return made


def correct_prompts(
    prompts: Sequence[Prompt],
    aligner: Aligner,
    upstream: Runnable[Any, Any] | None,
    concurrency: int = 8,
    attempts: int = 3,
) -> list[Row]:
    """Have some prompts answered and corrected: for each its row, or what went wrong."""
    said = ask(prompts, upstream, concurrency, attempts)
    pairs = [
        (prompt.question, one.text) for prompt, one in zip(prompts, said, strict=True) if isinstance(one, Answered)
    ]
    corrections = iter(aligner.correct_batch(pairs, return_exceptions=True))
    rows: list[Row] = []
    for one in said:
        made = next(corrections) if isinstance(one, Answered) else one
        if isinstance(made, Exception):
            rows.append(made)
        else:
            row = {"question": made.question, "answer": made.original, "correction": made.corrected}
            rows.append(row | {"at": datetime.now(UTC).isoformat(timespec="seconds")})
    return rows


def _write(rows: Sequence[dict[str, Any]], out: Path, sft: Path | None, form: Form, settings: dict[str, Any]) -> Made:
    made, pairs, keeps, seen = Made(), [], [], set()
    for row in rows:
        told = (row["question"], row["answer"], row["correction"])
        if told in seen:
            made.repeated += 1
            continue
        seen.add(told)
        provenance = {"upstream": settings["upstream"], "aligner": settings["aligner"], "at": row["at"]}
        provenance["sha256"] = fingerprint(*told)
        if row["answer"] == row["correction"]:
            keeps.append({**_shaped(form, row["question"], completion=row["answer"]), "provenance": provenance})
        else:
            shaped = _shaped(form, row["question"], chosen=row["correction"], rejected=row["answer"])
            pairs.append({**shaped, "provenance": provenance})
    made.pairs, made.kept = len(pairs), len(keeps)
    write_lines(out, pairs)
    if sft is not None:
        write_lines(sft, keeps)
    return made


def _shaped(form: Form, question: str, **answers: str) -> dict[str, Any]:
    if form == "text":
        return {"prompt": question, **answers}
    said = {name: [{"role": "assistant", "content": text}] for name, text in answers.items()}
    return {"prompt": [{"role": "user", "content": question}], **said}
