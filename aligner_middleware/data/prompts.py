"""Prompts to ask a model about, read from the forms that people have them in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from aligner_middleware.data.files import fingerprint, lines_of
from aligner_middleware.data.json_lines import parse_json, text_at
from aligner_middleware.errors import DataError


class Prompt(BaseModel):
    """A prompt, and what is known of it.

    Attributes:
        question: What is asked.
        answer: What was answered; `None` where a model is to be asked.
        category: What it is about, for reports by category.
    """

    model_config = ConfigDict(frozen=True)

    question: str = Field(min_length=1)
    answer: str | None = None
    category: str = ""

    @property
    def key(self) -> str:
        """Tells it from other prompts: a hash of question and answer."""
        return fingerprint(self.question, self.answer or "")[:16]


def read_prompts(path: Path) -> list[Prompt]:
    """Read prompts: lines of text, or JSON lines, plain or gzipped.

    A JSON line is a text or an object with `question` or `prompt` (a text, or messages, of which the last one asks), and
    maybe `answer` (or `response`) and `category`; null is as good as nothing there. What occurs twice, answer and all, is
    read once.

    Raises:
        DataError: If a line is not that, naming file and line; if there is no prompt at all.
    """
    found: dict[str, Prompt] = {}
    for number, line in lines_of(path):
        try:
            prompt = _parse(line)
        except ValidationError as exc:
            error = exc.errors()[0]
            raise DataError(str(path), number, f"{error['loc'][0]}: {error['msg']}") from exc
        except (ValueError, KeyError, TypeError, IndexError) as exc:
            reason = "expected a text, or a JSON object with question (or prompt) and maybe answer"
            raise DataError(str(path), number, f"{reason}: {exc}") from exc
        found.setdefault(prompt.key, prompt)
    if not found:
        raise DataError(str(path), 1, "holds no prompts: it is empty")
    return list(found.values())


def digest(prompts: Sequence[Prompt]) -> str:
    """Tell a set of prompts from others."""
    return fingerprint(*sorted(prompt.key for prompt in prompts))[:16]


def chunks(prompts: Sequence[Prompt], size: int) -> Iterator[Sequence[Prompt]]:
    """Cut prompts into parts of at most `size`."""
    return (prompts[at : at + size] for at in range(0, len(prompts), size))


def _parse(line: str) -> Prompt:
    line = line.strip()
    row: Any = parse_json(line) if line.startswith(("{", '"')) else line
    if isinstance(row, str):
        return Prompt(question=row)
    given = [key for key, value in row.items() if value is not None]
    asked = "prompt" if "prompt" in given and "question" not in given else "question"
    told = "response" if "response" in given and "answer" not in given else "answer"
    said = row.get(asked)
    return Prompt(
        question=text_at(said[-1], "content") if isinstance(said, list) else text_at(row, asked),
        answer=text_at(row, told) if told in given else None,
        category=text_at(row, "category") if "category" in given else "",
    )
