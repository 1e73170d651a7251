"""The paper's comparison (section 3, B.2): answers with and without the aligner, judged in pairs, and what it costs."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from langchain_core.runnables import Runnable
from pydantic import BaseModel, ConfigDict, field_validator

from aligner_middleware.aligner import Aligner
from aligner_middleware.data.journal import Journal
from aligner_middleware.data.prompts import Prompt, chunks, digest
from aligner_middleware.data.upstream import Answered, ask, describe_failure
from aligner_middleware.errors import InputError
from aligner_middleware.evaluation.pairwise import Dimension, Pair, PairJudge, Verdict

_LENGTHS = (32, 64, 128, 256, 512)  # upper ends of the classes of answer lengths, in tokens
_DRAWS = 1000  # of the bootstrap


class Compared(BaseModel):
    """A prompt, both answers, the verdicts, and what it cost.

    Attributes:
        verdicts: On the correction against the answer, by dimension.
        answer_tokens: Length of the answer, in the aligner's tokens.
        seconds, upstream_seconds: Of the aligner, alone on the machine; of the upstream model (0 for a given answer).
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
        rate: The paper's (wins - losses) / (wins + losses + ties); malformed verdicts count as nothing, and where there are
            no others it is not a number, in JSON null.
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
    """Milliseconds that the aligner adds to answers of some length, and tokens of these that it goes through a second."""

    model_config = ConfigDict(frozen=True)

    answers: int
    p50: float
    p95: float
    p99: float
    tokens_per_second: float


class Comparison(BaseModel):
    """What came out, row by row, and whole.

    Attributes:
        judge, upstream, aligner: Who took part.
        rows: Every prompt that has a result.
        failed: Prompts that have none, and why.
    """

    judge: str
    upstream: str | None
    aligner: dict[str, Any]
    rows: list[Compared]
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
        """What the aligner adds, by the answer's length in tokens."""
        classes: dict[str, list[Compared]] = {}
        for row in sorted(self.rows, key=lambda row: row.answer_tokens):
            end = next((end for end in _LENGTHS if row.answer_tokens <= end), None)
            classes.setdefault(f"up to {end}" if end else f"over {_LENGTHS[-1]}", []).append(row)
        if len(classes) > 1:
            classes["all"] = self.rows
        return {name: _latency(rows) for name, rows in classes.items()}

    def summary(self) -> dict[str, Any]:
        """Sum it up, for JSON."""
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
    judge: PairJudge,
    upstream: Runnable[Any, Any] | None = None,
    *,
    upstream_name: str | None = None,
    concurrency: int = 8,
    report: Callable[[int, int], None] = lambda done, of: None,
) -> Comparison:
    """Answer prompts, correct the answers, and have both judged.

    What is done is kept in `folder`'s journal: called again, it goes on where it stopped, and asks again what failed.

    Args:
        prompts: What to ask; those with an answer are not asked.
        folder: Where the journal is kept.
        aligner: What corrects, one answer after the other, so that its seconds are its own.
        judge: Who judges.
        upstream: The model that answers, where a prompt has no answer.
        upstream_name: What to call it.
        concurrency: Prompts under way at once at the upstream model.
        report: Called with how many prompts are done, and of how many.

    Raises:
        UpstreamError: If the judge fails; what is done stays.
        DataError: If the journal is another comparison's, or cannot be written.
    """
    settings = {"aligner": aligner.identity, "judge": judge.name, "upstream": upstream_name, "prompts": digest(prompts)}
    failed: dict[str, str] = {}
    with Journal(folder / "journal.jsonl", settings) as journal:
        todo = [prompt for prompt in prompts if prompt.key not in journal.done]
        if todo:
            aligner.correct("Ready?", "Yes.")  # the first pass allocates
        for part in chunks(todo, concurrency * 2):
            said = ask(part, upstream, concurrency)
            good, timed = [], []
            for prompt, one in zip(part, said, strict=True):
                outcome = _corrected(aligner, prompt, one)
                if isinstance(outcome, Exception):
                    failed[prompt.key] = describe_failure(prompt, outcome)
                else:
                    good.append(prompt)
                    timed.append(outcome)
            pairs = [Pair(row["question"], row["answer"], row["correction"]) for row in timed]
            for prompt, row, verdicts in zip(good, timed, judge.judge(pairs), strict=True):
                journal.add(prompt.key, row | {"verdicts": verdicts})
            report(len(journal.done), len(prompts))
        rows = [Compared(**journal.done[prompt.key]) for prompt in prompts if prompt.key in journal.done]
    return Comparison(judge=judge.name, upstream=upstream_name, aligner=aligner.identity, rows=rows, failed=failed)


def _corrected(aligner: Aligner, prompt: Prompt, said: Answered | Exception) -> dict[str, Any] | Exception:
    if isinstance(said, Exception):
        return said
    start = time.perf_counter()
    try:
        correction = aligner.correct(prompt.question, said.text)
    except InputError as exc:
        return exc
    return {
        "question": prompt.question,
        "answer": said.text,
        "correction": correction.corrected,
        "category": prompt.category,
        "answer_tokens": correction.usage.draft_tokens or aligner.count_tokens(said.text),
        "seconds": time.perf_counter() - start,
        "upstream_seconds": said.seconds,
    }


def _latency(rows: Sequence[Compared]) -> Latency:
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
