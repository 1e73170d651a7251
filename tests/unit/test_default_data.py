"""The rows that the default aligner is trained and scored on."""

import json
import re
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from aligner_middleware.locations import DEFAULT_FOLDER

TRAINED, HELD_OUT = (DEFAULT_FOLDER / f"{name}.jsonl" for name in ("corrections", "held_out"))
CATEGORIES = {
    "keep": {
        "code", "contact", "creative", "crime history", "explanation", "fiction", "firm but kind", "good advice", "letter",
        "list", "long answer", "markup", "maths", "medicine", "other language", "privacy", "quote", "refusal",
        "safe but scary", "security", "short answer", "small talk", "table", "translation",
    },
    "correct": {
        "child safety", "cybercrime", "dangerous financial claim", "dangerous legal claim", "dangerous medical claim",
        "dangerous tip", "disinformation", "drugs", "empty answer", "false certainty", "false premise", "fraud", "harassment",
        "hate", "illegal advice", "insult", "one bad sentence", "over-refusal", "privacy", "self-harm", "sexual content",
        "violence", "weapons",
    },
}  # fmt: skip


def read_lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def trigrams(row: dict[str, str]) -> set[tuple[str, ...]]:
    found = words(f"{row['question']} {row['answer']}")
    return set(zip(found, found[1:], found[2:], strict=False))


def test_there_are_enough_rows() -> None:
    assert len(read_lines(TRAINED)) >= 2000
    assert len(read_lines(HELD_OUT)) >= 300


@pytest.mark.parametrize("path", [TRAINED, HELD_OUT])
def test_a_row_is_what_its_kind_and_category_say(path: Path) -> None:
    for row in read_lines(path):
        assert row["kind"] == ("keep" if row["answer"] == row["correction"] else "correct"), row["question"]
        assert row["category"] in CATEGORIES[row["kind"]], row["question"]
        assert row["source"] in {"written", "composed", "chat model"}


def test_every_category_is_trained_on() -> None:
    for kind, categories in CATEGORIES.items():
        assert {row["category"] for row in read_lines(TRAINED) if row["kind"] == kind} == categories


def test_a_composed_row_only_adds_to_a_good_answer() -> None:
    good = {(row["question"], row["answer"]) for row in read_lines(TRAINED) if row["kind"] == "keep"}
    for row in read_lines(TRAINED):
        if row["source"] == "composed":
            assert (row["question"], row["correction"]) in good
            assert len(row["answer"]) > len(row["correction"])


def test_no_held_out_row_is_close_to_one_trained_on() -> None:
    """By shared three-word runs of question and answer, intersection over union."""
    trained = [trigrams(row) for row in read_lines(TRAINED)]
    holders = defaultdict(list)
    for place, found in enumerate(trained):
        for trigram in found:
            holders[trigram].append(place)
    for row in read_lines(HELD_OUT):
        mine = trigrams(row)
        shared = Counter(place for trigram in mine for place in holders[trigram])
        assert all(count <= 0.3 * len(mine | trained[place]) for place, count in shared.items()), row["question"]


@pytest.mark.parametrize("path", [TRAINED, HELD_OUT])
def test_no_row_stands_twice(path: Path) -> None:
    pairs = [
        (*words(row["question"]), "|", *words(row["answer"])) for row in read_lines(path) if words(row["question"])
    ]
    assert len(pairs) == len(set(pairs))
