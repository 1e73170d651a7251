"""Verdicts from training to serving: every method learns them, and the exported graph gives what PyTorch gives."""

from pathlib import Path
from typing import Literal

import pytest

from aligner_middleware import Aligner
from aligner_middleware.artifact import Artifact
from aligner_middleware.data.triples import Triple
from aligner_middleware.errors import BuildError, ConfigError
from aligner_middleware.export.store import export_model
from aligner_middleware.training import Stage, TrainConfig, train
from tests.fakes import SPARE, tokenizer_json
from tests.integration.conftest import random_checkpoint

GOOD = [Triple(question=f"q{n}", answer=f"fine {n}.", correction=f"fine {n}.") for n in range(16)]
RUDE = [Triple(question=f"q{n}", answer=f"fine {n}. Bad one.", correction=f"fine {n}.") for n in range(16)]
HARMFUL = [Triple(question=f"q{n}", answer="x y z " * 3, correction="no") for n in range(12)]
UNWRITTEN = [Triple(question=f"q{n}", answer="x y z " * 3, correction="") for n in range(12, 16)]
ROWS = [*GOOD, *RUDE, *HARMFUL, *UNWRITTEN]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = random_checkpoint("llama", tmp_path / "llama")
    (folder / "tokenizer.json").write_text(tokenizer_json(SPARE))
    return folder


@pytest.mark.parametrize(
    ("method", "edits", "rate"),
    [("lora", "operations", 2e-2), ("difference", "operations", 3e-3), ("full", "copy", 3e-3)],
)
def test_each_method_learns_verdicts_and_serves_what_it_learnt(
    base: Path,
    tmp_path: Path,
    method: Literal["lora", "full", "difference"],
    edits: Literal["operations", "copy"],
    rate: float,
) -> None:
    stage = Stage(epochs=18, learning_rate=rate)
    config = TrainConfig(
        base=str(base),
        method=method,
        edits=edits,
        difference_bits=6,
        warm_up=Stage(epochs=1 if edits == "copy" else 0, learning_rate=rate),
        correction=stage,
        bfloat16=False,
    )
    recipe = train(ROWS, tmp_path / "trained", config)
    assert recipe.verdicts == {"keep": 16, "edit": 16, "rewrite": 16}
    assert recipe.template.verdicts == SPARE[:3]
    assert recipe.template.mark == (SPARE[3] if edits == "operations" else None)
    artifact = export_model(str(tmp_path / "trained"), tmp_path / "out", "float32").artifact
    assert artifact.verdict_ids is not None
    assert Artifact.load(tmp_path / "out") == artifact
    pairs = [(row.question, row.answer) for row in (*GOOD[:3], *RUDE[:3], *HARMFUL[:3])]
    with Aligner.load(tmp_path / "out") as served, Aligner.load(tmp_path / "trained", engine="torch") as reference:
        found = served.correct_batch(pairs, on_doubt="keep")
        expected = reference.correct_batch(pairs, on_doubt="keep")
        alone = [served.correct(*pair, on_doubt="keep") for pair in pairs]
    assert [c.verdict for c in found] == ["keep"] * 3 + ["edit"] * 3 + ["rewrite"] * 3
    assert [c.corrected for c in found] == [c.corrected for c in expected] == [c.corrected for c in alone]
    assert [c.corrected for c in found[:3]] == [row.answer for row in GOOD[:3]]
    assert [c.usage.passes for c in alone[:3]] == [1, 1, 1]


def test_a_base_without_tokens_to_spare_copies_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = random_checkpoint("llama", tmp_path / "llama")
    settings = {"base": str(base), "warm_up": Stage(epochs=0), "correction": Stage(epochs=1)}
    with pytest.raises(BuildError, match="4 special tokens"):
        train(ROWS, tmp_path / "out", TrainConfig.model_validate({**settings, "verdict": True}))
    recipe = train(ROWS, tmp_path / "out", TrainConfig.model_validate(settings))
    assert recipe.template.verdicts is None
    assert recipe.rows_left_out == len(UNWRITTEN)
    assert "without verdicts" in caplog.text


@pytest.mark.parametrize("method", ["difference", "full"])
def test_training_goes_on_from_an_aligner(base: Path, tmp_path: Path, method: Literal["full", "difference"]) -> None:
    stage = Stage(epochs=12, learning_rate=3e-3)
    config = TrainConfig(
        base=str(base), method=method, difference_bits=8, warm_up=Stage(epochs=0), correction=stage, bfloat16=False
    )
    first = train(ROWS, tmp_path / "first", config)
    later = config.model_copy(
        update={"start": str(tmp_path / "first"), "correction": stage.model_copy(update={"epochs": 1})}
    )
    second = train(ROWS, tmp_path / "second", later)
    assert second.template == first.template
    assert second.start is not None
    assert first.start is None
    fresh = train(ROWS, tmp_path / "fresh", later.model_copy(update={"start": None}))
    assert second.losses["correction"] < 0.5 * fresh.losses["correction"]
    artifact = export_model(str(tmp_path / "second"), tmp_path / "out", "float32").artifact
    assert artifact.verdict_ids is not None


def test_training_goes_on_only_where_it_can(base: Path, tmp_path: Path) -> None:
    stage = Stage(epochs=1, learning_rate=3e-3)
    config = TrainConfig(base=str(base), method="difference", warm_up=Stage(epochs=0), correction=stage, bfloat16=False)
    train(ROWS[:8], tmp_path / "first", config)
    start = {"start": str(tmp_path / "first")}
    with pytest.raises(ConfigError, match="needs method 'full' or 'difference'"):
        train(ROWS[:8], tmp_path / "second", config.model_copy(update=start | {"method": "lora"}))
    other = random_checkpoint("qwen2", tmp_path / "other")
    (other / "tokenizer.json").write_text(tokenizer_json(SPARE))
    with pytest.raises(ConfigError, match="was not made of"):
        train(ROWS[:8], tmp_path / "second", config.model_copy(update=start | {"base": str(other)}))
