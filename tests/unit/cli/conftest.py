"""Runs commands in this process, with an aligner that needs no model."""

from typing import Any

import pytest
from typer.testing import CliRunner

from aligner_middleware import Aligner, InputError
from aligner_middleware.cli.app import app
from tests.fakes import InstantAligner
from tests.unit.cli.running import Run


class Upper(InstantAligner):
    """Corrects to capitals; counts the answers of each batch."""

    def __init__(self) -> None:
        super().__init__(lambda question, answer: answer.upper())
        self.batches: list[int] = []

    def correct_batch(self, pairs: Any, **options: Any) -> list[Any]:
        self.batches.append(len(pairs))
        return [
            self._made(question, answer) if question.strip() else InputError("the question is blank")
            for question, answer in pairs
        ]


@pytest.fixture
def aligner() -> Upper:
    return Upper()


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, aligner: Upper) -> Run:
    monkeypatch.setattr(Aligner, "load", lambda *args, **options: aligner)

    def invoke(*arguments: Any, stdin: str | bytes | None = None) -> Any:
        return CliRunner().invoke(app, [*map(str, arguments)], input=stdin)

    return invoke
