"""Any decoder-only model goes through: small random models of several families, exported, served and compared."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from aligner_middleware import Aligner, AlignerError, ArtifactError, BuildError
from aligner_middleware.artifact import Artifact
from aligner_middleware.data.progress import Progress
from aligner_middleware.data.triples import Triple
from aligner_middleware.engine.onnx import OnnxModel
from aligner_middleware.export.rotate import rotate
from aligner_middleware.export.store import export_model
from aligner_middleware.training import Stage, TrainConfig, train
from tests.integration.conftest import FAMILIES, random_checkpoint

Exported = Callable[[str], Path]
PAIRS = [("Who?", "Nobody that I know of."), ("Why is that?", "Because."), ("q", "é日本 " * 9)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_says_what_pytorch_says(family: str, exported: Exported) -> None:
    folder = exported(family)
    artifact = Artifact.load(folder / "out")
    assert artifact.graph == ("standard" if family == "gpt_neox" else "fused")
    assert artifact.parity is not None and artifact.parity.same_argmax == 1
    served = Aligner.load(folder / "out", max_new_tokens=24)
    reference = Aligner.load(folder / "checkpoint", engine="torch", max_new_tokens=24)
    found = served.correct_batch(PAIRS)
    assert [c.corrected for c in found] == [c.corrected for c in reference.correct_batch(PAIRS)]
    plain = Aligner.load(folder / "out", max_new_tokens=24, draft=False)
    for aligner in (served, plain):
        assert [aligner.correct(*pair).corrected for pair in PAIRS] == [c.corrected for c in found]
        assert ["".join(aligner.stream(*pair)) for pair in PAIRS] == [c.corrected for c in found]


def test_both_graphs_agree_on_a_prompt_longer_than_a_chunk(exported: Exported, tmp_path: Path) -> None:
    source, fused = exported("llama") / "checkpoint", exported("llama") / "out"
    export_model(str(source), tmp_path / "standard", "float32", fused=False)
    pair = ("q", "some words " * 80)
    texts = {
        Aligner.load(folder, max_new_tokens=20).correct(*pair).corrected for folder in (fused, tmp_path / "standard")
    }
    texts.add(Aligner.load(source, engine="torch", max_new_tokens=20).correct(*pair).corrected)
    assert len(texts) == 1


@pytest.mark.parametrize(
    ("family", "weights"), [("gemma", "products"), ("qwen3", "products"), ("gemma3_text", "blocks")]
)
def test_int8_is_stored_as_the_family_allows_and_can_be_served(family: str, weights: str, tmp_path: Path) -> None:
    source = random_checkpoint(family, tmp_path / family)
    export_model(str(source), tmp_path / "out", "int8")
    artifact = Artifact.load(tmp_path / "out")
    assert (artifact.precision, artifact.weights) == ("int8", weights)
    assert Aligner.load(tmp_path / "out", max_new_tokens=5).correct("q", "a").usage.passes >= 1


@pytest.mark.parametrize("family", ["llama, scaled and biased", "gemma", "qwen3", "phi3"])
def test_a_rotated_model_says_the_same(family: str, exported: Exported, tmp_path: Path) -> None:
    path = exported(family) / "out" / "model.onnx"
    model = onnx.load(path)
    rotate(model)
    onnx.save(model, tmp_path / "rotated.onnx")
    artifact = Artifact.load(path.parent).model_copy(update={"probe": None})
    tokens = list(b"Nothing that is turned as a whole can tell that it was turned.")
    plain, turned = (
        next(OnnxModel(graph, artifact).new_cache(1, 128).extend(0, tokens, len(tokens)))
        for graph in (path, tmp_path / "rotated.onnx")
    )
    np.testing.assert_allclose(turned, plain, atol=1e-4)


def test_a_folder_that_is_deleted_under_a_running_aligner_changes_nothing(exported: Exported, tmp_path: Path) -> None:
    shutil.copytree(exported("llama") / "out", tmp_path / "out")
    aligner = Aligner.load(tmp_path / "out", max_new_tokens=12)
    before = [aligner.correct(*pair).corrected for pair in PAIRS]
    shutil.rmtree(tmp_path / "out")
    assert [aligner.correct(*pair).corrected for pair in PAIRS] == before
    with pytest.raises(AlignerError, match="out"):
        Aligner.load(tmp_path / "out")


def test_a_graph_that_computes_something_else_here_is_refused(exported: Exported, tmp_path: Path) -> None:
    shutil.copytree(exported("llama") / "out", tmp_path / "out")
    path = tmp_path / "out" / "aligner.json"
    described = json.loads(path.read_text())
    described["probe"]["logits"] = [value + 2 for value in described["probe"]["logits"]]
    path.write_text(json.dumps(described))
    with pytest.raises(ArtifactError, match="other results here than where it was exported"):
        Aligner.load(tmp_path / "out")


def test_a_graph_that_drifted_is_refused_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from aligner_middleware.export import parity

    monkeypatch.setitem(parity._TOLERANCE, "float32", (1.01, 0.0))
    source = random_checkpoint("llama", tmp_path / "llama")
    with pytest.raises(BuildError, match="too far from the PyTorch model"):
        export_model(str(source), tmp_path / "out", "float32")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.lock", "llama"]


def loss_of(progress: Progress) -> float:
    return float(progress.detail.removeprefix("loss ").partition(",")[0])


def test_training_lowers_the_loss_and_its_adapter_can_be_exported(tmp_path: Path) -> None:
    source = random_checkpoint("llama", tmp_path / "llama")
    rows = [Triple(question=f"q{n}", answer="bad", correction="good") for n in range(24)]
    stage = Stage(epochs=6, learning_rate=5e-3)
    losses: dict[str, list[float]] = {}
    config = TrainConfig(base=str(source), warm_up=stage, correction=stage)
    recipe = train(
        rows,
        tmp_path / "adapter",
        config,
        held_out=rows[:4],
        report=lambda progress: losses.setdefault(progress.stage, []).append(loss_of(progress)),
    )
    assert losses["warm_up"][-1] < losses["warm_up"][0]
    assert recipe.losses["correction_held_out"] < losses["correction"][0]
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "training.json",
    }
    artifact = export_model(str(tmp_path / "adapter"), tmp_path / "out", "float32").artifact
    assert artifact.base.adapter_sha256
    assert artifact.template == recipe.template


def test_what_is_nowhere_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(BuildError, match="nobody/nothing"):
        export_model("nobody/nothing", tmp_path / "out", "float32")
    with pytest.raises(BuildError, match="neither a folder here nor a hub id"):
        export_model("not a name!", tmp_path / "out", "float32")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BuildError, match="is not a checkpoint"):
        export_model(str(tmp_path / "empty"), tmp_path / "out", "float32")
