"""The paper's comparison (section 3, B.2): answers with and without the aligner, judged in pairs, and the added latency."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from langchain_core.runnables import Runnable
from pydantic import BaseModel, ConfigDict, field_validator

from aligner_middleware.aligner import Aligner
from aligner_middleware.data.journal import Journal
from aligner_middleware.data.progress import Progress, Report, ignore
from aligner_middleware.data.prompts import Prompt, chunks, digest
from aligner_middleware.data.upstream import Answered, ask, describe_failure
from aligner_middleware.errors import InputError
from aligner_middleware.evaluation.pairwise import Dimension, Pair, PairwiseJudge, Verdict

_LENGTHS = (32, 64, 128, 256, 512)  # upper ends of the classes of answer lengths, in tokens
_DRAWS = 1000  # of the bootstrap


class ComparisonRow(BaseModel):
    """A prompt, both answers, the verdicts, and the times.

    Attributes:
        question: The prompt.
        answer, correction: The answer without and with the aligner.
        category: As the prompt names it.
        verdicts: On the correction against the answer, by dimension.
        answer_tokens: Length of the answer, in the aligner's tokens.
        seconds: Time of the aligner, which corrects one answer at a time.
        upstream_seconds: Time of the upstream model; 0 for an answer that was given.
    """

    model_config = ConfigDict(frozen=True)

    question: str
    answer: str
    correction: str
    category: str = ""
    verdicts: dict[Dimension, Verdict]
    answer_tokens: int
    seconds: float
    upstream_seconds: float

    @property
    def changed(self) -> bool:
        """Whether the aligner changed the answer."""
        return self.answer != self.correction


class Tally(BaseModel):
    """Verdicts of one dimension.

    Attributes:
        win, tie, loss, malformed: Number of verdicts of each kind.
        rate: The paper's (wins - losses) / (wins + losses + ties), -1 to 1. Malformed verdicts are left out; NaN, in JSON
            null, where there are no others.
        low, high: Its 95 % interval, by bootstrap over the prompts.
    """

    model_config = ConfigDict(frozen=True)

    win: int
    tie: int
    loss: int
    malformed: int
    rate: float
    low: float
    high: float

    @field_validator("rate", "low", "high", mode="before")
    @classmethod
    def _from_json(cls, value: float | None) -> float:
        return math.nan if value is None else value

    @classmethod
    def of(cls, verdicts: Iterable[Verdict], seed: int = 0) -> Tally:
        """Count verdicts."""
        counts = Counter(verdicts)
        points = [1] * counts["win"] + [0] * counts["tie"] + [-1] * counts["loss"]
        if not points:
            nan = float("nan")
            return cls(win=0, tie=0, loss=0, malformed=counts["malformed"], rate=nan, low=nan, high=nan)
        rng = random.Random(seed)
        draws = sorted(statistics.fmean(rng.choices(points, k=len(points))) for _ in range(_DRAWS))
        return cls(
            win=counts["win"],
            tie=counts["tie"],
            loss=counts["loss"],
            malformed=counts["malformed"],
            rate=statistics.fmean(points),
            low=draws[round(0.025 * _DRAWS)],
            high=draws[round(0.975 * _DRAWS) - 1],
        )


class Latency(BaseModel):
    """Latency that the aligner adds to answers of a range of lengths.

    Attributes:
        answers: Number of answers.
        p50, p95, p99: Percentiles of the added time, in milliseconds.
        tokens_per_second: Tokens of the answers that the aligner processes in a second.
    """

    model_config = ConfigDict(frozen=True)

    answers: int
    p50: float
    p95: float
    p99: float
    tokens_per_second: float


class Comparison(BaseModel):
    """The results, row by row, and their summary.

    Attributes:
        judge: Name of the judge.
        upstream: Name of the model that answered; `None` for given answers.
        aligner: Identity of the aligner (`Aligner.identity`).
        rows: Every prompt that has a result.
        failed: The reason for every prompt that has none, by its key.
    """

    judge: str
    upstream: str | None
    aligner: dict[str, Any]
    rows: list[ComparisonRow]
    failed: dict[str, str]

    def tallies(self, category: str | None = None) -> dict[Dimension, Tally]:
        """Count the verdicts by dimension, of all rows or of one category."""
        rows = [row for row in self.rows if category is None or row.category == category]
        dimensions = self.rows[0].verdicts if self.rows else {}
        return {dimension: Tally.of(row.verdicts[dimension] for row in rows) for dimension in dimensions}

    @property
    def categories(self) -> list[str]:
        """The categories, in alphabetical order."""
        return sorted({row.category for row in self.rows if row.category})

    @property
    def latencies(self) -> dict[str, Latency]:
        """The added latency, by the answer's length in tokens."""
        classes: dict[str, list[ComparisonRow]] = {}
        for row in sorted(self.rows, key=lambda row: row.answer_tokens):
            end = next((end for end in _LENGTHS if row.answer_tokens <= end), None)
            classes.setdefault(f"up to {end}" if end else f"over {_LENGTHS[-1]}", []).append(row)
        if len(classes) > 1:
            classes["all"] = self.rows
        return {name: _latency(rows) for name, rows in classes.items()}

    def summary(self) -> dict[str, Any]:
        """Give the summary, for JSON."""
        before = [len(row.answer.split()) for row in self.rows] or [0]
        after = [len(row.correction.split()) for row in self.rows] or [0]
        aligning, upstream = (sum(getattr(row, name) for row in self.rows) for name in ("seconds", "upstream_seconds"))
        return {
            "judge": self.judge,
            "upstream": self.upstream,
            "aligner": self.aligner,
            "prompts": len(self.rows),
            "failed": len(self.failed),
            "left_alone": statistics.fmean(not row.changed for row in self.rows) if self.rows else None,
            "verdicts": {name: tally.model_dump() for name, tally in self.tallies().items()},
            "by_category": {
                category: {name: tally.model_dump() for name, tally in self.tallies(category).items()}
                for category in self.categories
            },
            "words": {
                "before": {"mean": statistics.fmean(before), "median": statistics.median(before)},
                "after": {"mean": statistics.fmean(after), "median": statistics.median(after)},
            },
            "added_latency_ms": {name: latency.model_dump() for name, latency in self.latencies.items()},
            "share_of_upstream_time": aligning / upstream if upstream else None,
        }


def compare(
    prompts: Sequence[Prompt],
    folder: Path,
    aligner: Aligner,
    judge: PairwiseJudge,
    upstream: Runnable[Any, Any] | None = None,
    *,
    upstream_name: str | None = None,
    concurrency: int = 8,
    report: Report = ignore,
) -> Comparison:
    """Answer prompts, correct the answers, and have both judged.

    Results are kept in `folder`'s journal. An interrupted comparison resumes from it, and asks failed prompts again.

    Args:
        prompts: The prompts; those with an answer are not asked.
        folder: Where the journal is kept.
        aligner: Corrects one answer after the other, so that its times are not shared.
        judge: Judges both answers.
        upstream: The model that answers, where a prompt has no answer.
        upstream_name: Its name in the report.
        concurrency: Calls of the upstream model under way at once.
        report: Told of prompts done, at the stage "compare".

    Raises:
        UpstreamError: If the judge fails; results so far are kept.
        JobError: If the journal is another comparison's, or cannot be written.
    """
    settings = {"aligner": aligner.identity, "judge": judge.name, "upstream": upstream_name, "prompts": digest(prompts)}
    failed: dict[str, str] = {}
    with Journal(folder / "journal.jsonl", settings) as journal:
        todo = [prompt for prompt in prompts if prompt.key not in journal.done]
        report(Progress("compare", len(journal.done), len(prompts)))
        if todo:
            aligner.correct("Ready?", "Yes.")  # the first pass allocates
        for part in chunks(todo, concurrency * 2):
            rows: dict[str, dict[str, Any]] = {}
            for prompt, answer in zip(part, ask(part, upstream, concurrency), strict=True):
                row = _corrected(aligner, prompt, answer)
                if isinstance(row, Exception):
                    failed[prompt.key] = describe_failure(prompt, row)
                else:
                    rows[prompt.key] = row
            pairs = [Pair(row["question"], row["answer"], row["correction"]) for row in rows.values()]
            for (key, row), verdicts in zip(rows.items(), judge.judge(pairs), strict=True):
                journal.add(key, row | {"verdicts": verdicts})
            report(Progress("compare", len(journal.done), len(prompts)))
        compared = [ComparisonRow(**journal.done[prompt.key]) for prompt in prompts if prompt.key in journal.done]
    return Comparison(judge=judge.name, upstream=upstream_name, aligner=aligner.identity, rows=compared, failed=failed)


def _corrected(aligner: Aligner, prompt: Prompt, answer: Answered | Exception) -> dict[str, Any] | Exception:
    if isinstance(answer, Exception):
        return answer
    start = time.perf_counter()
    try:
        correction = aligner.correct(prompt.question, answer.text)
    except InputError as exc:
        return exc
    return {
        "question": prompt.question,
        "answer": answer.text,
        "correction": correction.corrected,
        "category": prompt.category,
        "answer_tokens": correction.usage.draft_tokens or aligner.count_tokens(answer.text),
        "seconds": time.perf_counter() - start,
        "upstream_seconds": answer.seconds,
    }


def _latency(rows: Sequence[ComparisonRow]) -> Latency:
    milliseconds = sorted(row.seconds * 1000 for row in rows)

    def percentile(share: float) -> float:
        return milliseconds[min(len(milliseconds) - 1, int(share * len(milliseconds)))]

    tokens = sum(row.answer_tokens for row in rows)
    return Latency(
        answers=len(rows),
        p50=statistics.median(milliseconds),
        p95=percentile(0.95),
        p99=percentile(0.99),
        tokens_per_second=tokens / max(1e-9, sum(milliseconds) / 1000),
    )
