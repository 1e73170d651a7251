"""Folders that somebody tampered with, or a disk damaged: one `ArtifactError` names the file and the field, at once."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from aligner_middleware import ArtifactError, BuildError
from aligner_middleware.artifact import FORMAT_VERSION, Artifact, BaseWeights, Parity, Probe
from aligner_middleware.calibration import Calibration
from aligner_middleware.checkpoints.checkpoint import open_checkpoint
from aligner_middleware.checkpoints.difference import add_difference, save_difference
from aligner_middleware.data.checked import sha256, validated
from aligner_middleware.strength import LEVELS
from aligner_middleware.text.published import TEMPLATES
from aligner_middleware.text.template import DEFAULT
from tests.fakes import SPARE, artifact_folder, tokenizer_json

DIGEST = "0" * 64
DEEP = "[" * 100_000


def exported(folder: Path) -> Path:
    """An aligner folder with everything in `aligner.json` that there can be."""
    return artifact_folder(
        folder,
        SPARE,
        template=DEFAULT.model_copy(update={"verdicts": SPARE[:3], "mark": SPARE[3]}),
        weights="products",
        base=BaseWeights(source="tests", sha256={"model.safetensors": DIGEST}, adapter_sha256=DIGEST),
        layers=2,
        kv_heads=2,
        head_size=16,
        vocab_size=263,
        max_positions=512,
        built_with={"torch": "2.0"},
        parity=Parity(max_logit_difference=0.1, same_argmax=1, perplexity=2, reference_perplexity=2, tokens=99),
        probe=Probe(tokens=(3, 4), top=(5, 6), logits=(1.0, 0.5)),
        verdict_ids=(259, 260, 261),
        calibration=Calibration(),
    )


def put(content: dict[str, Any], field: str, value: Any) -> None:
    """Set a field; `...` takes it away."""
    *way, last = field.split(".")
    for name in way:
        content = content[name]
    if value is ...:
        del content[last]
    else:
        content[last] = value


def change(path: Path, field: str, value: Any) -> None:
    content = json.loads(path.read_text())
    put(content, field, value)
    path.write_text(json.dumps(content))


def refused(load: Callable[[], object], *words: str) -> None:
    """See that one error of one line holds these words, and that it came before anything was done for long."""
    before = time.monotonic()
    with pytest.raises(ArtifactError) as caught:
        load()
    assert time.monotonic() - before < 10
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message
    assert len(message) < 1000


FIELDS: list[tuple[str, Any]] = [
    ("format_version", "3"),
    ("format_version", True),
    ("format_version", None),
    ("name", "x" * 5000),
    ("name", ""),
    ("name", "\x1b[2J"),
    ("name", 7),
    ("name", ...),
    ("template", ...),
    ("template.text", "no places"),
    ("template.text", "{question}{answer}" + "x" * 10**6),
    ("template.special_tokens", ["<|im_start|>"] * 3),
    ("template.special_tokens", ["x" * 10_000]),
    ("template.name", "x" * 5000),
    ("template.verdicts", ["<a>"]),
    ("precision", "int3"),
    ("graph", "melted"),
    ("weights", "lead"),
    ("base.source", "x" * 5000),
    ("base.sha256", {"model.safetensors": "short"}),
    ("base.sha256", {str(number): DIGEST for number in range(5000)}),
    ("base.revision", "\n"),
    ("eos_token_ids", []),
    ("eos_token_ids", [-1]),
    ("eos_token_ids", [263]),
    ("eos_token_ids", list(range(200))),
    ("layers", 10**9),
    ("layers", 0),
    ("layers", 1.5),
    ("layers", "many"),
    ("kv_heads", 10**9),
    ("head_size", -1),
    ("vocab_size", 10**12),
    ("vocab_size", 10),
    ("max_positions", 10**12),
    ("max_positions", 1),
    ("files", {"../x": DIGEST}),
    ("files", {"x" * 5000: DIGEST}),
    ("files", {"model.onnx": DIGEST}),
    ("files", {"model.onnx": "short", "tokenizer.json": DIGEST}),
    ("files", {f"{number}": DIGEST for number in range(5000)}),
    ("files", 3),
    ("built_with", {"torch": "x" * 5000}),
    ("parity.same_argmax", math.nan),
    ("parity.perplexity", math.inf),
    ("parity.tokens", -1),
    ("probe.tokens", [10**9]),
    ("probe.tokens", [300]),
    ("probe.tokens", list(range(200)) * 50),
    ("probe.top", [1]),
    ("probe.logits", [math.nan, 1.0]),
    ("verdict_ids", [259, 260]),
    ("verdict_ids", [259, 260, 300]),
    ("verdict_ids", None),
    ("calibration.scale", 0),
    ("calibration.scale", math.inf),
    ("calibration.bias", math.nan),
    ("calibration.levels", {"low": 0.9}),
    ("calibration.levels.low", 2),
    ("calibration.tolerances.high", math.nan),
    ("calibration.rows", -1),
    ("unheard_of", 1),
]


@pytest.mark.parametrize(("field", "value"), FIELDS)
def test_a_field_of_aligner_json_is_bounded_before_it_is_used(tmp_path: Path, field: str, value: Any) -> None:
    folder = exported(tmp_path / "a")
    change(folder / "aligner.json", field, value)
    refused(lambda: Artifact.load(folder), "aligner.json", field.partition(".")[0])


@pytest.mark.parametrize("content", ["", "{", "[]", "null", DEEP, '{"a":' * 100_000, '{"layers": ' + "9" * 5000 + "}"])
def test_an_aligner_json_that_is_no_object_is_named(tmp_path: Path, content: str) -> None:
    folder = exported(tmp_path / "a")
    (folder / "aligner.json").write_text(content)
    refused(lambda: Artifact.load(folder), "aligner.json")


def test_an_aligner_json_of_many_megabytes_is_not_read(tmp_path: Path) -> None:
    folder = exported(tmp_path / "a")
    with (folder / "aligner.json").open("r+b") as file:
        file.truncate(2**33)  # a hole: it takes no room
    refused(lambda: Artifact.load(folder), "aligner.json", "16 MB")


def test_a_newer_version_with_new_fields_says_what_to_do(tmp_path: Path) -> None:
    folder = exported(tmp_path / "a")
    change(folder / "aligner.json", "format_version", FORMAT_VERSION + 1)
    change(folder / "aligner.json", "unheard_of", {"of": "today"})
    refused(lambda: Artifact.load(folder), "aligner.json", "written by a newer version", "pip install --upgrade")


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(), lambda one: st.lists(one)))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
def test_any_value_in_any_field_is_taken_or_refused(tmp_path: Path, value: Any) -> None:
    folder = tmp_path / "any"
    if not folder.exists():
        exported(folder)
    whole = json.loads((folder / "aligner.json").read_text())
    for field in whole:
        content = json.loads(json.dumps(whole))
        put(content, field, value)
        try:
            artifact = validated(Artifact, content, folder / "aligner.json", "again")
        except ArtifactError as exc:
            assert "aligner.json" in str(exc)
        else:
            assert 0 < artifact.layers <= 1000


@pytest.mark.parametrize(
    ("field", "inputs"),
    [
        ("layers", {"past_key_values.0.key": ["batch", 2, "past", 16]}),
        ("kv_heads", {f"past_key_values.{layer}.key": ["batch", 3, "past", 16] for layer in range(2)}),
        ("head_size", {f"past_key_values.{layer}.key": ["batch", 2, "past", 32] for layer in range(2)}),
        ("layers", {"input_ids": ["batch", "tokens"]}),
    ],
)
def test_a_graph_of_another_shape_is_refused(tmp_path: Path, field: str, inputs: dict[str, list[Any]]) -> None:
    folder = exported(tmp_path / "a")
    artifact = Artifact.load(folder)
    refused(lambda: artifact.check_graph(folder / "model.onnx", inputs), "model.onnx", field)
    fitting = {f"past_key_values.{layer}.key": ["batch", 2, "past", 16] for layer in range(2)}
    artifact.check_graph(folder / "model.onnx", fitting)


def one_token(content: dict[str, Any]) -> None:
    content["model"]["vocab"] = {"a": 0}
    content["added_tokens"] = []


TOKENIZERS: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (one_token, "cannot write text"),
    (lambda content: content["model"].update(vocab={}), "tokenizer"),
    (lambda content: content["model"]["vocab"].update(a=10**9), "vocab_size"),
    (lambda content: content["model"]["vocab"].update(a=-1), "not a tokenizer"),
    (lambda content: content["model"].update(type="Nonsense"), "not a tokenizer"),
    (lambda content: content["model"].update(merges=[["a", "nowhere"]]), "not a tokenizer"),
    (lambda content: content["added_tokens"][0].update(content=None), "not a tokenizer"),
    (lambda content: content["added_tokens"][0].pop("special"), "not a tokenizer"),
    (lambda content: content.update(added_tokens=content["added_tokens"][:1]), "template"),
    (lambda content: content["model"]["vocab"].update({SPARE[0]: 260, SPARE[1]: 259}), "verdict_ids"),
    (lambda content: content.update(pre_tokenizer={"type": "Split"}), "not a tokenizer"),
    (lambda content: content.update(decoder=None, model=content["model"] | {"vocab": {"Ġ": 0}}), "tokenizer"),
    (lambda content: content.clear(), "not a tokenizer"),
]


@pytest.mark.parametrize(("tamper", "word"), TOKENIZERS)
def test_a_tokenizer_that_cannot_be_used_is_refused(
    tmp_path: Path, tamper: Callable[[dict[str, Any]], object], word: str
) -> None:
    folder = exported(tmp_path / "a")
    content = json.loads((folder / "tokenizer.json").read_text())
    tamper(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    files = {name: sha256(folder / name) for name in ("model.onnx", "tokenizer.json")}
    change(folder / "aligner.json", "files", files)  # as one would who means it
    refused(lambda: Artifact.load(folder).tokenizer(folder), "tokenizer.json", word)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", DEEP.encode(), b"null"])
def test_a_tokenizer_that_is_no_json_is_refused(tmp_path: Path, content: bytes) -> None:
    folder = exported(tmp_path / "a")
    artifact = Artifact.load(folder)
    (folder / "tokenizer.json").write_bytes(content)
    refused(lambda: artifact.tokenizer(folder), "tokenizer.json")


def test_what_was_not_tampered_with_loads(tmp_path: Path) -> None:
    folder = exported(tmp_path / "a")
    artifact = Artifact.load(folder)
    assert artifact.tokenizer(folder).vocab_size == artifact.vocab_size == 263


def trained(folder: Path) -> Path:
    """A base model, and folders as `aligner train` writes them: with a difference to it, and an adapter."""
    base = folder / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps({"eos_token_id": 2}))
    (base / "model.safetensors").write_bytes(b"weights")
    (base / "tokenizer.json").write_text(tokenizer_json())
    recipe = {
        "config": {"base": str(base), "method": "difference"},
        "template": DEFAULT.model_dump(),
        "base": {"source": "base", "sha256": {"model.safetensors": DIGEST}},
        "losses": {"correction": 1.0},
    }
    adapter = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(base),
        "r": 16,
        "lora_alpha": 32,
        "target_modules": ["q_proj"],
        "something_of_peft": [1],
    }
    for name, weights in (("difference", "difference.safetensors"), ("adapter", "adapter_model.safetensors")):
        made = folder / name
        made.mkdir()
        (made / weights).write_bytes(b"weights")
        (made / "training.json").write_text(json.dumps(recipe))
        (made / "calibration.json").write_text(Calibration().model_dump_json())
        if name == "adapter":
            (made / "adapter_config.json").write_text(json.dumps(adapter))
    return folder


def opened(folder: Path) -> None:
    open_checkpoint(str(folder)).calibration()


@pytest.mark.parametrize("kind", ["difference", "adapter"])
def test_a_trained_aligner_opens_with_its_prompt(tmp_path: Path, kind: str) -> None:
    found = open_checkpoint(str(trained(tmp_path) / kind))
    assert (found.template, found.calibration()) == (TEMPLATES["default"], Calibration())
    assert found.folder == tmp_path / "base"


@pytest.mark.parametrize(
    ("file", "field", "value"),
    [
        ("training.json", "config", ...),
        ("training.json", "config.base", ...),
        ("training.json", "config.base", ["x"]),
        ("training.json", "config.base", "x" * 5000),
        ("training.json", "template", ...),
        ("training.json", "template.text", "no places"),
        ("training.json", "template.unheard_of", 1),
        ("training.json", "base.sha256", {"x": "short"}),
        ("training.json", "format_version", "new"),
        ("calibration.json", "levels", {"low": 0.9}),
        ("calibration.json", "levels", None),
        ("calibration.json", "scale", -1),
        ("calibration.json", "bias", math.inf),
        ("calibration.json", "unheard_of", 1),
        ("adapter_config.json", "r", 10**9),
        ("adapter_config.json", "r", "sixteen"),
        ("adapter_config.json", "lora_alpha", 0),
        ("adapter_config.json", "peft_type", "IA3"),
        ("adapter_config.json", "target_modules", "(a+)+" * 1000),
        ("adapter_config.json", "target_modules", ["x"] * 20_000),
        ("adapter_config.json", "rank_pattern", {"x": 10**9}),
        ("adapter_config.json", "base_model_name_or_path", "x" * 5000),
        ("adapter_config.json", "base_model_name_or_path", 3),
    ],
)
def test_a_field_beside_trained_weights_is_bounded(tmp_path: Path, file: str, field: str, value: Any) -> None:
    folder = trained(tmp_path) / ("adapter" if file == "adapter_config.json" else "difference")
    change(folder / file, field, value)
    refused(lambda: opened(folder), file, field.partition(".")[0])


@pytest.mark.parametrize("file", ["training.json", "calibration.json", "adapter_config.json"])
@pytest.mark.parametrize("content", ["", "[]", DEEP])
def test_a_file_beside_trained_weights_that_is_no_object_is_named(tmp_path: Path, file: str, content: str) -> None:
    folder = trained(tmp_path) / "adapter"
    (folder / file).write_text(content)
    refused(lambda: opened(folder), file)


def test_a_training_by_a_newer_version_is_told(tmp_path: Path) -> None:
    folder = trained(tmp_path) / "difference"
    change(folder / "training.json", "format_version", 2)
    refused(lambda: opened(folder), "training.json", "written by a newer version")


class Weights:
    """As much of a model as a difference is added to."""

    def __init__(self) -> None:
        import torch

        generator = torch.Generator().manual_seed(0)
        self.before = {"large": torch.zeros(300, 257), "norm": torch.zeros(48)}
        self.after = {name: torch.randn(one.shape, generator=generator) for name, one in self.before.items()}

    def named_parameters(self) -> list[tuple[str, Any]]:
        return [(name, one.clone()) for name, one in self.before.items()]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("large:planes", ...),
        ("large:scales", np.zeros((3, 1), np.float16)),
        ("large:scales", np.full((603, 1), np.nan, np.float16)),
        ("large:scales", np.zeros(603, np.float16)),
        ("large:planes", np.zeros((9, 9648), np.uint8)),
        ("large:planes", np.zeros((0, 9648), np.uint8)),
        ("large:planes", np.zeros((3, 5), np.uint8)),
        ("large:planes", np.zeros((3, 9648), np.int64)),
        ("norm:rows", np.array([48] * 48, np.int32)),
        ("norm:rows", np.array([-1] * 48, np.int32)),
        ("norm:rows", np.array(3, np.int32)),
        ("norm:rows", np.zeros(48, np.float16)),
        ("norm:values", np.zeros((48, 48), np.float16)),
        ("norm:values", np.full(48, np.inf, np.float16)),
        ("norm:more", np.zeros(3, np.float16)),
    ],
)
def test_a_difference_whose_parts_do_not_go_together_is_refused(tmp_path: Path, key: str, value: Any) -> None:
    path, weights = tmp_path / "difference.safetensors", Weights()
    save_difference(weights.after, weights.before, 3, path)
    parts: dict[str, Any] = load_file(path)
    parts[key] = value
    save_file(
        {name: part for name, part in parts.items() if part is not ...},
        path,
        metadata={"format": "aligner difference 1"},
    )
    refused(lambda: add_difference(weights, path), "difference.safetensors", key.partition(":")[0])


@pytest.mark.parametrize("format", ["", "another 1", "aligner difference 0", "aligner difference x"])
def test_other_tensors_are_no_difference(tmp_path: Path, format: str) -> None:
    path = tmp_path / "difference.safetensors"
    save_file({"large": np.zeros(3, np.float32)}, path, metadata={"format": format} if format else None)
    refused(lambda: add_difference(Weights(), path), "difference.safetensors", "format")


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 8, b"\x08\0\0\0\0\0\0\0{}      ", (2**40).to_bytes(8, "little") + b"{}", b"x" * 100]
)
def test_a_broken_difference_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "difference.safetensors"
    path.write_bytes(content)
    refused(lambda: add_difference(Weights(), path), "difference.safetensors")


def test_a_difference_by_a_newer_version_is_told(tmp_path: Path) -> None:
    path = tmp_path / "difference.safetensors"
    save_file({"large:shape": np.array([3])}, path, metadata={"format": "aligner difference 2"})
    refused(lambda: add_difference(Weights(), path), "written by a newer version")


def test_a_difference_for_another_shape_says_so_whatever_it_claims(tmp_path: Path) -> None:
    path, weights = tmp_path / "difference.safetensors", Weights()
    save_file(
        {"norm:shape": np.array([10**9, 10**9]), "norm:rows": np.zeros(1, np.int32), "norm:values": np.zeros(1)},
        path,
        metadata={"format": "aligner difference 1"},
    )
    with pytest.raises(BuildError, match="does not fit its base model at 'norm'"):
        add_difference(weights, path)


def test_levels_are_those_that_a_calibration_must_have() -> None:
    assert set(Calibration().levels) == set(Calibration().tolerances) == set(LEVELS)
