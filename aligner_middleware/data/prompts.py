"""Prompts to ask a model about, read from the forms that people have them in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from aligner_middleware.data.files import fingerprint, read_lines
from aligner_middleware.data.json_lines import parse_json, text_at
from aligner_middleware.errors import DataError, JobError


class Prompt(BaseModel):
    """A prompt, with its answer and its category where they are known.

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
        """A hash of question and answer, which identifies the prompt in a journal."""
        return fingerprint(self.question, self.answer or "")[:16]


def read_prompts(path: Path) -> list[Prompt]:
    """Read prompts: lines of text, or JSON lines, plain or gzipped.

    A JSON line is a text or an object with `question` or `prompt` (a text, or messages, of which the last one asks), and
    maybe `answer` (or `response`) and `category`; a null counts as missing. Repeated prompts with the same answer are read
    once.

    Raises:
        DataError: If a line has another form; the message names file and line.
        JobError: If the file cannot be read, or holds no prompt.
    """
    prompts: dict[str, Prompt] = {}
    for number, line in read_lines(path):
        try:
            prompt = _parse(line)
        except ValidationError as exc:
            error = exc.errors()[0]
            raise DataError(str(path), number, f"{error['loc'][0]}: {error['msg']}") from exc
        except (ValueError, KeyError, TypeError, IndexError) as exc:
            reason = "expected a text, or a JSON object with question (or prompt) and maybe answer"
            raise DataError(str(path), number, f"{reason}: {exc}") from exc
        prompts.setdefault(prompt.key, prompt)
    if not prompts:
        raise JobError(path, "holds no prompts: it is empty")
    return list(prompts.values())


def digest(prompts: Sequence[Prompt]) -> str:
    """Hash a set of prompts, whatever their order."""
    return fingerprint(*sorted(prompt.key for prompt in prompts))[:16]


def chunks(prompts: Sequence[Prompt], size: int) -> Iterator[Sequence[Prompt]]:
    """Cut prompts into parts of at most `size`."""
    return (prompts[start : start + size] for start in range(0, len(prompts), size))


def _parse(line: str) -> Prompt:
    line = line.strip()
    row: Any = parse_json(line) if line.startswith(("{", '"')) else line
    if isinstance(row, str):
        return Prompt(question=row)
    given = [key for key, value in row.items() if value is not None]
    question_key = "prompt" if "prompt" in given and "question" not in given else "question"
    answer_key = "response" if "response" in given and "answer" not in given else "answer"
    question = row.get(question_key)
    return Prompt(
        question=text_at(question[-1], "content") if isinstance(question, list) else text_at(row, question_key),
        answer=text_at(row, answer_key) if answer_key in given else None,
        category=text_at(row, "category") if "category" in given else "",
    )
