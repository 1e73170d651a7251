"""Preference data: a model's answer is rejected, and the aligner's correction of it is chosen (paper, section 4).

Both follow from the model's own present answers, so that the pairs stay close to its own distribution: the data of a round
of RLHF or DPO.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from langchain_core.runnables import Runnable

from aligner_middleware.aligner import Aligner
from aligner_middleware.data.files import fingerprint, write_lines
from aligner_middleware.data.journal import Journal, Row, Run, journal_of
from aligner_middleware.data.progress import Report, ignore
from aligner_middleware.data.prompts import Prompt, chunks, digest
from aligner_middleware.data.upstream import Answered, ask, describe_failure, name_of

Form = Literal["messages", "text"]


@dataclass
class PreferenceSummary:
    """Counts of a job.

    Attributes:
        pairs: Preference rows written.
        kept: Answers that the aligner left as they are: no pair.
        repeated: Repeated pairs, which are written once.
        failed: Prompts without a result, by their key, each with the reason; the same command asks them again.
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
    report: Report = ignore,
) -> PreferenceSummary:
    """Make preference rows, as TRL's DPO and reward trainers read them: `prompt`, `chosen`, `rejected`.

    Finished prompts are kept in a journal beside `out`: an interrupted job resumes, and no row is lost or doubled.

    Args:
        prompts: What to ask; those with an answer are not asked.
        out: File for the rows, JSON lines; it appears when all prompts are done.
        aligner: Corrects the answers.
        upstream: The model that answers; a prompt without an answer fails where there is none.
        form: Rows of `messages`, for chat models, or of plain `text`.
        sft: File for the answers that were left as they are, as rows for supervised fine-tuning; `None` leaves them out.
        upstream_name: The model's name in the rows; `None` for its own name.
        concurrency: Prompts under way at once.
        attempts: How often a prompt is tried.
        report: Called after each batch of prompts, with the stage `preferences`.

    Returns:
        The job's counts. If prompts failed, the rows of the others are written, and the journal stays.

    Raises:
        ConfigError: If the journal was begun with other prompts or models.
        JobError: If a file cannot be read or written, or another process works on the job.
    """
    name = upstream_name or (name_of(upstream) if upstream else None)

    def run(todo: Mapping[str, Prompt]) -> Iterator[dict[str, Row]]:
        for part in chunks(list(todo.values()), concurrency * 4):
            rows = correct_prompts(part, aligner, upstream, concurrency, attempts)
            yield dict(zip((prompt.key for prompt in part), rows, strict=True))

    return collect(prompts, out, run, aligner.identity, name, form=form, sft=sft, report=report)


def collect(
    prompts: Sequence[Prompt],
    out: Path,
    run: Run[Prompt],
    aligner: Mapping[str, Any],
    upstream: str | None,
    *,
    form: Form,
    sft: Path | None,
    report: Report,
) -> PreferenceSummary:
    """Record corrections in a journal, wherever they are made, and write preference rows at the end.

    Args:
        prompts: All prompts of the job.
        out: File for the rows.
        run: Asks and corrects the prompts that are not done, as `Journal.finish` takes it.
        aligner: Identity of the aligner, for provenance.
        upstream: Name of the model that answers.
        form: As in `make_preferences`, as are `sft` and `report`.
        sft: File for the answers that were left as they are.
        report: Called after each batch.
    """
    settings = {"aligner": dict(aligner), "upstream": upstream, "prompts": digest(prompts)}
    by_key = {prompt.key: prompt for prompt in prompts}
    with Journal(journal_of(out), settings) as journal:
        failed = journal.finish(by_key, run, "preferences", report)
        rows = [journal.done[prompt.key] for prompt in prompts if prompt.key in journal.done]
        summary = _write(rows, out, sft, form, settings)
        summary.failed = {key: describe_failure(by_key[key], error) for key, error in failed.items()}
        if not failed:
            journal.remove()
    return summary


def correct_prompts(
    prompts: Sequence[Prompt],
    aligner: Aligner,
    upstream: Runnable[Any, Any] | None,
    concurrency: int = 8,
    attempts: int = 3,
) -> list[Row]:
    """Have some prompts answered and corrected: each gives its row, or the error that prevented it.

    A row has question, answer, correction and time.
    """
    answers = ask(prompts, upstream, concurrency, attempts)
    pairs = [
        (prompt.question, answer.text)
        for prompt, answer in zip(prompts, answers, strict=True)
        if isinstance(answer, Answered)
    ]
    corrections = iter(aligner.correct_batch(pairs, return_exceptions=True))
    rows: list[Row] = []
    for answer in answers:
        result = next(corrections) if isinstance(answer, Answered) else answer
        if isinstance(result, Exception):
            rows.append(result)
        else:
            row = {"question": result.question, "answer": result.original, "correction": result.corrected}
            rows.append(row | {"at": datetime.now(UTC).isoformat(timespec="seconds")})
    return rows


def _write(
    rows: Sequence[dict[str, Any]], out: Path, sft: Path | None, form: Form, settings: dict[str, Any]
) -> PreferenceSummary:
    pairs, keeps, seen = [], [], set[tuple[str, str, str]]()
    for row in rows:
        texts = (row["question"], row["answer"], row["correction"])
        if texts in seen:
            continue
        seen.add(texts)
        provenance = {"upstream": settings["upstream"], "aligner": settings["aligner"], "at": row["at"]}
        provenance["sha256"] = fingerprint(*texts)
        if row["answer"] == row["correction"]:
            keeps.append({**_shaped(form, row["question"], completion=row["answer"]), "provenance": provenance})
        else:
            shaped = _shaped(form, row["question"], chosen=row["correction"], rejected=row["answer"])
            pairs.append({**shaped, "provenance": provenance})
    write_lines(out, pairs)
    if sft is not None:
        write_lines(sft, keeps)
    return PreferenceSummary(len(pairs), len(keeps), len(rows) - len(seen))


def _shaped(form: Form, question: str, **answers: str) -> dict[str, Any]:
    if form == "text":
        return {"prompt": question, **answers}
    messages = {name: [{"role": "assistant", "content": text}] for name, text in answers.items()}
    return {"prompt": [{"role": "user", "content": question}], **messages}
