"""A merged checkpoint for other engines: it holds all of an aligner, and nobody's files are replaced by one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from typer.testing import CliRunner, Result

from aligner_middleware import Aligner, ArtifactError, BuildError, ConfigError
from aligner_middleware.artifact import CheckpointArtifact
from aligner_middleware.calibration import Calibration
from aligner_middleware.checkpoints.checkpoint import open_checkpoint
from aligner_middleware.checkpoints.difference import DIFFERENCE_FILE, save_difference
from aligner_middleware.cli.app import app
from aligner_middleware.data.progress import Progress
from aligner_middleware.export.store import export_checkpoint, export_model
from aligner_middleware.text.template import PromptTemplate
from aligner_middleware.text.tokenizer import Tokenizer
from tests.fakes import artifact_folder
from tests.integration.conftest import random_checkpoint

PAIRS = [("Who?", "Nobody that I know of."), ("Why is that?", "Because."), ("q", "é日本 " * 9)]
TEMPLATE = PromptTemplate(
    name="mine",
    text="<|im_start|>Q {question} A {answer}<|im_end|>",
    special_tokens=("<|im_start|>", "<|im_end|>"),
    bos=False,
    end_token="<|endoftext|>",
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A difference to a random base, with its own prompt, end token and calibration."""
    folder = tmp_path_factory.mktemp("trained")
    base = random_checkpoint("llama", folder / "base")
    before = dict(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).named_parameters())
    torch.manual_seed(1)
    after = {name: weight.detach() + torch.randn_like(weight) * 0.05 for name, weight in before.items()}
    out = folder / "difference"
    out.mkdir()
    save_difference(after, before, 4, out / DIFFERENCE_FILE)
    recipe = {"config": {"base": str(base)}, "template": TEMPLATE.model_dump(), "base": {"source": "b", "sha256": {}}}
    (out / "training.json").write_text(json.dumps(recipe))
    (out / "calibration.json").write_text(Calibration(scale=2.0, rows=100).model_dump_json())
    return out


@pytest.fixture(scope="module")
def merged(trained: Path) -> Path:
    out = trained.parent / "merged"
    export_checkpoint(str(trained), out)
    return out


def corrections(model: Path, **options: str) -> list[str]:
    with Aligner.load(model, max_new_tokens=24, **options) as aligner:  # type: ignore[arg-type]
        return [correction.corrected for correction in aligner.correct_batch(PAIRS)]


def test_a_merged_checkpoint_and_its_graph_correct_as_what_they_were_made_of(
    trained: Path, merged: Path, tmp_path: Path
) -> None:
    expected = corrections(trained, engine="torch")
    assert corrections(merged, engine="torch") == expected
    artifact = export_model(str(merged), tmp_path / "graph", "float32").artifact
    assert corrections(tmp_path / "graph") == expected
    described = CheckpointArtifact.load(merged)
    for name in ("template", "base", "eos_token_ids", "verdict_ids", "calibration", "vocab_size", "max_positions"):
        assert getattr(artifact, name) == getattr(described, name), name
    assert described.base.adapter_sha256
    assert described.calibration == Calibration(scale=2.0, rows=100)


def test_transformers_loads_it_and_stops_where_a_correction_ends(merged: Path) -> None:
    network = AutoModelForCausalLM.from_pretrained(merged)
    reference = open_checkpoint(str(merged.parent / "difference")).load()
    for name, weight in reference.state_dict().items():
        torch.testing.assert_close(network.state_dict()[name], weight, rtol=0, atol=0)
    settings: Any = GenerationConfig.from_pretrained(merged)
    ends = list(CheckpointArtifact.load(merged).eos_token_ids)
    assert ends == [0, 2]  # the template's own end token, then the model's
    assert settings.eos_token_id == ends
    assert vars(network.config)["eos_token_id"] == ends
    assert not settings.do_sample
    tokenizer = AutoTokenizer.from_pretrained(merged)  # type: ignore[no-untyped-call]
    text = "plain words, of any kind: é"
    assert tokenizer(text).input_ids == Tokenizer.from_file(merged / "tokenizer.json").encode(text)


def test_half_precision_takes_half_the_room_and_others_are_refused(trained: Path, merged: Path, tmp_path: Path) -> None:
    assert export_checkpoint(str(trained), tmp_path / "half", "float16").precision == "float16"
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (merged, tmp_path / "half")]
    assert sizes[1] < 0.55 * sizes[0]
    with pytest.raises(ConfigError, match="float32 or float16, not in int8"):
        export_checkpoint(str(trained), tmp_path / "eighth", "int8")
    assert not (tmp_path / "eighth").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json", "generation_config.json"])
def test_a_merged_checkpoint_that_was_altered_is_refused(trained: Path, tmp_path: Path, name: str) -> None:
    export_checkpoint(str(trained), tmp_path / "out")
    with (tmp_path / "out" / name).open("ab") as file:
        file.write(b" ")
    with pytest.raises(ArtifactError, match=f"{name} was altered"):
        Aligner.load(tmp_path / "out", engine="torch")


@pytest.mark.parametrize(
    "make",
    [
        artifact_folder,
        lambda out: (out.mkdir(), (out / "config.json").write_text("{}"), (out / "model.safetensors").write_text("w")),
    ],
)
def test_it_replaces_a_checkpoint_of_its_own_and_nothing_else(tmp_path: Path, make: Callable[[Path], object]) -> None:
    source = str(random_checkpoint("llama", tmp_path / "source"))
    make(tmp_path / "other")
    before = {path.name: path.read_bytes() for path in (tmp_path / "other").iterdir()}
    with pytest.raises(BuildError, match="nothing was touched"):
        export_checkpoint(source, tmp_path / "other")
    assert {path.name: path.read_bytes() for path in (tmp_path / "other").iterdir()} == before
    seen: list[Progress] = []
    for _ in range(2):
        export_checkpoint(source, tmp_path / "own", report=seen.append)
    assert [at.stage for at in seen] == 2 * ["loading the checkpoint", "writing"]
    with pytest.raises(BuildError, match=r"holds 'config\.json'"):
        export_model(source, tmp_path / "own", "float32")


def test_an_export_that_fails_leaves_nothing(tmp_path: Path) -> None:
    source = random_checkpoint("llama", tmp_path / "source")

    def stop(progress: Progress) -> None:
        if progress.stage == "writing":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(str(source), tmp_path / "out", report=stop)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.lock", "source"]


def test_the_command_writes_it_and_info_shows_it(trained: Path, tmp_path: Path) -> None:
    def run(*arguments: str) -> Result:
        return CliRunner().invoke(app, arguments)

    merging = ("export", str(trained), "--form", "checkpoint")
    out = str(tmp_path / "out")
    done = run(*merging, out, "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["form"] == "checkpoint"
    assert json.loads(run("info", "--model", out, "--json").stdout) == json.loads(done.stdout)
    assert "vllm serve" in " ".join(run("info", "--model", out).stdout.split())
    for wrong in (merging, (*merging, out, "--no-fused"), ("export", str(trained), out, "--form", "chekpoint")):
        assert run(*wrong).exit_code == 2
