"""An aligner as a guard: areas and intervals by hand and by law, labelled rows, and what is asked of the aligner."""

import gzip
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from aligner_middleware import Aligner, Correction, Usage
from aligner_middleware.cli.app import app
from aligner_middleware.errors import DataError, InputError, JobError
from aligner_middleware.evaluation.detection import (
    Auc,
    Detection,
    Share,
    calibration_error,
    reliability,
    roc_curve,
    wilson,
)
from aligner_middleware.evaluation.guard import guard
from aligner_middleware.evaluation.labelled_rows import LabelledRow, is_labelled, read_labelled
from aligner_middleware.strength import LEVELS
from aligner_middleware.text.template import Verdict

THRESHOLDS = {"low": 0.9, "medium": 0.5, "high": 0.1}
SCORED = st.lists(st.tuples(st.integers(-5, 5), st.booleans()), min_size=2).filter(
    lambda rows: len({unsafe for _, unsafe in rows}) == 2
)


def score_of(answer: str) -> float:
    """An answer says its score: `… 0.7`."""
    return float(answer.split()[-1])


class ScoringAligner:
    """Changes an answer whose score is above the strength's threshold; counts what it was asked."""

    has_verdicts = True
    precision = "int8"

    def __init__(self) -> None:
        self.asked: list[tuple[Any, str]] = []

    def __enter__(self) -> "ScoringAligner":
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def correct_batch(
        self, pairs: Any, *, strength: Any = None, return_exceptions: bool = False, **told: Any
    ) -> list[Any]:
        found: list[Any] = []
        for question, answer in pairs:
            self.asked.append((strength, answer))
            if answer.startswith("endless"):
                assert return_exceptions
                found.append(InputError("too long"))
                continue
            score = score_of(answer)
            flagged = score > THRESHOLDS.get(strength, strength)
            doubts = ("loops",) if flagged and answer.startswith("doubtful") else ()
            corrected = "No." if flagged and not doubts else answer
            verdict: Verdict = "rewrite" if flagged else "keep"
            found.append(
                Correction(question, answer, corrected, "stop", Usage(), verdict=verdict, score=score, doubts=doubts)
            )
        return found


class SurprisedAligner(ScoringAligner):
    """One without verdicts."""

    has_verdicts = False

    def correct_batch(self, pairs: Any, **options: Any) -> list[Any]:
        made = super().correct_batch(pairs, **options)
        return [replace(one, verdict=None, score=None) if isinstance(one, Correction) else one for one in made]

    def evidence(self, question: str, answer: str, instruction: str | None = None) -> float:
        return 10 * score_of(answer)


def row(score: float, kind: str = "keep", start: str = "said", **more: str) -> LabelledRow:
    return LabelledRow(question="Why?", answer=f"{start} {score}", kind=kind, **more)


def area_of(scores: Any, unsafe: Any) -> float:
    return Auc.of(scores, unsafe, draws=1).value


def test_the_area_is_that_of_counting_pairs() -> None:
    assert area_of([1, 2, 3, 4], [False, False, True, True]) == 1
    assert area_of([1, 3, 2, 4], [False, False, True, True]) == 3 / 4
    assert area_of([1, 1], [False, True]) == 1 / 2
    assert area_of([1, 2, 2], [False, False, True]) == (1 + 1 / 2) / 2
    assert math.isnan(area_of([1, 2], [True, True]))


@given(SCORED)
def test_the_area_asks_for_the_order_alone(rows: list[tuple[int, bool]]) -> None:
    scores, unsafe = np.array([score for score, _ in rows]), [bad for _, bad in rows]
    area = area_of(scores, unsafe)
    assert area_of(np.exp(scores) * 3 - 1, unsafe) == area
    assert area_of(-scores, unsafe) == pytest.approx(1 - area)
    assert area_of(scores, [not bad for bad in unsafe]) == pytest.approx(1 - area)


@given(SCORED)
def test_the_curve_rises_from_nothing_to_everything_and_has_the_area(rows: list[tuple[int, bool]]) -> None:
    scores, unsafe = [score for score, _ in rows], [bad for _, bad in rows]
    good, bad = roc_curve(scores, unsafe)
    assert (good[0], bad[0], good[-1], bad[-1]) == (0, 0, 1, 1)
    assert (np.diff(good) >= 0).all() and (np.diff(bad) >= 0).all()
    assert np.trapezoid(bad, good) == pytest.approx(area_of(scores, unsafe))


def test_the_area_has_an_interval_around_it() -> None:
    rng = np.random.default_rng(0)
    unsafe = np.arange(200) < 80
    scores = rng.normal(unsafe)
    auc = Auc.of(scores, unsafe)
    assert 0.6 < auc.low < auc.value < auc.high < 0.9
    assert auc == Auc.of(scores, unsafe)
    sure = Auc.of(unsafe, unsafe)
    assert (sure.low, sure.value, sure.high) == (1, 1, 1)


def test_intervals_are_wilsons() -> None:
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert math.isnan(wilson(0, 0)[0])
    share = Share.count([True, True, False, True])
    assert (share.hits, share.rows, share.share) == (3, 4, 0.75)
    assert math.isnan(Share.count([]).share)


@given(st.integers(0, 50), st.integers(1, 50))
def test_an_interval_holds_its_share(hits: int, rows: int) -> None:
    low, high = wilson(min(hits, rows), rows)
    assert 0 <= low <= min(hits, rows) / rows <= high <= 1


def test_flags_are_scored_against_labels() -> None:
    found = Detection.of([True, True, False, False, True], [True, False, True, False, True])
    assert (found.precision, found.recall, found.f1) == pytest.approx((2 / 3, 2 / 3, 2 / 3))
    none = Detection.of([False, False], [True, False])
    assert math.isnan(none.precision)
    assert (none.recall, none.f1) == (0, 0)


def test_probabilities_are_compared_with_what_is_true() -> None:
    bins = reliability([0.1, 0.1, 0.9, 0.9, 1.0], [False, True, True, True, True], bins=2)
    assert [one.rows for one in bins] == [2, 3]
    assert [one.observed for one in bins] == [0.5, 1]
    assert calibration_error(bins) == pytest.approx(0.4 * 0.4 + 0.6 * (1 - 2.8 / 3))
    weighted = reliability([0.2, 0.2], [False, True], [3, 1], bins=1)[0]
    assert (weighted.observed, weighted.predicted) == pytest.approx((0.25, 0.2))


def write(path: Path, *rows: Any) -> Path:
    text = "".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


GOOD = {"question": "Why?", "answer": "So.", "kind": "keep", "source": None}


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_labelled_rows_are_read(tmp_path: Path, name: str) -> None:
    held_out = {"question": "q", "answer": "a", "kind": "correct", "correction": "b", "category": "c", "source": "s"}
    rows = read_labelled(write(tmp_path / name, GOOD, held_out, {**GOOD, "kind": "refusal"}), source="file")
    assert [one.kind for one in rows] == ["keep", "bad", "refusal"]
    assert [one.unsafe for one in rows] == [False, True, False]
    assert [one.group for one in rows] == ["file", "s", "file"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "is not JSON"),
        ("[1]", "is not a JSON object"),
        ({**GOOD, "kind": "good"}, "kind: "),
        ({**GOOD, "answer": " "}, "answer: .*blank"),
        ({"question": "q", "kind": "keep"}, "answer: "),
        ('{"question": "q", "answer": "\\ud800", "kind": "keep"}', "holds a lone surrogate"),
    ],
)
def test_a_line_that_is_no_labelled_row_is_named(tmp_path: Path, line: Any, reason: str) -> None:
    path = write(tmp_path / "rows.jsonl", GOOD, "", line)
    with pytest.raises(DataError, match=rf"rows\.jsonl:3: {reason}"):
        read_labelled(path)


def test_an_empty_file_has_no_labelled_rows(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"rows\.jsonl: is empty"):
        read_labelled(write(tmp_path / "rows.jsonl"))


def test_labelled_rows_are_told_from_corrections(tmp_path: Path) -> None:
    correction = {"question": "q", "answer": "a", "correction": "b"}
    assert is_labelled(write(tmp_path / "one", "{", GOOD))
    assert not is_labelled(write(tmp_path / "two", correction, {**correction, "kind": "keep"}))


@pytest.mark.parametrize(
    ("words", "band"),
    [(50, "1 to 50 words"), (51, "51 to 200 words"), (200, "51 to 200 words"), (201, "over 200 words")],
)
def test_answers_are_banded_by_their_words(words: int, band: str) -> None:
    assert LabelledRow(question="q", answer="word " * words, kind="keep").length == band


ROWS = [
    row(0.05, source="a"),
    row(0.3, source="a"),
    row(0.95, "refusal", source="b"),
    row(0.95, "bad", source="b"),
    row(0.6, "bad", category="c"),
    row(0.6, "bad", "doubtful"),
    row(0.5, "keep", "endless"),
]


def test_answers_are_counted_by_kind_and_source_at_each_strength() -> None:
    found = guard(cast(Aligner, ScoringAligner()), ROWS)
    assert (len(found.rows), found.left_out) == (6, 1)
    kept = {
        strength: {kind: share.hits for (_, kind), share in found.kept(strength, lambda row: "").items()}
        for strength in LEVELS
    }
    assert kept == {
        "low": {"keep": 2, "refusal": 0, "bad": 2},
        "medium": {"keep": 2, "refusal": 0, "bad": 1},
        "high": {"keep": 1, "refusal": 0, "bad": 1},
    }
    assert [found.doubts(strength) for strength in LEVELS] == [{}, {"loops": 1}, {"loops": 1}]
    assert found.verdicts("low") == {"keep": 4, "rewrite": 2}
    medium = found.detection("medium")
    assert (medium.precision, medium.recall) == (2 / 3, 2 / 3)
    assert found.auc.value == pytest.approx((2 + 2 + 2 + 0.5) / 9)
    summary = found.summary()
    assert summary["strengths"]["low"]["by_source"]["b"]["refusal"]["changed"] == 1
    assert set(summary["strengths"]["low"]["by_source"]) == {"a", "b", "c", "unnamed"}
    json.dumps(summary)


def test_what_is_certain_is_not_asked_again() -> None:
    aligner = ScoringAligner()
    guard(cast(Aligner, aligner), ROWS[:4] + ROWS[4:5])
    asked = {strength: [answer for one, answer in aligner.asked if one == strength] for strength in LEVELS}
    assert len(asked["high"]) == 5
    assert asked["low"] == ["said 0.3", "said 0.95", "said 0.95", "said 0.6"]
    assert asked["medium"] == ["said 0.3", "said 0.6"]


@given(st.lists(st.floats(0, 1), max_size=40))
def test_leaving_out_what_is_certain_changes_nothing(scores: list[float]) -> None:
    rows = [row(score, "bad", "doubtful" if score > 0.7 else "said") for score in scores]
    for kind in (ScoringAligner, SurprisedAligner):
        found = guard(cast(Aligner, kind()), rows)
        for strength in LEVELS:
            alone = guard(cast(Aligner, kind()), rows, [strength])
            texts = [[one.corrections[strength].corrected for one in run.rows] for run in (found, alone)]
            assert texts[0] == texts[1]
            assert found.doubts(strength) == alone.doubts(strength)


def test_an_aligner_without_verdicts_is_scored_by_its_evidence() -> None:
    found = guard(cast(Aligner, SurprisedAligner()), ROWS, [0.55])
    assert [one.score for one in found.rows] == [0.5, 3, 9.5, 9.5, 6, 6]
    assert found.verdicts(0.55) == {}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.setattr(Aligner, "load", lambda *args, **options: ScoringAligner())

    def invoke(*arguments: Any) -> Any:
        return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])

    return invoke


def test_the_command_prints_and_writes_what_became_of_labelled_rows(run: Callable[..., Any], tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", *(one.model_dump() for one in ROWS))
    shown = run(data)
    assert shown.exit_code == 0, shown.output
    assert "medium: F1 66.7%; precision 66.7%; recall 66.7%" in shown.stdout
    assert "1 rows left out" in shown.stdout
    out = tmp_path / "out.jsonl"
    summary = json.loads(run(data, "--json", "--out", out).stdout)
    assert list(summary["strengths"]) == ["low", "medium", "high"]
    assert summary["left_out"] == 1
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["changed"] for line in lines] == [False, False, True, True, True, False]
    assert lines[5] | {"verdict": "rewrite", "doubts": ["loops"], "score": 0.6, "kind": "bad"} == lines[5]


@pytest.mark.parametrize(("strength", "key"), [("high", "high"), ("0.55", "0.55")])
def test_the_command_tries_one_strength(run: Callable[..., Any], tmp_path: Path, strength: str, key: str) -> None:
    data = write(tmp_path / "rows.jsonl", *(one.model_dump() for one in ROWS))
    assert list(json.loads(run(data, "--strength", strength, "--json").stdout)["strengths"]) == [key]


def test_the_command_refuses_what_is_no_strength(run: Callable[..., Any], tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", GOOD)
    assert run(data, "--strength", "nan").exit_code == 2
    assert run(data, "--strength", "max").exit_code == 2
