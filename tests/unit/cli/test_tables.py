"""The tables that commands print."""

from pathlib import Path
from typing import Any

import pytest

from aligner_middleware import Correction, Usage
from tests.unit.cli.running import Run, jsonl, pair


def test_no_line_of_an_evaluation_ends_in_nothing(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from aligner_middleware.data.triples import Triple
    from aligner_middleware.evaluation import Evaluation, ScoredRow

    def evaluate(aligner: Any, rows: list[Triple], **options: Any) -> Evaluation:
        made = Correction("q", "a", "a", "stop", Usage(), verdict="keep", score=0.1)
        return Evaluation([ScoredRow(row, made, None) for row in rows])

    monkeypatch.setattr("aligner_middleware.evaluation.evaluate", evaluate)
    monkeypatch.setattr("aligner_middleware.export.parity.perplexity", lambda *args: 2.0)
    outcome = run("evaluate", jsonl(tmp_path / "rows.jsonl", pair() | {"correction": "a", "category": "[b]odd"}))
    assert outcome.exit_code == 0, outcome.output
    assert [line for line in outcome.stdout.splitlines() if line.rstrip().endswith(":")] == []
    assert "perplexity of the reference corrections: 2.00" in outcome.stdout
    assert "[b]odd" in outcome.stdout  # a category, not Rich's markup
