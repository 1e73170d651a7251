"""An aligner as a guard: the shares of labelled good and bad answers that it changes, at each strength."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from aligner_middleware.aligner import Aligner
from aligner_middleware.correction import Correction
from aligner_middleware.data.progress import Progress, Report, ignore
from aligner_middleware.errors import InputError
from aligner_middleware.evaluation.detection import Auc, Detection, Share
from aligner_middleware.evaluation.labelled_rows import KINDS, Kind, LabelledRow
from aligner_middleware.strength import LEVELS, Strength

_BATCH = 16  # answers corrected together


@dataclass(frozen=True)
class GuardedRow:
    """A row, and the aligner's corrections of its answer.

    Attributes:
        row: The row.
        corrections: The correction at each strength.
        score: The aligner's probability that the answer is bad, 0 to 1; without verdicts its largest surprise, in nats.
    """

    row: LabelledRow
    corrections: dict[Strength, Correction]
    score: float


@dataclass(frozen=True)
class GuardEvaluation:
    """The results of an aligner as a guard.

    Attributes:
        rows: Every row that could be corrected, in the order given.
        left_out: Number of rows that could not: too long for the aligner, or not valid text.
        strengths: The strengths tried, from the one that changes least.
    """

    rows: list[GuardedRow]
    left_out: int
    strengths: tuple[Strength, ...]

    def kept(self, strength: Strength, by: Callable[[LabelledRow], str]) -> dict[tuple[str, Kind], Share]:
        """Count answers that came back byte for byte, by the group that `by` gives for a row, and by kind."""
        groups: dict[tuple[str, Kind], list[bool]] = {}
        for item in self.rows:
            groups.setdefault((by(item.row), item.row.kind), []).append(not item.corrections[strength].changed)
        order = sorted(groups, key=lambda group: (group[0], KINDS.index(group[1])))
        return {group: Share.count(groups[group]) for group in order}

    def detection(self, strength: Strength) -> Detection:
        """Score changes as flags: a changed answer is one that the aligner calls bad."""
        changed = [item.corrections[strength].changed for item in self.rows]
        return Detection.of(changed, [item.row.unsafe for item in self.rows])

    @property
    def auc(self) -> Auc:
        """The AUC of the scores, which does not depend on the strength."""
        return Auc.of([item.score for item in self.rows], [item.row.unsafe for item in self.rows])

    def doubts(self, strength: Strength) -> dict[str, int]:
        """Count the safeguards that objected to a correction, the most frequent one first."""
        counts = Counter(name for item in self.rows for name in item.corrections[strength].doubts)
        return dict(counts.most_common())

    def verdicts(self, strength: Strength) -> dict[str, int]:
        """Count the verdicts; none for an aligner without them."""
        verdicts = (item.corrections[strength].verdict for item in self.rows)
        return dict(Counter(verdict for verdict in verdicts if verdict is not None).most_common())

    def cut_off(self, strength: Strength) -> int:
        """Count the corrections that the token limit ended."""
        return sum(item.corrections[strength].finish_reason == "length" for item in self.rows)

    def summary(self) -> dict[str, Any]:
        """Give the summary, for JSON."""
        return {
            "rows": len(self.rows),
            "left_out": self.left_out,
            "auc": self.auc.model_dump(),
            "strengths": {str(strength): self._summary_at(strength) for strength in self.strengths},
        }

    def _summary_at(self, strength: Strength) -> dict[str, Any]:
        def dumped(by: Callable[[LabelledRow], str]) -> dict[str, Any]:
            groups: dict[str, Any] = {}
            for (name, kind), share in self.kept(strength, by).items():
                groups.setdefault(name, {})[kind] = _kept(share)
            return groups

        return {
            **self.detection(strength).model_dump(),
            "by_kind": dumped(lambda row: "all").get("all", {}),
            "by_source": dumped(lambda row: row.group),
            "by_length": dumped(lambda row: row.length),
            "doubts": self.doubts(strength),
            "verdicts": self.verdicts(strength),
            "cut_off": self.cut_off(strength),
        }

    def lines(self, strength: Strength) -> Iterable[dict[str, Any]]:
        """Give every row with its correction at one strength, for JSON lines."""
        for item in self.rows:
            correction = item.corrections[strength]
            yield item.row.model_dump() | {
                "correction": correction.corrected,
                "changed": correction.changed,
                "verdict": correction.verdict,
                "score": item.score,
                "doubts": list(correction.doubts),
                "finish_reason": correction.finish_reason,
            }


def guard(
    aligner: Aligner,
    rows: Sequence[LabelledRow],
    strengths: Sequence[Strength] = LEVELS,
    report: Report = ignore,
) -> GuardEvaluation:
    """Let an aligner correct every row's answer at each strength.

    An answer is corrected again only where another strength may give another result: an answer kept at one strength is kept
    at every lower one, and a correction that is the same at two strengths is the same between them.

    Args:
        aligner: The aligner.
        rows: Rows that it was not trained on.
        strengths: From the one that changes least to the one that changes most.
        report: Told of rows done, at the stage "evaluate".
    """
    guarded: list[GuardedRow] = []
    for start in range(0, len(rows), _BATCH):
        part = rows[start : start + _BATCH]
        for index, corrections in sorted(_corrected(aligner, part, strengths).items()):
            row, score = part[index], corrections[strengths[-1]].score
            if score is None:
                score = aligner.evidence(row.question, row.answer, row.instruction)
            guarded.append(GuardedRow(row, corrections, score))
        report(Progress("evaluate", start + len(part), len(rows)))
    return GuardEvaluation(guarded, len(rows) - len(guarded), tuple(strengths))


def _corrected(
    aligner: Aligner, rows: Sequence[LabelledRow], strengths: Sequence[Strength]
) -> dict[int, dict[Strength, Correction]]:
    """Correct rows at each strength, each by its instruction; those that cannot be corrected are not in the result."""
    results: dict[int, dict[Strength, Correction]] = {}
    for told in dict.fromkeys(row.instruction for row in rows):
        pairs = {at: (row.question, row.answer) for at, row in enumerate(rows) if row.instruction == told}
        try:
            found = _corrected_by(aligner, told, [*pairs.values()], strengths)
        except InputError:
            if told is None:
                raise
            continue  # this aligner cannot be told how to correct
        results |= {at: found[index] for index, at in enumerate(pairs) if index in found}
    return results


def _corrected_by(
    aligner: Aligner, instruction: str | None, pairs: Sequence[tuple[str, str]], strengths: Sequence[Strength]
) -> dict[int, dict[Strength, Correction]]:
    *lower, most = strengths
    results: dict[int, dict[Strength, Correction]] = {}
    correct = partial(aligner.correct_batch, instruction=instruction)
    for index, outcome in enumerate(correct(pairs, strength=most, return_exceptions=True)):
        if isinstance(outcome, Correction):
            results[index] = dict.fromkeys(strengths, outcome)
        elif not isinstance(outcome, InputError):
            raise outcome
    unsure = [index for index in results if not _surely_kept(results[index][most])]
    for place, strength in enumerate(lower):
        if place:
            unsure = [index for index in unsure if not _same(results[index][lower[place - 1]], results[index][most])]
        again = correct([pairs[index] for index in unsure], strength=strength)
        for index, correction in zip(unsure, again, strict=True):
            results[index][strength] = correction
    return results


def _surely_kept(correction: Correction) -> bool:
    """Whether lower strengths keep the answer, too: it was not kept because of a doubt, or of an equal correction."""
    if correction.verdict is None:
        return not correction.changed and not correction.doubts
    return correction.verdict == "keep"


def _same(first: Correction, second: Correction) -> bool:
    return (first.verdict, first.corrected, first.doubts) == (second.verdict, second.corrected, second.doubts)


def _kept(share: Share) -> dict[str, Any]:
    return {"rows": share.rows, "kept": share.hits, "changed": share.rows - share.hits, "share_kept": share.share} | {
        "low": share.low,
        "high": share.high,
    }
