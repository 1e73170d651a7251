"""Files that users bring or damage: artifacts, triples, and the command line's one line about them."""

import gzip
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import aligner_middleware
from aligner_middleware import ArtifactError, DataError, JobError
from aligner_middleware.artifact import EXPORTED, FORMAT_VERSION, Artifact
from aligner_middleware.calibration import Calibration
from aligner_middleware.checkpoints.cache import build_once
from aligner_middleware.cli.app import app
from aligner_middleware.data.folders import write_folder
from aligner_middleware.data.triples import read_rows
from aligner_middleware.text.template import DEFAULT
from tests.fakes import artifact_folder


def test_an_artifact_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    folder = artifact_folder(tmp_path / "a")
    assert Artifact.load(folder).template == DEFAULT


def test_a_folder_without_aligner_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is not an aligner folder"):
        Artifact.load(tmp_path)


def test_an_altered_file_is_named(tmp_path: Path) -> None:
    folder = artifact_folder(tmp_path / "a")
    (folder / "model.onnx").write_bytes(b"grapH")
    with pytest.raises(ArtifactError, match=r"model\.onnx was altered"):
        Artifact.load(folder)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    folder = artifact_folder(tmp_path / "a")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ArtifactError, match=r"tokenizer\.json is missing"):
        Artifact.load(folder)


@pytest.mark.parametrize(
    "change", [{"format_version": 99}, {"precision": "int3"}, {"files": {"../x": "0"}}, {"more": 1}]
)
def test_a_wrong_aligner_json_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    folder = artifact_folder(tmp_path / "a")
    path = folder / "aligner.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ArtifactError, match=r"aligner\.json"):
        Artifact.load(folder)


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "aligner.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_folder_of_before_verdicts_is_served_as_before_and_says_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def age(content: dict[str, Any]) -> None:
        content["format_version"] = 2
        for name in ("verdict_ids", "calibration"):
            del content[name]
        for name in ("verdicts", "mark"):
            del content["template"][name]

    folder = artifact_folder(tmp_path / "a")
    rewrite(folder, age)
    artifact = Artifact.load(folder)
    assert (artifact.template, artifact.verdict_ids, artifact.calibration) == (DEFAULT, None, None)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "has format version 2, without verdicts: it is served as before" in caplog.text
    caplog.clear()
    Artifact.load(artifact_folder(tmp_path / "b"))
    assert not caplog.records


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (1, f"has format version 1, this package reads {FORMAT_VERSION}: export it again"),
        (FORMAT_VERSION + 1, rf"written by a newer version .*format is {FORMAT_VERSION + 1}, .*up to {FORMAT_VERSION}"),
        (99, r"written by a newer version .*format is 99, .*pip install --upgrade aligner-middleware"),
    ],
)
def test_a_folder_of_another_format_is_refused_and_both_are_named(tmp_path: Path, version: int, message: str) -> None:
    folder = artifact_folder(tmp_path / "a")
    rewrite(folder, lambda content: content.update(format_version=version))
    with pytest.raises(ArtifactError, match=message):
        Artifact.load(folder)


def test_verdicts_and_levels_come_back_as_they_were_saved(tmp_path: Path) -> None:
    folder = artifact_folder(tmp_path / "a")
    template = DEFAULT.model_copy(update={"verdicts": ("<a>", "<b>", "<c>"), "mark": "<d>"})
    calibration = Calibration(scale=1.5, bias=-0.25, levels={"low": 0.9, "medium": 0.4, "high": 0.1}, rows=700)
    update = {"template": template, "verdict_ids": (3, 4, 5), "calibration": calibration}
    Artifact.load(folder).model_copy(update=update).save(folder)
    found = Artifact.load(folder)
    assert (found.template, found.verdict_ids, found.calibration) == (template, (3, 4, 5), calibration)


def test_saving_leaves_the_old_file_until_the_new_one_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = artifact_folder(tmp_path / "a")
    before = (folder / "aligner.json").read_bytes()
    artifact = Artifact.load(folder).model_copy(update={"name": "other"})

    def full(path: Path, target: Path) -> Path:
        assert path.stat().st_size > 100
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", full)
        with pytest.raises(JobError, match=r"aligner\.json.*cannot be written: no space"):
            artifact.save(folder)
    assert (folder / "aligner.json").read_bytes() == before
    assert Artifact.load(folder).name == "test"
    artifact.save(folder)
    assert Artifact.load(folder).name == "other"
    assert sorted(path.name for path in folder.iterdir()) == ["aligner.json", "model.onnx", "tokenizer.json"]


CALIBRATION = st.builds(Calibration, scale=st.floats(0.01, 10), bias=st.floats(-5, 5))


@given(CALIBRATION, st.floats(0.001, 0.999))
def test_a_score_and_its_log_odds_give_each_other(calibration: Calibration, score: float) -> None:
    assert calibration.score(calibration.log_odds(score)) == pytest.approx(score, rel=1e-6)


@given(CALIBRATION, st.floats(allow_nan=False), st.floats(allow_nan=False))
def test_a_score_is_a_probability_that_grows_with_the_log_odds(
    calibration: Calibration, one: float, other: float
) -> None:
    low, high = (calibration.score(odds) for odds in sorted([one, other]))
    assert 0 <= low <= high <= 1


@given(CALIBRATION, st.floats(0, 1), st.floats(0, 1))
def test_log_odds_grow_with_the_score(calibration: Calibration, one: float, other: float) -> None:
    low, high = (calibration.log_odds(score) for score in sorted([one, other]))
    assert low <= high
    assert (calibration.log_odds(0), calibration.log_odds(1)) == (-math.inf, math.inf)


def test_a_calibration_that_turns_scores_around_is_refused() -> None:
    for scale in (0.0, -1.0):
        with pytest.raises(ValueError, match="greater than 0"):
            Calibration(scale=scale)


def test_a_failed_build_leaves_nothing_and_a_good_one_runs_once(tmp_path: Path) -> None:
    def fail(out: Path) -> None:
        (out / "half").write_text("half")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_folder(tmp_path / "a", fail, EXPORTED)
    assert [path.name for path in tmp_path.iterdir()] == [".a.lock"]
    calls: list[Path] = []
    for _ in range(2):
        build_once(tmp_path / "b", calls.append, EXPORTED)
    assert len(calls) == 1
    assert (tmp_path / "b").is_dir()


def test_replacing_a_folder_leaves_the_old_one_until_the_new_one_is_whole(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    write_folder(folder, lambda out: (out / "aligner.json").write_text("old"), EXPORTED)

    def fail(out: Path) -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_folder(folder, fail, EXPORTED)
    assert (folder / "aligner.json").read_text() == "old"
    write_folder(folder, lambda out: (out / "aligner.json").write_text("new"), EXPORTED)
    assert (folder / "aligner.json").read_text() == "new"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "is not JSON"),
        ('{"question": "q", "answer": "a"}', "has the keys answer, question: expected"),
        ('{"question": "q", "answer": 3, "correction": "c"}', "answer: Input should be a valid string"),
        ('{"prompt": "q", "chosen": [{"role": "assistant"}], "rejected": "r"}', "content is missing"),
        ('["q"]', "is not a JSON object"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "q", "answer": "a", "correction": "c"}\n\n' + line + "\n")
    with pytest.raises(DataError, match=reason) as caught:
        read_rows(path)
    assert caught.value.line == 3
    assert str(path) in str(caught.value)


def test_bytes_that_are_not_utf8_are_named_by_their_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    good = (
        json.dumps({"question": "Wie heißt du?", "answer": "a", "correction": "c"}, ensure_ascii=False).encode() + b"\n"
    )
    path.write_bytes(good * 3 + b"caf\xe9\n" + good)
    with pytest.raises(DataError, match="is not UTF-8 text: it holds the byte 0xe9") as caught:
        read_rows(path)
    assert caught.value.line == 4
    path.write_bytes(good * 3)
    assert read_rows(path).triples[2].question == "Wie heißt du?"


def test_a_missing_or_empty_data_file_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="cannot be read"):
        read_rows(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(JobError, match="holds no triples"):
        read_rows(tmp_path / "empty.jsonl")
    (tmp_path / "false.jsonl.gz").write_text("no gzip")
    with pytest.raises(JobError, match="cannot be read"):
        read_rows(tmp_path / "false.jsonl.gz")


SAID = {"role": "user", "content": "q"}
SAFE_RLHF = {"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": 1}
HH = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: q\n\nAssistant: "


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"question": "q", "answer": "a", "correction": "c", "category": "x"}, ("q", "a", "c")),
        ({"prompt": "q", "chosen": "c", "rejected": "a"}, ("q", "a", "c")),
        (
            {
                "prompt": [SAID],
                "chosen": [{"role": "assistant", "content": "c"}],
                "rejected": [{"role": "assistant", "content": "a"}],
            },
            ("q", "a", "c"),
        ),
        (
            {
                "chosen": [SAID, {"role": "assistant", "content": "c"}],
                "rejected": [SAID, {"role": "assistant", "content": "a"}],
            },
            ("q", "a", "c"),
        ),
        ({"chosen": HH + "c\n\nd", "rejected": HH + "a"}, ("q", "a", "c\n\nd")),
        ({"chosen": HH + "c", "rejected": "\n\nHuman: q\n\nAssistant: a"}, "part before their last turn"),
        ({"chosen": HH + "c", "rejected": HH}, "a text is empty"),
        (SAFE_RLHF | {"is_response_0_safe": True, "is_response_1_safe": False}, ("q", "b", "a")),
        (SAFE_RLHF | {"is_response_0_safe": True, "is_response_1_safe": True}, ("q", "b", "b")),
        (SAFE_RLHF | {"is_response_0_safe": False, "is_response_1_safe": False}, "neither response is safe"),
        ({"prompt": "q", "response": "a", "is_safe": True}, ("q", "a", "a")),
        ({"prompt": "q", "response": "a", "is_safe": False}, "has no correction"),
        ({"question": " ", "answer": "a", "correction": "c"}, "a text is empty"),
        ({"question": "q", "answer": "a", "correction": ""}, "a text is empty"),
        ({"question": "q", "answer": "a", "kind": "keep", "better": "b"}, ("q", "a", "a")),
        ({"question": "q", "answer": "a", "kind": "refusal"}, ("q", "a", "a")),
        ({"question": "q", "answer": "a", "kind": "bad", "better": "b"}, ("q", "a", "b")),
        ({"question": "q", "answer": "a", "kind": "bad"}, ("q", "a", "")),  # teaches its verdict alone
        ({"question": "q", "answer": " ", "kind": "bad"}, "a text is empty"),
        ({"question": "q", "answer": "a", "kind": "good"}, "its kind is 'good', none of keep, refusal and bad"),
    ],
)
def test_every_known_form_gives_a_triple_or_the_reason_why_not(
    tmp_path: Path, row: dict[str, Any], expected: tuple[str, str, str] | str
) -> None:
    path = tmp_path / "rows.jsonl.gz"
    first = {"question": "first", "answer": "a", "correction": "c"}
    path.write_bytes(gzip.compress(f"{json.dumps(first)}\n{json.dumps(row)}\n".encode()))
    rows = read_rows(path)
    if isinstance(expected, str):
        assert [line for line, _ in rows.left_out] == [2]
        assert expected in rows.left_out[0].reason
        assert len(rows.triples) == 1
    else:
        triple = rows.triples[1]
        assert (triple.question, triple.answer, triple.correction) == expected
        assert not rows.left_out


def run_cli(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "aligner_middleware", *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=120)


def test_the_command_line_fails_with_one_line(tmp_path: Path) -> None:
    bad = tmp_path / "rows.jsonl"
    bad.write_text("nonsense\n")
    result = run_cli("info", "--model", str(artifact_folder(tmp_path / "a")) + "/none")
    assert (result.returncode, result.stdout) == (1, "")
    refused = CliRunner().invoke(app, ["train", str(bad), str(tmp_path / "out")])
    assert (refused.exit_code, refused.stdout) == (1, "")
    for told in (result.stderr, refused.stderr):
        assert told.startswith("error: ")
        assert told.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_info_prints_json(tmp_path: Path) -> None:
    result = run_cli("info", "--model", str(artifact_folder(tmp_path / "a")), "--json")
    assert json.loads(result.stdout)["precision"] == "int8"


def test_serving_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, aligner_middleware as a; assert 'langchain_core' not in sys.modules;"
        "[getattr(a, name) for name in a.__all__];"
        "import aligner_middleware.engine.onnx;"
        "print([m for m in ('torch', 'transformers', 'optimum', 'onnx', 'peft') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "[]", result.stderr


def test_every_public_name_is_there() -> None:
    assert sorted(aligner_middleware.__all__) == aligner_middleware.__all__
    for name in aligner_middleware.__all__:
        assert getattr(aligner_middleware, name) is not None
