"""The rows that the default aligner is trained and scored on."""

import json
import re

import pytest

from aligner_middleware.artifact import DEFAULT_FOLDER


def rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (DEFAULT_FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


@pytest.mark.parametrize("name", ["corrections", "held_out", "not_yet_trained"])
def test_a_row_is_kept_exactly_if_it_says_so(name: str) -> None:
    for row in rows(name):
        assert row["kind"] == ("keep" if row["answer"] == row["correction"] else "correct"), row["question"]
        assert row["category"]


@pytest.mark.parametrize("name", ["corrections", "not_yet_trained"])
def test_no_held_out_question_is_trained_on(name: str) -> None:
    held_out = {words(row["question"]) for row in rows("held_out")}
    assert not held_out & {words(row["question"]) for row in rows(name)}


@pytest.mark.parametrize("name", ["corrections", "held_out", "not_yet_trained"])
def test_no_row_stands_twice(name: str) -> None:
    pairs = [(words(row["question"]), words(row["answer"])) for row in rows(name) if words(row["question"])]
    assert len(pairs) == len(set(pairs))
