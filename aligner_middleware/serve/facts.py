"""A decision as the metrics, the spans, the audit log and the page tell it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from aligner_middleware.serve.service import Client, Decision

# The reason of an answer that was let through although its correction failed: "CorrectionTimeoutError: …".
_FAILED = re.compile(r"\w*(Error|Exception): ")


class Texts(NamedTuple):
    """Question, answer, the answer as the aligner has it, and the instruction that it corrects by, where there is one."""

    question: str
    answer: str
    text: str
    instruction: str | None


@dataclass(frozen=True)
class Facts:
    """All of a decision but its texts.

    Attributes:
        id, client, route, seconds: As of the decision.
        at: When, as of ISO 8601, in UTC.
        model: The aligner's name.
        mode: `correct` or `shadow`.
        strength: A level, or a threshold.
        threshold: The score above which an answer was corrected; `None` for an aligner without verdicts.
        verdict: `keep`, `edit` or `rewrite`; `none` for an answer that was not looked at, `error` for one that failed.
        score: P(not keep), where there is one.
        changed: Whether the answer was changed; in shadow mode, whether it would be.
        doubts: Names of the safeguards that objected.
        error: Name of the error, also where the answer was let through all the same.
        instructed: Whether there was an instruction.
    """

    id: str
    at: str
    client: str
    route: str
    model: str
    mode: str
    strength: str | float
    threshold: float | None
    verdict: str
    score: float | None
    changed: bool
    doubts: tuple[str, ...]
    seconds: float
    error: str | None
    instructed: bool


def facts(decision: Decision) -> Facts:
    """Take the facts of a decision."""
    metadata = decision.metadata
    error = decision.error
    if error is None and not metadata.get("aligned") and _FAILED.match(metadata.get("reason", "")):
        error = str(metadata["reason"]).partition(":")[0]
    policy = decision.client.policy
    return Facts(
        id=decision.id,
        at=decision.at.isoformat(timespec="milliseconds"),
        client=decision.client.name,
        route=decision.route,
        model=decision.client.alignment.aligner.name,
        mode=policy.mode,
        strength=policy.strength,
        threshold=threshold(decision.client),
        verdict="error" if error else str(metadata.get("verdict") or "none"),
        score=metadata.get("score"),
        changed=changes(metadata),
        doubts=tuple(metadata.get("doubts", ())),
        seconds=decision.seconds,
        error=error,
        instructed=decision.client.alignment.told is not None,
    )


def texts(decision: Decision) -> Texts:
    """Take the texts of a decision; in shadow mode with the text that it would have become."""
    text = aligner_text(decision.text, decision.metadata)
    return Texts(decision.question, decision.answer, text, decision.client.alignment.told)


def changes(metadata: Mapping[str, Any]) -> bool:
    """Say whether an answer was changed; in shadow mode, whether it would be."""
    return bool(metadata.get("changed") or metadata.get("would_change"))


def aligner_text(text: str, metadata: Mapping[str, Any]) -> str:
    """Give the answer as the aligner has it: as it left, or in shadow mode as it would have."""
    return str(metadata.get("proposed", text)) if metadata.get("would_change") else text


def threshold(client: Client) -> float | None:
    """Give the score above which a client's answers are corrected; `None` for an aligner without verdicts."""
    aligner, strength = client.alignment.aligner, client.policy.strength
    if not aligner.has_verdicts:
        return None
    return aligner.calibration.levels[strength] if isinstance(strength, str) else float(strength)
