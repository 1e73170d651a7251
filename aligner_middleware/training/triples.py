"""Question-answer-correction triples: read from JSON lines, checked row by row."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from aligner_middleware.errors import DataError


class Triple(BaseModel):
    """One training row. Where `correction` equals `answer`, the row teaches to leave a good answer alone.

    Attributes:
        question, answer, correction: Texts, none of them empty.
        category: What the row is about, for reports by category.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    question: str = Field(min_length=1)
    answer: str = Field(min_length=1)
    correction: str = Field(min_length=1)
    category: str = ""

    @property
    def keeps(self) -> bool:
        """Whether the answer is right as it is."""
        return self.answer == self.correction

    def identity(self) -> Triple:
        """Give the row of the warm-up stage: the answer, whatever it says, as its own correction."""
        return self.model_copy(update={"correction": self.answer})


def read_triples(path: Path) -> list[Triple]:
    """Read triples from JSON lines: an object with `question`, `answer` and `correction` on each; other keys are ignored.

    Raises:
        DataError: If a line is not such an object, naming file and line, or if the file has none or cannot be read.
    """
    triples = []
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    triples.append(_parse(path, number, line))
    except OSError as exc:
        raise DataError(str(path), 1, f"cannot be read: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise DataError(str(path), 1, f"is not UTF-8 text: {exc}") from exc
    if not triples:
        raise DataError(str(path), 1, "holds no triples: expected JSON lines with question, answer and correction")
    return triples


def _parse(path: Path, number: int, line: str) -> Triple:
    try:
        triple = Triple.model_validate_json(line)
        "".join((triple.question, triple.answer, triple.correction)).encode()
    except ValidationError as exc:
        error = exc.errors()[0]
        where = ".".join(map(str, error["loc"])) or "line"
        raise DataError(str(path), number, f"{where}: {error['msg']}") from exc
    except UnicodeEncodeError as exc:
        raise DataError(str(path), number, "holds a lone surrogate, which is not valid text") from exc
    return triple
