"""From evidence to probabilities and thresholds: laws of the fit and of the shares, and what the command writes."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from aligner_middleware import Aligner
from aligner_middleware.artifact import ARTIFACT_FILE, MODEL_FILE, TOKENIZER_FILE, Artifact
from aligner_middleware.calibration import Calibration
from aligner_middleware.cli.app import app
from aligner_middleware.data.progress import Progress
from aligner_middleware.errors import InputError, JobError
from aligner_middleware.evaluation.calibration import (
    KEPT,
    MeasuredRow,
    calibrate,
    fit,
    measure,
    row_weights,
    save_calibration,
    sigmoid,
    thresholds,
)
from aligner_middleware.evaluation.calibration_plot import draw_calibration
from aligner_middleware.evaluation.labelled_rows import LabelledRow
from tests.fakes import artifact_folder

EVIDENCE = st.floats(-30, 30, allow_subnormal=False)


def row(kind: str, evidence: float = 0.0, source: str = "") -> LabelledRow:
    return LabelledRow(question="Why?", answer=f"said {evidence}", kind=kind, source=source)


def rows_of(good: list[float], bad: list[float], refusals: list[float] | None = None) -> list[MeasuredRow]:
    kinds = [("keep", good), ("refusal", refusals or []), ("bad", bad)]
    return [MeasuredRow(row(kind, value), value) for kind, values in kinds for value in values]


def drawn(count: int = 400, seed: int = 0, shift: float = 2.0) -> list[MeasuredRow]:
    """Rows whose true log odds, with classes of one size, are shift * evidence."""
    rng = np.random.default_rng(seed)
    good, bad = rng.normal(-shift / 2, 1, count), rng.normal(shift / 2, 1, count // 2)
    return rows_of(good.tolist(), bad.tolist())


class SayingAligner:
    """Its evidence is the answer's last word."""

    has_verdicts = True

    def __enter__(self) -> "SayingAligner":
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def evidence(self, question: str, answer: str, instruction: str | None = None) -> float:
        if answer.startswith("endless"):
            raise InputError("too long")
        return float(answer.split()[-1])


@given(
    st.lists(EVIDENCE, min_size=50, max_size=120),
    st.lists(EVIDENCE, min_size=20, max_size=60),
    st.lists(EVIDENCE, max_size=40),
    st.booleans(),
)
@settings(max_examples=25)
def test_thresholds_keep_what_they_promise_and_are_ordered(
    good: list[float], bad: list[float], refusals: list[float], verdicts: bool
) -> None:
    try:
        report = calibrate(rows_of(good, bad, refusals), verdicts=verdicts)
    except JobError:
        assume(False)
    found = report.calibration.levels if verdicts else report.calibration.tolerances
    assert found["low"] >= found["medium"] >= found["high"]
    for level, share in KEPT.items():
        assert report.levels[level].kept.share >= share
        assert report.levels[level].threshold == found[level]
    changed = [report.levels[level].changed.share for level in KEPT]
    assert changed == sorted(changed)


@given(st.integers(0, 5), st.booleans())
def test_a_threshold_lies_between_scores(seed: int, verdicts: bool) -> None:
    measured = drawn(seed=seed)
    report = calibrate(measured, verdicts=verdicts)
    calibration = report.calibration
    evidence = np.array([one.evidence for one in measured])
    scores = sigmoid(calibration.scale * evidence + calibration.bias) if verdicts else evidence
    for level in report.levels.values():
        assert np.abs(scores - level.threshold).min() > 0
        assert level.kept.rows + level.changed.rows == len(measured)


def test_the_fit_finds_the_true_odds() -> None:
    report = calibrate(drawn(4000), verdicts=True)
    assert report.calibration.scale == pytest.approx(2, rel=0.1)
    assert report.calibration.bias == pytest.approx(0, abs=0.1)
    assert report.error < 0.02
    assert report.auc.low < 0.9214 < report.auc.high  # Φ(2 / √2)
    assert (report.good, report.bad, report.calibration.rows) == (4000, 2000, 6000)


def test_without_balance_the_odds_are_those_of_the_rows() -> None:
    balanced, plain = (calibrate(drawn(4000), verdicts=True, balance=balance).calibration for balance in (True, False))
    assert plain.bias - balanced.bias == pytest.approx(math.log(1 / 2), abs=0.1)


@given(st.floats(0.3, 3), st.floats(-5, 5))
def test_probabilities_do_not_depend_on_how_evidence_is_scaled(scale: float, bias: float) -> None:
    evidence = np.array([one.evidence for one in drawn(100)])
    unsafe = np.arange(150) >= 100
    weights = np.ones(150)
    first, other = fit(evidence, unsafe, weights), fit(scale * evidence + bias, unsafe, weights)
    one = sigmoid(first[0] * evidence + first[1])
    assert sigmoid(other[0] * (scale * evidence + bias) + other[1]) == pytest.approx(one, abs=5e-3)


def test_the_fit_stays_finite_where_classes_never_overlap() -> None:
    scale, bias = fit(np.array([-900.0] * 50 + [0.1] * 20), np.arange(70) >= 50, np.ones(70))
    assert 0 < scale < 1e4 and math.isfinite(bias)


def test_sources_count_the_same_within_their_class() -> None:
    rows = [row("keep", source="large")] * 90 + [row("refusal", source="small")] * 10 + [row("bad", source="one")] * 20
    weights = row_weights(rows, balance=True)
    assert [weights[:90].sum(), weights[90:100].sum(), weights[100:].sum()] == pytest.approx([30, 30, 60])
    weights = row_weights(rows, balance=False)
    assert [weights[:90].sum(), weights[90:100].sum(), weights[100:].sum()] == pytest.approx([50, 50, 20])


def found_for(refusals: list[float], bad: list[float]) -> dict[Any, float]:
    measured = rows_of(list(range(-2000, 0)), bad, refusals)
    kinds = np.array([one.row.kind for one in measured])
    return thresholds(np.array([one.evidence for one in measured], np.float64), kinds == "bad")


def test_a_threshold_is_raised_to_the_first_bad_answer_that_it_may_not_give_up() -> None:
    found = found_for([5.0] * 4, [10.0] * 50)
    assert found["low"] == found["medium"] == found["high"] == 7.5
    found = found_for([5.0] * 4, [6.0] * 7 + [7.0] * 3 + [10.0] * 40)  # ten, seven and two of 50 may go
    assert found == {"low": 8.5, "medium": 6.5, "high": 5.5}


def test_refusals_are_not_kept_at_any_price() -> None:
    found = found_for([5.0] * 4, [4.0] * 25 + [10.0] * 25)
    assert found["medium"] < 4
    measured = rows_of(list(range(-2000, 0)), [4.0] * 25 + [10.0] * 25, [-1.0, -1.0])
    assert not calibrate(measured, verdicts=False).refusals_given_up
    measured = rows_of(list(range(-2000, 0)), [4.0] * 25 + [10.0] * 25, [5.0] * 4)
    assert calibrate(measured, verdicts=False).refusals_given_up


@pytest.mark.parametrize(("good", "bad"), [(49, 20), (50, 19)])
def test_too_few_rows_are_refused(good: int, bad: int) -> None:
    with pytest.raises(JobError, match=f"mine: holds {good} good and {bad} bad"):
        calibrate(rows_of([0.0] * good, [1.0] * bad), verdicts=True, name="mine")


def test_labels_that_the_evidence_contradicts_are_refused() -> None:
    with pytest.raises(JobError, match="check the labels"):
        calibrate([MeasuredRow(one.row, -one.evidence) for one in drawn(100)], verdicts=True)


def test_rows_that_do_not_fit_are_left_out() -> None:
    rows = [row("keep", 1.5), LabelledRow(question="q", answer="endless", kind="bad"), row("bad", 2)]
    seen: list[Progress] = []
    measured = measure(cast(Aligner, SayingAligner()), rows, seen.append)
    assert [one.evidence for one in measured] == [1.5, 2]
    assert seen == [Progress("calibrate", done, 3) for done in (1, 2, 3)]


@pytest.mark.parametrize("verdicts", [True, False])
def test_a_calibration_is_read_from_its_folder_again(tmp_path: Path, verdicts: bool) -> None:
    folder = artifact_folder(tmp_path / "aligner")
    before = Artifact.load(folder)
    calibration = calibrate(drawn(), verdicts=verdicts).calibration
    save_calibration(calibration, folder)
    assert Artifact.load(folder) == before.model_copy(update={"calibration": calibration})
    assert {path.name for path in folder.iterdir()} == {ARTIFACT_FILE, MODEL_FILE, TOKENIZER_FILE}


def test_the_aligners_own_scores_agree_with_the_thresholds() -> None:
    measured = drawn(seed=3)
    report = calibrate(measured, verdicts=True)
    for level, threshold in report.calibration.levels.items():
        changed = [report.calibration.score(one.evidence) > threshold for one in measured if one.row.unsafe]
        assert sum(changed) == report.levels[level].changed.hits


def test_the_plots_are_drawn(tmp_path: Path) -> None:
    for verdicts, names in ((True, {"roc.png", "reliability.png"}), (False, {"roc.png"})):
        folder = tmp_path / str(verdicts)
        draw_calibration(drawn(), calibrate(drawn(), verdicts=verdicts), folder)
        assert {path.name for path in folder.iterdir()} == names


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.setattr(Aligner, "load", lambda *args, **options: SayingAligner())

    def invoke(*arguments: Any) -> Any:
        return CliRunner().invoke(app, ["calibrate", *map(str, arguments)])

    return invoke


def write(path: Path, measured: list[MeasuredRow]) -> Path:
    path.write_text("".join(one.row.model_dump_json() + "\n" for one in measured))
    return path


def test_the_command_writes_the_calibration_and_says_what_it_does(run: Callable[..., Any], tmp_path: Path) -> None:
    folder, out, plots = artifact_folder(tmp_path / "aligner"), tmp_path / "calibration.json", tmp_path / "plots"
    measured = drawn()
    first, second = write(tmp_path / "a.jsonl", measured[:300]), write(tmp_path / "b.jsonl", measured[300:])
    outcome = run(first, second, "--model", folder, "--out", out, "--plots", plots)
    assert outcome.exit_code == 0, outcome.output
    assert "never trained on" in outcome.stderr
    assert "400 good answers, 200 bad ones" in outcome.stdout
    written = Artifact.load(folder).calibration
    assert written is not None and written.rows == 600
    assert json.loads(out.read_text()) == written.model_dump()
    assert (plots / "roc.png").is_file() and (plots / "reliability.png").is_file()
    summary = json.loads(run(first, second, "--model", folder, "--json").stdout)
    assert summary["calibration"] == written.model_dump()
    assert summary["levels"]["low"]["kept"]["share"] >= 0.99
    assert 0 <= summary["error"] < 0.1


def test_the_command_refuses_too_few_rows_before_it_loads_anything(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Aligner, "load", lambda *args, **options: pytest.fail("loaded"))
    outcome = run(write(tmp_path / "a.jsonl", drawn(20)))
    assert outcome.exit_code == 1
    assert "20 good and 10 bad" in outcome.stderr


def test_the_command_does_without_verdicts(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(SayingAligner, "has_verdicts", False)
    folder = artifact_folder(tmp_path / "aligner")
    outcome = run(write(tmp_path / "a.jsonl", drawn()), "--model", folder, "--json")
    assert outcome.exit_code == 0, outcome.output
    summary = json.loads(outcome.stdout)
    assert (summary["error"], summary["bins"]) == (None, [])
    thresholds = {level: scores["threshold"] for level, scores in summary["levels"].items()}
    assert summary["calibration"] == Calibration(tolerances=thresholds, rows=600).model_dump()


def test_what_is_promised_is_kept_in_each_file_with_enough_good_answers() -> None:
    rng = np.random.default_rng(3)
    easy = rows_of(rng.normal(-4, 1, 900).tolist(), rng.normal(4, 1, 200).tolist())
    hard = [replace(one, file="hard") for one in rows_of(rng.normal(0, 1, 60).tolist(), [])]
    few = [replace(one, file="few") for one in rows_of([20.0] * 10, [])]
    report = calibrate([*easy, *hard, *few], verdicts=True)
    for level, share in KEPT.items():
        calibration = report.calibration
        scores = [calibration.score(one.evidence) for one in hard]
        assert np.mean(np.array(scores) <= calibration.levels[level]) >= share
    assert report.calibration.levels["high"] < calibration.score(20.0)  # ten answers promise nothing
