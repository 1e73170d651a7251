"""The cache and folders of users with the real exporter: damaged, on a full disk, killed, served from another place."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aligner_middleware import Aligner, ArtifactError, BuildError, ConfigError
from aligner_middleware.artifact import Artifact
from aligner_middleware.data.progress import Progress
from aligner_middleware.data.triples import Triple
from aligner_middleware.export.export import STEPS, export
from aligner_middleware.export.store import export_model
from aligner_middleware.locations import cached_folder
from aligner_middleware.training import Stage, TrainConfig, train
from tests.integration.conftest import random_checkpoint
from tests.unit.data.test_folders import little_room


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ALIGNER_HOME", str(tmp_path / "home"))
    return random_checkpoint("llama", tmp_path / "here" / "llama")


@pytest.fixture
def exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that exports have filled: the first by the exporter, later ones of the same model by copies of that one."""
    filled: list[Path] = []
    kept = tmp_path / "kept"

    def export_once(checkpoint: Any, out: Path, *arguments: Any, **options: Any) -> Artifact:
        filled.append(out)
        if kept.exists():
            shutil.copytree(kept, out, dirs_exist_ok=True)
            return Artifact.load(out)
        artifact = export(checkpoint, out, *arguments, **options)
        shutil.copytree(out, kept)
        return artifact

    monkeypatch.setattr("aligner_middleware.export.store.export", export_once)
    return filled


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def other_probe(path: Path) -> None:
    content = json.loads(path.read_text())
    content["probe"]["logits"] = [value + 2 for value in content["probe"]["logits"]]
    path.write_text(json.dumps(content))


DAMAGE: list[tuple[str, Callable[[Path], object]]] = [
    ("model.onnx", cut_short),
    ("aligner.json", cut_short),
    ("aligner.json", Path.unlink),
    ("tokenizer.json", Path.unlink),
    ("aligner.json", other_probe),  # as on a machine whose CPU computes something else
]


def test_what_is_damaged_in_the_cache_is_built_anew_and_what_is_not_serves_other_places(
    source: Path, tmp_path: Path, exports: list[Path]
) -> None:
    folder, artifact = export_model(str(source), None, "float32")
    assert (folder.parent, artifact.name) == (tmp_path / "home", "llama")
    for name, damage in DAMAGE:
        damage(folder / name)
        if damage is other_probe:
            with pytest.raises(ArtifactError, match="export the aligner again"):
                Aligner.load(source, precision="float32")
        assert export_model(str(source), None, "float32", verify=True).folder == folder
        Aligner.load(source, precision="float32", max_new_tokens=3).correct("q", "a")
    cut_short(folder / "model.onnx")
    Aligner.load(source, precision="float32", max_new_tokens=3).correct("q", "a")
    assert len(exports) == 1 + len(DAMAGE) + 1
    elsewhere = shutil.copytree(source, tmp_path / "there" / "llama")
    assert export_model(str(elsewhere), None, "float32").folder == folder == cached_folder(str(elsewhere), "float32")
    assert len(exports) == 1 + len(DAMAGE) + 1  # it was not built again
    assert sorted(path.name for path in folder.parent.iterdir()) == [f".{folder.name}.lock", folder.name]


def test_an_export_reports_its_steps_and_the_cache_takes_fused_graphs_only(source: Path, tmp_path: Path) -> None:
    reported: list[Progress] = []
    exported = export_model(str(source), tmp_path / "out", "float32", report=reported.append)
    assert exported == (tmp_path / "out", Artifact.load(tmp_path / "out"))
    assert reported == [Progress(step, number, len(STEPS)) for number, step in enumerate(STEPS)]
    with pytest.raises(ConfigError, match="name a folder"):
        export_model(str(source), fused=False)


def test_the_advice_to_export_again_helps_whatever_is_damaged(
    source: Path, tmp_path: Path, exports: list[Path]
) -> None:
    out = tmp_path / "out"
    export_model(str(source), out, "float32")
    for name, damage in DAMAGE:
        if (name, damage) == ("aligner.json", Path.unlink):
            continue  # without it nobody can tell whose folder that is
        damage(out / name)
        with pytest.raises(ArtifactError, match="export the aligner again"):
            Aligner.load(out)
        export_model(str(source), out, "float32")
        Aligner.load(out, max_new_tokens=3).correct("q", "a")
    assert len(exports) == len(DAMAGE)


@pytest.mark.parametrize("size", [500, 5_000, 200_000])
def test_an_export_to_a_full_disk_is_one_line_and_leaves_the_folder_as_it_was(
    source: Path, tmp_path: Path, size: int
) -> None:
    with (
        little_room(size),
        pytest.raises(BuildError, match=re.escape(f"{tmp_path / 'out'} cannot be written: ")) as told,
    ):
        export_model(str(source), tmp_path / "out", "float32")
    assert "\n" not in str(told.value)
    with little_room(size), pytest.raises(BuildError, match="set ALIGNER_HOME"):
        export_model(str(source), None, "float32")
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith(".out.lock")) == ["here", "home"]
    assert not [path for path in (tmp_path / "home").iterdir() if path.suffix != ".lock"]


@pytest.mark.parametrize("size", [100, 50_000])
def test_a_training_on_a_full_disk_is_one_line_and_goes_on_when_repeated(
    source: Path, tmp_path: Path, size: int
) -> None:
    rows = [Triple(question=f"question {number}", answer="bad", correction="good") for number in range(12)]
    stage = Stage(epochs=1, learning_rate=1e-3)
    config = TrainConfig(base=str(source), warm_up=stage, correction=stage, bfloat16=False, save_steps=1)
    out = tmp_path / "out"
    with little_room(size), pytest.raises(BuildError, match=re.escape(f"{tmp_path / '.out.run'} cannot be written: ")):
        train(rows, out, config)
    assert not out.exists()
    train(rows, out, config)
    assert sorted(path.name for path in tmp_path.glob("*out*")) == [".out.lock", ".out.run.lock", "out"]
