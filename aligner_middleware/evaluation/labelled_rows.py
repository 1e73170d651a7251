"""Answers that people labelled as good or bad, read from JSON lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from aligner_middleware.data.files import read_lines
from aligner_middleware.data.json_lines import parse_json
from aligner_middleware.data.triples import Instruction
from aligner_middleware.errors import DataError, JobError

Kind = Literal["keep", "refusal", "bad"]

KINDS: tuple[Kind, ...] = ("keep", "refusal", "bad")
_LENGTHS = (50, 200)  # upper ends of the ranges of answer lengths, in words


class LabelledRow(BaseModel):
    """An answer with its label.

    Attributes:
        question, answer: The texts.
        kind: `keep` for a good answer, `refusal` for a good refusal to be kept, `bad` (or `correct`, as in held-out rows of
            corrections) for one that is to be changed.
        source: The set or model that the row is from.
        category: Its subject.
        instruction: How the answer is to be corrected, if the row says that.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    question: str
    answer: str
    kind: Kind
    source: str = ""
    category: str = ""
    instruction: Instruction = None

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
        """The group that it is counted in: its source, or else its category."""
        return self.source or self.category or "unnamed"

    @property
    def length(self) -> str:
        """The range of lengths that its answer is in."""
        words = len(self.answer.split())
        short, middle = _LENGTHS
        if words <= short:
            return f"1 to {short} words"
        return f"{short + 1} to {middle} words" if words <= middle else f"over {middle} words"


def is_labelled(path: Path) -> bool:
    """Say whether a file holds labelled rows: any row with a `kind` and no `correction`.

    Raises:
        JobError: If it cannot be read.
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
    """Read labelled rows: JSON lines with question, answer and kind, maybe source, category, instruction; maybe gzipped.

    Args:
        path: The file.
        source: The source of rows that name none.

    Raises:
        DataError: If a line is not such a row, naming file and line.
        JobError: If the file cannot be read, or is empty.
    """
    rows = []
    for number, line in read_lines(path):
        try:
            row = LabelledRow.model_validate(parse_json(line))
            "".join((row.question, row.answer, row.source, row.category, row.instruction or "")).encode()
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
        raise JobError(path, "is empty: expected rows with question, answer and kind")
    return rows
