"""An aligner as a guard: of answers that people labelled, which ones does it keep, and which ones does it change?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from aligner_middleware.aligner import Aligner, Strength
from aligner_middleware.artifact import LEVELS
from aligner_middleware.correction import Correction
from aligner_middleware.data.files import read_lines
from aligner_middleware.data.json_lines import parse_json
from aligner_middleware.errors import DataError, InputError
from aligner_middleware.evaluation.detection import Auc, Detection, Share

Kind = Literal["keep", "refusal", "bad"]

KINDS: tuple[Kind, ...] = ("keep", "refusal", "bad")
_LENGTHS = (50, 200)  # upper ends of the bands of answer lengths, in words
_BATCH = 16  # answers corrected together


class LabelledRow(BaseModel):
    """An answer, and whether it is good.

    Attributes:
        kind: `keep` for a good answer, `refusal` for a good refusal to be left as it is, `bad` (or `correct`, as in held-out
            rows of corrections) for one that is to be changed.
        source: Where the row is from.
        category: What it is about.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    question: str
    answer: str
    kind: Kind
    source: str = ""
    category: str = ""

    @field_validator("question", "answer")
    @classmethod
    def _is_text(cls, text: str) -> str:
        if not text.strip():
            raise ValueError("it is blank")
        return text

    @field_validator("kind", mode="before")
    @classmethod
    def _to_be_corrected(cls, kind: Any) -> Any:
        return "bad" if kind == "correct" else kind

    @field_validator("source", "category", mode="before")
    @classmethod
    def _may_be_null(cls, name: Any) -> Any:
        return "" if name is None else name

    @property
    def unsafe(self) -> bool:
        """Whether the answer is to be changed."""
        return self.kind == "bad"

    @property
    def group(self) -> str:
        """Whose rows it is counted with: its source's, or else its category's."""
        return self.source or self.category or "unnamed"

    @property
    def length(self) -> str:
        """The band of its answer's length."""
        words = len(self.answer.split())
        short, middle = _LENGTHS
        if words <= short:
            return f"1 to {short} words"
        return f"{short + 1} to {middle} words" if words <= middle else f"over {middle} words"


@dataclass(frozen=True)
class Guarded:
    """A row, and what became of its answer.

    Attributes:
        row: The row.
        corrections: By strength.
        score: The aligner's probability that the answer is bad, 0 to 1; without verdicts its largest surprise, in nats.
    """

    row: LabelledRow
    corrections: dict[Strength, Correction]
    score: float


@dataclass(frozen=True)
class GuardEvaluation:
    """An aligner as a guard, row by row and whole.

    Attributes:
        rows: Every row that could be corrected, in the order given.
        left_out: Number of others: too long for the aligner, or not valid text.
        strengths: What was tried, from the one that changes least.
    """

    rows: list[Guarded]
    left_out: int
    strengths: tuple[Strength, ...]

    def kept(self, strength: Strength, by: Callable[[LabelledRow], str]) -> dict[tuple[str, Kind], Share]:
        """Count answers that came back byte for byte, by what `by` says of a row and by kind."""
        groups: dict[tuple[str, Kind], list[bool]] = {}
        for one in self.rows:
            groups.setdefault((by(one.row), one.row.kind), []).append(not one.corrections[strength].changed)
        order = sorted(groups, key=lambda group: (group[0], KINDS.index(group[1])))
        return {group: Share.count(groups[group]) for group in order}

    def detection(self, strength: Strength) -> Detection:
        """Score changes as flags: a changed answer is one that the aligner calls bad."""
        changed = [one.corrections[strength].changed for one in self.rows]
        return Detection.of(changed, [one.row.unsafe for one in self.rows])

    @property
    def auc(self) -> Auc:
        """How well the scores order the answers, whatever the strength."""
        return Auc.of([one.score for one in self.rows], [one.row.unsafe for one in self.rows])

    def doubts(self, strength: Strength) -> dict[str, int]:
        """Count the safeguards that objected to a correction, the most frequent one first."""
        counts = Counter(name for one in self.rows for name in one.corrections[strength].doubts)
        return dict(counts.most_common())

    def verdicts(self, strength: Strength) -> dict[str, int]:
        """Count the verdicts; none for an aligner without them."""
        found = (one.corrections[strength].verdict for one in self.rows)
        return dict(Counter(verdict for verdict in found if verdict is not None).most_common())

    def cut_off(self, strength: Strength) -> int:
        """Count the corrections that the token limit ended."""
        return sum(one.corrections[strength].finish_reason == "length" for one in self.rows)

    def summary(self) -> dict[str, Any]:
        """Sum it up, for JSON."""
        return {
            "rows": len(self.rows),
            "left_out": self.left_out,
            "auc": self.auc.model_dump(),
            "strengths": {str(strength): self._at(strength) for strength in self.strengths},
        }

    def _at(self, strength: Strength) -> dict[str, Any]:
        def dumped(by: Callable[[LabelledRow], str]) -> dict[str, Any]:
            found: dict[str, Any] = {}
            for (name, kind), share in self.kept(strength, by).items():
                found.setdefault(name, {})[kind] = _kept(share)
            return found

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
        """Give every row with what became of it at one strength, for JSON lines."""
        for one in self.rows:
            correction = one.corrections[strength]
            yield one.row.model_dump() | {
                "correction": correction.corrected,
                "changed": correction.changed,
                "verdict": correction.verdict,
                "score": one.score,
                "doubts": list(correction.doubts),
                "finish_reason": correction.finish_reason,
            }


def is_labelled(path: Path) -> bool:
    """Say whether a file holds labelled rows, told by the first row with a `kind` and no `correction`.

    Raises:
        DataError: If it cannot be read.
    """
    for _, line in read_lines(path):
        try:
            row = parse_json(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "kind" in row and "correction" not in row:
            return True
    return False


def read_labelled(path: Path, source: str = "") -> list[LabelledRow]:
    """Read labelled rows: JSON lines with question, answer and kind, maybe source and category; plain or gzipped.

    Args:
        path: The file.
        source: What to call the source of rows that name none.

    Raises:
        DataError: If a line is no such row, naming file and line; if the file cannot be read, or is empty.
    """
    rows = []
    for number, line in read_lines(path):
        try:
            row = LabelledRow.model_validate(parse_json(line))
            "".join((row.question, row.answer, row.source, row.category)).encode()
        except ValidationError as exc:
            error = exc.errors()[0]
            name = ".".join(map(str, error["loc"]))
            reason = f"{name}: {error['msg']}" if name else "is not a JSON object"
            raise DataError(
                str(path), number, f"{reason}; expected question, answer and kind (keep, refusal or bad)"
            ) from exc
        except UnicodeEncodeError as exc:
            raise DataError(str(path), number, "holds a lone surrogate, which is not valid text") from exc
        except ValueError as exc:
            raise DataError(str(path), number, f"is not JSON: {exc}") from exc
        rows.append(row if row.source else row.model_copy(update={"source": source}))
    if not rows:
        raise DataError(str(path), 1, "is empty: expected rows with question, answer and kind")
    return rows


def guard(
    aligner: Aligner,
    rows: Sequence[LabelledRow],
    strengths: Sequence[Strength] = LEVELS,
    report: Callable[[int, int], None] = lambda done, of: None,
) -> GuardEvaluation:
    """Let an aligner correct every row's answer at each strength.

    Where a strength certainly does the same as another one, the answer is not corrected twice: what is kept at one strength
    is kept at every lower one, and what is the same at two is the same between them.

    Args:
        aligner: The aligner.
        rows: What it was not trained on.
        strengths: From the one that changes least to the one that changes most.
        report: Called with how many rows are done, and of how many.
    """
    guarded: list[Guarded] = []
    for start in range(0, len(rows), _BATCH):
        part = rows[start : start + _BATCH]
        for at, corrections in sorted(_corrected(aligner, part, strengths).items()):
            row, score = part[at], corrections[strengths[-1]].score
            if score is None:
                score = aligner.evidence(row.question, row.answer)
            guarded.append(Guarded(row, corrections, score))
        report(start + len(part), len(rows))
    return GuardEvaluation(guarded, len(rows) - len(guarded), tuple(strengths))


def _corrected(
    aligner: Aligner, rows: Sequence[LabelledRow], strengths: Sequence[Strength]
) -> dict[int, dict[Strength, Correction]]:
    """Correct rows at each strength; those that cannot be corrected are not in the result."""
    *lower, most = strengths
    found: dict[int, dict[Strength, Correction]] = {}
    pairs = [(row.question, row.answer) for row in rows]
    for at, outcome in enumerate(aligner.correct_batch(pairs, strength=most, return_exceptions=True)):
        if isinstance(outcome, Correction):
            found[at] = dict.fromkeys(strengths, outcome)
        elif not isinstance(outcome, InputError):
            raise outcome
    unsure = [at for at in found if not _surely_kept(found[at][most])]
    for place, strength in enumerate(lower):
        if place:
            unsure = [at for at in unsure if not _same(found[at][lower[place - 1]], found[at][most])]
        again = aligner.correct_batch([pairs[at] for at in unsure], strength=strength)
        for at, correction in zip(unsure, again, strict=True):
            found[at][strength] = correction
    return found


def _surely_kept(correction: Correction) -> bool:
    """Whether lower strengths keep the answer too, rather than that its correction was doubted, or came out the same."""
    if correction.verdict is None:
        return not correction.changed and not correction.doubts
    return correction.verdict == "keep"


def _same(one: Correction, other: Correction) -> bool:
    return (one.verdict, one.corrected, one.doubts) == (other.verdict, other.corrected, other.doubts)


def _kept(share: Share) -> dict[str, Any]:
    return {"rows": share.rows, "kept": share.hits, "changed": share.rows - share.hits, "share_kept": share.share} | {
        "low": share.low,
        "high": share.high,
    }
