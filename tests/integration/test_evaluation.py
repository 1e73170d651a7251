"""`aligner evaluate` on the real default aligner, with the real sentence encoder."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from aligner_middleware import Aligner
from aligner_middleware.cli.app import app
from aligner_middleware.evaluation import SentenceEncoder


def test_the_encoder_finds_like_meanings_alike() -> None:
    question, same, other = SentenceEncoder().encode(
        ["How do I get a stain out of a shirt?", "removing spots from clothes", "The parliament met on Monday."]
    )
    assert question @ question == pytest.approx(1, abs=1e-5)
    assert question @ same > 0.4 > 0.2 > question @ other


def test_texts_are_encoded_the_same_alone_and_among_longer_ones() -> None:
    encoder = SentenceEncoder()
    together = encoder.encode(["short", "a much longer text, " * 20, ""])
    assert together[:1] == pytest.approx(encoder.encode(["short"]), abs=1e-4)


def test_scores_are_those_of_the_rows(aligner: Aligner, held_out: list[dict[str, str]], tmp_path: Path) -> None:
    rows = [row for row in held_out if row["kind"] == "keep"][:6] + [
        row for row in held_out if row["kind"] == "correct"
    ][:6]
    data, out = tmp_path / "rows.jsonl", tmp_path / "scored.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    outcome = CliRunner().invoke(app, ["evaluate", str(data), "--json", "--out", str(out)])
    assert outcome.exit_code == 0, outcome.output
    summary = json.loads(outcome.stdout)
    scored = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]

    corrected = [aligner.correct(row["question"], row["answer"]).corrected for row in rows]
    assert [row["correction"] for row in scored] == corrected
    kept = [text == row["answer"] for text, row in zip(corrected, rows, strict=True)]
    assert summary["kept"] == pytest.approx(sum(kept[:6]) / 6)
    assert summary["changed"] == pytest.approx(1 - sum(kept[6:]) / 6)
    assert summary["better"] == pytest.approx(sum(row["judgement"]["better"] for row in scored[6:]) / 6)
    assert sum(group["keep"] + group["correct"] for group in summary["by_category"].values()) == 12
    assert 1 < summary["perplexity"] < 100


def test_rows_without_bad_answers_have_no_share_of_changes(held_out: list[dict[str, str]], tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps(next(row for row in held_out if row["kind"] == "keep")), encoding="utf-8")
    outcome = CliRunner().invoke(app, ["evaluate", str(data), "--json"])
    assert json.loads(outcome.stdout)["changed"] is None
