"""The direction of keep against correct: what is found in hidden states whose truth is known, and what the command tells."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from aligner_middleware.artifact import MODEL_FILE
from aligner_middleware.calibration import Calibration
from aligner_middleware.cli.app import app
from aligner_middleware.codec import Codec
from aligner_middleware.errors import JobError
from aligner_middleware.evaluation.detection import Auc, Gain
from aligner_middleware.evaluation.hidden_states import ReadRows, StateReader
from aligner_middleware.evaluation.labelled_rows import LabelledRow
from aligner_middleware.evaluation.probe import LEAST, check_enough, find_directions, halves, probe
from aligner_middleware.settings import Settings
from aligner_middleware.text.template import PromptTemplate
from tests.fakes import END, SPARE, artifact_folder, byte_tokenizer, tokenizer_json, verdict_template

WIDTH = 12


def labelled(count: int) -> NDArray[np.bool_]:
    return np.array([at % 3 == 0 for at in range(count)])


def states_of(unsafe: NDArray[np.bool_], shift: NDArray[np.float64], rng: np.random.Generator) -> Any:
    """Noise of one layer, and `shift` on it in the rows that are bad: `[N, 1, W]`."""
    noise = rng.normal(size=(unsafe.size, 1, shift.size))
    return (noise + unsafe[:, None, None] * shift).astype(np.float32)


def read_rows(states: Any, unsafe: NDArray[np.bool_], log_odds: Any = None) -> ReadRows:
    rows = [
        LabelledRow(question=f"Question {at}?", answer="a", kind="bad" if bad else "keep")
        for at, bad in enumerate(unsafe.tolist())
    ]
    return ReadRows(rows, states, log_odds, 0)


# --- directions


@given(st.integers(0, 10_000), st.floats(6, 60), st.integers(60, 200))
@settings(max_examples=25)
def test_a_known_direction_is_found_and_points_from_good_to_bad(seed: int, size: float, count: int) -> None:
    rng = np.random.default_rng(seed)
    axis = rng.normal(size=WIDTH)
    axis /= np.linalg.norm(axis)
    unsafe = labelled(count)
    directions = find_directions(states_of(unsafe, size * axis, rng), unsafe, seed=seed)
    assert np.linalg.norm(directions.vectors, axis=1) == pytest.approx(1)
    assert float(directions.vectors[0] @ axis) > 0.8
    others = labelled(90)
    scores = directions.scores(states_of(others, size * axis, rng))[:, 0]
    assert Auc.of(scores, others, draws=1).value > 0.95


@given(st.integers(0, 10_000))
@settings(max_examples=15)
def test_states_that_say_nothing_separate_nothing(seed: int) -> None:
    rng = np.random.default_rng(seed)
    nothing, unsafe = np.zeros(WIDTH), labelled(300)
    directions = find_directions(states_of(unsafe, nothing, rng), unsafe, seed=seed)
    area = Auc.of(directions.scores(states_of(unsafe, nothing, rng))[:, 0], unsafe, draws=1).value
    assert 0.35 < area < 0.65


@given(st.integers(0, 10_000), st.floats(0.1, 100), st.floats(-50, 50))
@settings(max_examples=15)
def test_scores_do_not_depend_on_scale_and_place_of_the_states(seed: int, scale: float, place: float) -> None:
    rng = np.random.default_rng(seed)
    unsafe = labelled(60)
    states = states_of(unsafe, np.full(WIDTH, 2.0), rng)
    moved = (scale * states + place).astype(np.float32)
    first, second = (find_directions(one, unsafe).scores(one) for one in (states, moved))
    assert second == pytest.approx(first, abs=0.02)
    assert first[unsafe].mean() == pytest.approx(1, abs=1e-4)
    assert first[~unsafe].mean() == pytest.approx(-1, abs=1e-4)


def test_a_layer_with_equal_states_scores_all_rows_alike() -> None:
    unsafe = labelled(60)
    states = np.ones((60, 2, WIDTH), np.float32)
    assert not find_directions(states, unsafe).scores(states).any()


# --- tests on other rows


def layered(unsafe: NDArray[np.bool_], sizes: list[float], rng: np.random.Generator) -> Any:
    axis = np.eye(WIDTH)[0]
    return np.concatenate([states_of(unsafe, size * axis, rng) for size in sizes], axis=1)


def test_the_decision_sits_in_the_first_layer_that_separates_as_well_as_the_best() -> None:
    rng, unsafe = np.random.default_rng(0), labelled(300)
    sizes = [0.0, 1.0, 12.0, 12.0]
    directions, report = probe(
        read_rows(layered(unsafe, sizes, rng), unsafe), {"others": read_rows(layered(unsafe, sizes, rng), unsafe)}
    )
    (scores,) = report.tests
    assert (report.layer, scores.first, len(scores.layers)) == (3, 3, 4)
    assert (report.good, report.bad) == (scores.good, scores.bad) == (200, 100)
    assert report.direction == directions.vectors[2].tolist()
    assert scores.layers[0].value < 0.7 < scores.layers[1].value < 0.95 < scores.layers[2].value
    assert scores.changed > 0.95
    assert (scores.verdict, scores.verdict_changed, scores.gain, scores.better) == (None, None, None, False)


@pytest.mark.parametrize(("noise", "better"), [(0.01, False), (5.0, True)])
def test_a_direction_is_better_only_if_the_interval_of_its_gain_is_above_zero(noise: float, better: bool) -> None:
    rng, unsafe = np.random.default_rng(0), labelled(300)
    states = layered(unsafe, [4.0], rng)
    verdict = unsafe + rng.normal(size=300) * noise
    _, report = probe(read_rows(states, unsafe), {"others": read_rows(states, unsafe, verdict)})
    gain = report.tests[0].gain
    assert gain is not None
    assert report.tests[0].better == better == (gain.low > 0)


@given(st.integers(0, 1000))
@settings(max_examples=10)
def test_a_gain_is_the_difference_of_the_areas_and_turns_its_sign_with_their_order(seed: int) -> None:
    rng = np.random.default_rng(seed)
    unsafe = labelled(60)
    first, second = unsafe + rng.normal(size=(2, 60))
    one, other = Gain.of(first, second, unsafe, draws=50), Gain.of(second, first, unsafe, draws=50)
    areas = [Auc.of(scores, unsafe, draws=1).value for scores in (first, second)]
    assert one.value == pytest.approx(areas[0] - areas[1])
    assert (one.value, one.low, one.high) == pytest.approx((-other.value, -other.high, -other.low))
    same = Gain.of(first, first, unsafe, draws=20)
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_a_gain_without_a_class_is_no_number() -> None:
    gain = Gain.of([1, 2], [2, 1], [True, True])
    assert math.isnan(gain.value)
    assert str(gain) == ""


def test_both_answers_to_a_question_are_in_the_same_half() -> None:
    rows = [LabelledRow(question=f"Why {n % 50}? ", answer=f"a{n}", kind="keep") for n in range(100)]
    chosen = halves(rows)
    assert chosen[:50].tolist() == chosen[50:].tolist()
    assert 10 < chosen[:50].sum() < 40


def test_too_few_rows_of_a_class_are_refused_with_their_numbers() -> None:
    enough = np.repeat([True, False], LEAST)
    check_enough(enough, "rows")
    with pytest.raises(JobError, match=rf"rows: {LEAST - 1} good and {LEAST} bad answers .* at least {LEAST}"):
        check_enough(enough[:-1], "rows")


# --- states of a network


def network(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(  # type: ignore[no-untyped-call]
        vocab_size=320,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=200,
        eos_token_id=END,
        pad_token_id=END,
    )
    return LlamaForCausalLM(config).eval()  # type: ignore[no-untyped-call]


def reader_of(model: Any, template: PromptTemplate | None = None) -> StateReader:
    tokenizer = byte_tokenizer(SPARE)
    template = template or verdict_template(tokenizer, marks=True)
    return StateReader(model, Codec(tokenizer, template, [END], 200, Settings(), Calibration()))


ROWS = [
    LabelledRow(question="Why?", answer="because " * (n % 5) + "so", kind="bad" if n % 2 else "keep") for n in range(40)
]


def test_states_and_log_odds_do_not_depend_on_the_batch() -> None:
    reader = reader_of(network())
    together = reader.read(ROWS)
    assert together.states.shape == (40, 3, 16)
    assert together.rows == ROWS
    for at in (0, 4, 39):
        alone = reader.read([ROWS[at]])
        assert together.states[at] == pytest.approx(alone.states[0], abs=1e-5)
        assert together.log_odds is not None and alone.log_odds is not None
        assert together.log_odds[at] == pytest.approx(alone.log_odds[0], abs=1e-5)


def test_log_odds_are_those_of_the_last_layers_state() -> None:
    model = network()
    tokenizer = byte_tokenizer(SPARE)
    template = verdict_template(tokenizer, marks=True)
    read = reader_of(model, template).read(ROWS)
    ids = Codec(tokenizer, template, [END], 200, Settings(), Calibration()).verdict_ids
    assert ids is not None and read.log_odds is not None
    logits = read.states[:, -1] @ model.lm_head.weight.detach().numpy().T
    keep, edit, rewrite = (logits[:, token] for token in ids)
    assert read.log_odds == pytest.approx(np.logaddexp(edit, rewrite) - keep, abs=1e-5)


def test_the_last_tokens_end_where_the_row_was_read() -> None:
    reader = reader_of(network())
    last = reader.read_last(ROWS[4], 8)
    assert last is not None
    assert last.states.shape == (8, 3, 16)
    assert last.states[-1] == pytest.approx(reader.read([ROWS[4]]).states[0], abs=1e-5)
    assert "".join(last.tokens) == "rection\n"


def test_a_row_that_does_not_fit_is_left_out_and_counted() -> None:
    long = LabelledRow(question="Why?", answer="x" * 500, kind="bad")
    read = reader_of(network()).read([ROWS[0], long, ROWS[1]])
    assert (read.rows, read.left_out, len(read.states)) == ([ROWS[0], ROWS[1]], 1, 2)
    assert reader_of(network()).read_last(long, 4) is None
    assert reader_of(network()).read([long]).rows == []


# --- the command


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint that gives verdicts."""
    folder = tmp_path_factory.mktemp("checkpoint")
    network().save_pretrained(folder)
    (folder / "tokenizer.json").write_text(tokenizer_json(SPARE))
    template = verdict_template(byte_tokenizer(SPARE), marks=True).model_dump()
    recipe = {"config": {"base": "tests"}, "template": template, "base": {"source": "tests", "sha256": {}}}
    (folder / "training.json").write_text(json.dumps(recipe))
    return folder


def rows_file(path: Path, count: int = 120, answers: tuple[str, str] = ("fine", "awful!")) -> Path:
    lines = [
        {"question": f"Question {n}?", "answer": answers[n % 2], "kind": ("keep", "bad")[n % 2]} for n in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["probe", *map(str, arguments)])


def test_the_command_splits_the_rows_reports_each_layer_and_writes_the_direction(
    tmp_path: Path, checkpoint: Path
) -> None:
    rows = rows_file(tmp_path / "rows.jsonl")
    outcome = run(rows, "--model", checkpoint, "--out", tmp_path / "probe.json", "--json")
    assert outcome.exit_code == 0, outcome.output
    told, written = json.loads(outcome.stdout), json.loads((tmp_path / "probe.json").read_text())
    direction = written.pop("direction")
    assert np.linalg.norm(direction) == pytest.approx(1)
    assert told == {"model": str(checkpoint), "left_out": 0} | written
    (test,) = told["tests"]
    assert told["good"] + told["bad"] + test["good"] + test["bad"] == 120
    assert len(test["layers"]) == 3
    assert test["layers"][0]["value"] > 0.9  # the answers differ in every token, which even random weights tell
    assert test["gain"]["value"] == pytest.approx(test["layers"][told["layer"] - 1]["value"] - test["verdict"]["value"])


def test_the_command_tests_on_other_rows_and_draws(tmp_path: Path, checkpoint: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = rows_file(tmp_path / "rows.jsonl")
    others = [rows_file(tmp_path / "others.jsonl", 60), rows_file(tmp_path / "same.jsonl", 60, ("same", "same"))]
    tests = [argument for path in others for argument in ("--test", path)]
    outcome = run(rows, "-m", checkpoint, *tests, "--plots", tmp_path)
    assert outcome.exit_code == 0, outcome.output
    for name in ("layers.png", "scan.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert "found on 60 good and 60 bad answers" in outcome.stdout
    assert f"{others[0]}, 30 good and 30 bad answers: the decision sits from layer 1 of 3 on" in outcome.stdout
    assert outcome.stdout.count("the verdict, whose threshold stays the dial") >= 1
    assert outcome.stdout.count("AUC less the verdict's") == 2


def test_an_aligner_without_verdicts_has_directions_and_no_verdict_to_compare_with(
    tmp_path: Path, checkpoint: Path
) -> None:
    folder = tmp_path / "plain"
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("training.json"))
    outcome = run(rows_file(tmp_path / "rows.jsonl"), "-m", folder)
    assert outcome.exit_code == 0, outcome.output
    assert "the decision sits from layer" in outcome.stdout
    assert "verdict" not in outcome.stdout


def test_rows_that_directions_are_found_on_are_no_test(tmp_path: Path, checkpoint: Path) -> None:
    rows = rows_file(tmp_path / "rows.jsonl")
    outcome = run(rows, "-m", checkpoint, "--test", rows)
    assert outcome.exit_code == 2
    assert "name other rows" in outcome.stderr


@pytest.mark.parametrize("count", [2, 60])
def test_too_few_rows_end_in_one_line(tmp_path: Path, checkpoint: Path, count: int) -> None:
    outcome = run(rows_file(tmp_path / "rows.jsonl", count), "-m", checkpoint)
    assert outcome.exit_code == 1
    assert outcome.stderr.splitlines()[-1].endswith("at least 20 of each are needed: add rows")


def test_an_exported_folder_has_no_hidden_states(tmp_path: Path) -> None:
    folder = artifact_folder(tmp_path / "exported")
    assert (folder / MODEL_FILE).exists()
    outcome = run(rows_file(tmp_path / "rows.jsonl"), "-m", folder)
    assert outcome.exit_code == 1
    assert "is an exported folder" in outcome.stderr


def test_an_interruption_is_told_in_one_line(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(StateReader, "_run", interrupted)
    outcome = run(rows_file(tmp_path / "rows.jsonl"), "-m", checkpoint)
    assert (outcome.exit_code, outcome.stderr.splitlines()) == (130, ["interrupted"])
