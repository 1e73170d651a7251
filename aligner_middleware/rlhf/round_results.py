"""The results of a run of rounds: counts and metrics round by round, and their form in JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from aligner_middleware.data.files import write_text
from aligner_middleware.data.json_lines import finite
from aligner_middleware.errors import JobError
from aligner_middleware.evaluation.policy_metrics import PolicyMetrics

_SUMMARY_FILE = "summary.json"


@dataclass(frozen=True)
class Round:
    """The results of a round.

    Attributes:
        number: 0 for the first policy.
        pairs: Preference pairs that the policy learnt from.
        kept: Answers that the aligner left as they were. Blank and repeated answers, and those too long for the aligner,
            are neither.
        metrics: Of the policy that the round trained; `None` where there were too few pairs to train one.
        broken: Stop rules that the policy breaks.
    """

    number: int
    pairs: int
    kept: int
    metrics: PolicyMetrics | None
    broken: list[str]

    def as_json(self) -> dict[str, Any]:
        """Give the round for a JSON file; numbers that are not finite are `None`."""
        row: dict[str, Any] = finite(asdict(self) | {"metrics": self.metrics.model_dump() if self.metrics else None})
        return row

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Round:
        """Read a round of a JSON file."""
        return cls(**row | {"metrics": PolicyMetrics(**row["metrics"]) if row["metrics"] else None})


@dataclass(frozen=True)
class Rounds:
    """The results of a run.

    Attributes:
        rounds: Round by round, from the first policy on.
        fixed: Whether all rounds learnt from the pairs of the first one.
    """

    rounds: list[Round]
    fixed: bool

    @property
    def stopped(self) -> list[str]:
        """The rules that ended the run; none if it ran all its rounds."""
        return self.rounds[-1].broken

    @property
    def best(self) -> int:
        """The last round that breaks no rule: its policy is the one to use."""
        return max(result.number for result in self.rounds if not result.broken)


def summary(run: Rounds) -> dict[str, Any]:
    """Sum a run up, for JSON."""
    rounds = [result.as_json() for result in run.rounds]
    return {"fixed": run.fixed, "best": run.best, "stopped": run.stopped, "rounds": rounds}


def write_rounds(run: Rounds, folder: Path) -> None:
    """Write a run's summary to its folder.

    Raises:
        JobError: If it cannot be written.
    """
    write_text(folder / _SUMMARY_FILE, json.dumps(summary(run), indent=2))


def read_rounds(folder: Path) -> Rounds:
    """Read a run's summary back, to be shown beside another.

    Raises:
        JobError: If the folder has none, or it is damaged.
    """
    path = folder / _SUMMARY_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Rounds([Round.from_json(row) for row in content["rounds"]], content["fixed"])
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise JobError(path, f"is no summary of rounds: {exc}; name the folder of a finished run") from exc
