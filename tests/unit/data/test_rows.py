"""Rows that are not as expected: an error that names line and key, whoever reads them, and never the word "None"."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aligner_middleware import DataError
from aligner_middleware.data.json_lines import finite
from aligner_middleware.data.prompts import read_prompts
from aligner_middleware.data.triples import read_rows
from aligner_middleware.evaluation.labelled_rows import is_labelled, read_labelled
from aligner_middleware.evaluation.public_sets import read_public

DEEP = "[" * 100_000


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def pair(answer: Any = "a") -> dict[str, Any]:
    return {"question": "q", "answer": answer}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (pair(answer=None) | {"correction": "c"}, "answer"),
        ({"prompt": "p", "chosen": None, "rejected": "r"}, "chosen is null"),
        ({"prompt": "p", "chosen": "c", "rejected": 3}, "rejected is 3"),
        ({"prompt": [{"role": "user", "content": None}], "chosen": "c", "rejected": "r"}, "content is null"),
        ({"prompt": [{"role": "user", "content": ["x"]}], "chosen": "c", "rejected": "r"}, "content is a list"),
        ({"chosen": None, "rejected": "Human: a"}, "chosen is null"),
        ({"prompt": "p", "response": "r", "is_safe": "false"}, "is_safe is 'false'"),
        ({"prompt": "p", "response": None, "is_safe": True}, "Input should be a valid string"),
        (
            {
                "prompt": "p",
                "response_0": "a",
                "response_1": "b",
                "is_response_0_safe": True,
                "is_response_1_safe": True,
            }
            | {"better_response_id": 5},
            "better_response_id is 5",
        ),
        pytest.param(DEEP, "nested too deeply", id="deep"),
    ],
)
def test_a_training_row_that_holds_no_text_is_an_error_and_never_the_word_none(
    tmp_path: Path, row: Any, reason: str
) -> None:
    path = jsonl(tmp_path / "rows.jsonl", pair() | {"correction": "c"}, row)
    with pytest.raises(DataError, match=r"rows\.jsonl:2: ") as error:
        read_rows(path)
    assert reason in str(error.value)


def test_a_training_row_without_a_label_is_left_out(tmp_path: Path) -> None:
    known = {"prompt": "p", "response": "r", "is_safe": True}
    rows = read_rows(jsonl(tmp_path / "rows.jsonl", known, known | {"is_safe": None}, known | {"is_safe": 1}))
    assert [(line, reason) for line, reason in rows.left_out] == [(2, "is_safe is null")]
    assert len(rows.triples) == 2


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({"question": None}, "question is null"),
        ({"category": "c"}, "question is missing"),
        ({"question": "q", "answer": 3}, "answer is 3"),
        ({"question": [{"role": "user", "content": None}]}, "content is null"),
        ({"question": ""}, "question: String should have at least 1 character"),
        pytest.param('{"a": ' + DEEP, "nested too deeply", id="deep"),
    ],
)
def test_a_prompt_that_holds_no_text_is_an_error_in_one_line(tmp_path: Path, line: Any, reason: str) -> None:
    with pytest.raises(DataError, match=r"prompts:2: ") as error:
        read_prompts(jsonl(tmp_path / "prompts", "What is snow?", line))
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_null_in_a_prompt_is_as_good_as_nothing(tmp_path: Path) -> None:
    rows = ({"question": None, "prompt": "p", "answer": None, "response": "r"}, pair(answer=None) | {"category": None})
    first, second = read_prompts(jsonl(tmp_path / "prompts", *rows))
    assert (first.question, first.answer) == ("p", "r")
    assert (second.question, second.answer, second.category) == ("q", None, "")


@pytest.mark.parametrize("reader", [read_labelled, read_public])
def test_deep_json_is_an_error_that_names_the_line(tmp_path: Path, reader: Callable[[Path], Any]) -> None:
    path = jsonl(tmp_path / "rows.jsonl", '{"prompt": "p", "response": "r", "category": {}, "is_safe": true}', DEEP)
    if reader is read_labelled:
        path = jsonl(path, pair() | {"kind": "keep"}, DEEP)
        assert is_labelled(jsonl(tmp_path / "other.jsonl", DEEP, pair() | {"kind": "keep"}))
    with pytest.raises(DataError, match=r"rows\.jsonl:2: "):
        reader(path)


def test_what_is_no_number_is_null() -> None:
    assert finite({"a": (math.nan, [math.inf], 1.5)}) == {"a": [None, [None], 1.5]}


def test_a_row_may_say_how_it_is_to_be_corrected(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path / "rows.jsonl",
        pair() | {"correction": "c", "instruction": " formal "},
        pair() | {"kind": "bad", "better": "b", "instruction": "formal"},
        pair() | {"correction": "c", "instruction": None},
        pair() | {"correction": "c", "instruction": ""},
        {"prompt": "p", "chosen": "c", "rejected": "r", "instruction": "Write a poem."},  # here it names the question
    )
    assert [row.instruction for row in read_rows(path).triples] == ["formal", "formal", None, None, None]
    with_identity = read_rows(path).triples[0].corrected()
    assert (with_identity.answer, with_identity.instruction, with_identity.keeps) == ("c", "formal", True)


@pytest.mark.parametrize("instruction", [3, ["formal"], "x" * 2001, "\ud800"])
def test_an_instruction_that_is_no_text_or_too_long_is_an_error(tmp_path: Path, instruction: Any) -> None:
    path = jsonl(tmp_path / "rows.jsonl", pair() | {"correction": "c", "instruction": instruction})
    with pytest.raises(DataError, match=r"rows\.jsonl:1: (instruction: |holds a lone surrogate)"):
        read_rows(path)


def test_the_examples_rows_teach_each_instruction_to_change_answers_and_to_keep_them() -> None:
    folder = Path(__file__).parents[3] / "examples" / "instructions"
    rows, held_out = (read_rows(folder / name).triples for name in ("train.jsonl", "held_out.jsonl"))
    told = {"more empathic", "plain English, short", "no medical advice", "formal"}
    for some in (rows, held_out):
        assert {(row.instruction, row.keeps) for row in some if row.instruction} == {
            (instruction, keeps) for instruction in told for keeps in (True, False)
        }
    assert all(row.keeps for row in rows if row.instruction is None)  # good answers, as long as nobody asks for another
    assert not {row.question for row in rows} & {row.question for row in held_out}
