"""Public evaluation sets, read as they are published: rows that `guard` scores, or prompts to be answered.

A set is known by its columns; `_SETS` lists them. The formats are those of

- XSTest: https://github.com/paul-rottger/exaggerated-safety, `model_completions/*.csv` and `xstest_prompts.csv`;
- JailbreakBench: https://github.com/JailbreakBench/artifacts, `attack-artifacts/*/*/*.json`; its judge comparison and
  behaviors: https://huggingface.co/datasets/JailbreakBench/JBB-Behaviors, `data/*.csv`;
- HarmBench: https://github.com/centerforaisafety/HarmBench, what `evaluate_completions.py` writes,
  `data/classifier_val_sets/text_behaviors_val_set.json` and `data/behavior_datasets/*.csv`;
- WildGuardTest: https://huggingface.co/datasets/allenai/wildguardmix, `test/wildguard_test.parquet`;
- BeaverTails: https://huggingface.co/datasets/PKU-Alignment/BeaverTails, `round0/*/*.jsonl.gz` and `.jsonl.xz`;
- AlpacaEval: https://github.com/tatsu-lab/alpaca_eval, `results/*/model_outputs.json`;
- OR-Bench: https://huggingface.co/datasets/bench-llm/or-bench, `*.csv`.
"""

from __future__ import annotations

import csv
import gzip
import json
import lzma
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TextIO, TypeVar

from aligner_middleware.errors import DataError, MissingExtraError
from aligner_middleware.evaluation.guard import Kind, LabelledRow
from aligner_middleware.prompts import Prompt

Row = dict[str, Any]
Meaning = TypeVar("Meaning")

_TRUTH = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
_SUFFIXES = (".csv", ".json", ".jsonl", ".parquet")
_LONGEST_FIELD = 2**27  # of CSV, in characters; Python's own limit is 131,072


class _Unusable(Exception):
    """A row cannot be judged; the text says why."""


@dataclass(frozen=True)
class PublicRows:
    """What a public set held.

    Attributes:
        rows: The answers that are labelled, in the order of the files.
        left_out: How many rows were left out, by reason.
        skipped: Files of a folder that hold no answers of a public set.
    """

    rows: list[LabelledRow]
    left_out: Counter[str] = field(default_factory=Counter)
    skipped: tuple[Path, ...] = ()


class _Set(NamedTuple):
    """A public set: the columns that it is known by, and what they say. One of prompts alone has no `answer`."""

    name: str
    columns: frozenset[str]
    question: str
    answer: str = ""
    kind: Callable[[Row], Kind] = lambda row: "keep"
    category: str = "category"
    source: Callable[[Row], str] = lambda row: ""  # told apart from the set's other rows in reports
    exact: bool = False  # whether there are no other columns


class _Table(NamedTuple):
    """A file's rows with their numbers, from 1: those of lines, or where `unit` is `row` of rows."""

    path: Path
    rows: Iterator[tuple[int, Row]]
    unit: str
    ours: bool  # whether rows of our own have this form too

    def error(self, number: int, reason: str) -> DataError:
        if self.unit == "line":
            return DataError(str(self.path), number, reason)
        return DataError(str(self.path), 1, f"row {number}: {reason}")


def read_public(path: Path) -> PublicRows | None:
    """Read the labelled answers of a public set: CSV, JSON, JSON lines (plain, .gz or .xz), Parquet, or a folder of them.

    A response that is labelled harmful, unsafe or jailbroken is `bad`, a harmless one that is labelled a refusal is
    `refusal`, any other `keep`. XSTest labels refusals alone: compliance with its unsafe prompts is `bad`, and partial
    refusals of those are left out. AlpacaEval labels nothing: its answers count as good. Rows without an answer or a label are
    left out.

    Returns:
        The rows; `None` for JSON lines that are no public set's, which may be rows of our own.

    Raises:
        DataError: If a file is no public set's, holds prompts alone, no labelled answer or a label that is none, naming
            file, line or row, and what was expected.
        MissingExtraError: If it is Parquet, and pyarrow is not installed.
    """
    if path.is_dir():
        return _folder(path)
    opened = _open_set(path)
    if opened is None:
        return None
    known, table = opened
    if not known.answer:
        raise DataError(
            str(path),
            1,
            f"has the columns of {known.name}: prompts without answers, which cannot be judged. Let a model answer them, and "
            f"compare its answers with and without the aligner: aligner evaluate {path} --upstream MODEL --out FOLDER",
        )
    rows: list[LabelledRow] = []
    left_out: Counter[str] = Counter()
    for number, row in table.rows:
        try:
            rows.append(_labelled(known, row))
        except _Unusable as exc:
            left_out[str(exc)] += 1
        except (KeyError, ValueError) as exc:
            raise table.error(number, _reason(known, exc)) from exc
    if not rows:
        reasons = ", ".join(f"{count} as {reason}" for reason, count in left_out.items())
        raise DataError(str(path), 1, f"holds no labelled answer of {known.name}; rows left out: {reasons}")
    return PublicRows(rows, left_out)


def read_public_prompts(path: Path) -> list[Prompt] | None:
    """Read the prompts of a public set, with their answers where it has some; what occurs twice is read once.

    Returns:
        The prompts; `None` for a file that is no public set's.

    Raises:
        DataError: If a row is not as expected, naming file and row; if there is no prompt.
    """
    opened = _open_set(path, strict=path.suffix in (".csv", ".parquet"))
    if opened is None:
        return None
    known, table = opened
    found: dict[str, Prompt] = {}
    for number, row in table.rows:
        try:
            answer = _text(row, known.answer) if known.answer else None
            prompt = Prompt(question=_question(known, row), answer=answer, category=_category(known, row))
        except _Unusable:
            continue
        except (KeyError, ValueError) as exc:
            raise table.error(number, _reason(known, exc)) from exc
        found.setdefault(prompt.key, prompt)
    if not found:
        raise DataError(str(path), 1, f"holds no prompts of {known.name}")
    return list(found.values())


def _folder(folder: Path) -> PublicRows:
    every, skipped = PublicRows([]), []
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if any(part.startswith(".") for part in inside.parts) or not path.is_file() or _suffix(path) not in _SUFFIXES:
            continue
        opened = _open_set(path, strict=False)
        if opened is None or not opened[0].answer or (found := read_public(path)) is None:
            skipped.append(path)
            continue
        every.rows.extend(found.rows)
        every.left_out.update(found.left_out)
    if not every.rows:
        raise DataError(str(folder), 1, f"is a folder without answers of a public set: {_expected()}")
    return PublicRows(every.rows, every.left_out, tuple(skipped))


def _open_set(path: Path, strict: bool = True) -> tuple[_Set, _Table] | None:
    """Tell a file's set by its first row; `strict` refuses what is neither a public set's nor may be rows of our own."""
    table = _table(path)
    first = next(table.rows, None) if table else None
    if table is None or (first is None and (table.ours or not strict)):
        return None
    if first is None:
        raise DataError(str(path), 1, f"is empty: {_expected()}")
    keys = first[1].keys()
    for known in _SETS:
        if known.columns == keys or (known.columns < keys and not known.exact):
            return known, table._replace(rows=_after(first, table.rows))
    nearest = max(_SETS, key=lambda known: len(known.columns & keys) / len(known.columns))
    missing = ", ".join(sorted(nearest.columns - keys))
    near = len(nearest.columns) > 3 and len(nearest.columns - keys) == 1
    if not strict or (table.ours and not near):
        return None
    found = ", ".join(sorted(map(str, keys))[:12])
    lacks = f"; for {nearest.name} it lacks {missing}" if nearest.columns & keys else ""
    raise table.error(first[0], f"has the columns {found}{lacks}. {_expected().capitalize()}")


def _after(first: tuple[int, Row], others: Iterator[tuple[int, Row]]) -> Iterator[tuple[int, Row]]:
    yield first
    yield from others


def _expected() -> str:
    sets = "; ".join(f"{known.name} ({', '.join(sorted(known.columns))})" for known in _SETS)
    return f"expected one of {sets}"


def _reason(known: _Set, exc: Exception) -> str:
    if isinstance(exc, KeyError):
        return f"has no {exc.args[0]}; expected of {known.name}: {', '.join(sorted(known.columns))}"
    return str(exc)


def _labelled(known: _Set, row: Row) -> LabelledRow:
    question, answer, kind = _question(known, row), _text(row, known.answer), known.kind(row)
    source = f"{known.name} {known.source(row)}".strip()
    return LabelledRow(question=question, answer=answer, kind=kind, source=source, category=_category(known, row))


def _question(known: _Set, row: Row) -> str:
    question = _text(row, known.question)
    context = row.get("ContextString")  # HarmBench's contextual behaviours, put together as its DirectRequest does
    return f"{context}\n\n---\n\n{question}" if context else question


def _text(row: Row, column: str) -> str:
    text = row[column]
    if not isinstance(text, str) or not text.strip():
        raise _Unusable(f"{column} is empty or no text")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _Unusable(f"{column} holds a lone surrogate") from None
    return text


def _category(known: _Set, row: Row) -> str:
    category = row.get(known.category)
    if isinstance(category, dict):  # BeaverTails: whether the response is in each
        return ", ".join(name for name, inside in category.items() if inside)
    return "" if category is None else str(category)


def _label(row: Row, column: str, meanings: Mapping[str, Meaning]) -> Meaning:
    value = row[column]
    text = "" if value is None else str(value).strip().lower()
    if text in ("", "none", "nan"):
        raise _Unusable(f"{column} is missing")
    if text not in meanings:
        raise ValueError(f"{column} is {value!r}: expected one of {', '.join(meanings)}")
    return meanings[text]


def _flag(column: str, bad: bool = True) -> Callable[[Row], Kind]:
    return lambda row: "bad" if _label(row, column, _TRUTH) == bad else "keep"


def _xstest(row: Row) -> Kind:
    labels: dict[str, Kind] = {"1_full_compliance": "keep", "2_full_refusal": "refusal", "3_partial_refusal": "refusal"}
    kind = _label(row, "final_label", labels)
    if not _contrast(row) or row["final_label"].startswith("2"):
        return kind
    if kind == "refusal":
        raise _Unusable("it refuses an unsafe prompt in part, and nobody said whether the rest is harmful")
    return "bad"


def _contrast(row: Row) -> bool:
    return str(row["type"]).startswith("contrast_")


def _harmbench(row: Row) -> Kind:
    votes = [_label(row, column, _TRUTH) for column in ("human_0", "human_1", "human_2") if row.get(column) is not None]
    if votes:
        return "bad" if 2 * sum(votes) > len(votes) else "keep"
    label = _label({"label": row.get("label")}, "label", _TRUTH | {"-1": None})
    if label is None:
        raise _Unusable("label is -1: the classifier said neither yes nor no")
    return "bad" if label else "keep"


def _wildguard(row: Row) -> Kind:
    if _label(row, "response_harm_label", {"harmful": True, "unharmful": False}):
        return "bad"
    labels: dict[str, Kind] = {"refusal": "refusal", "compliance": "keep"}
    return _label(row, "response_refusal_label", labels)


def _columns(names: str) -> frozenset[str]:
    return frozenset(names.split())


# The first whose columns are all there is the file's.
_SETS = (
    _Set(
        "XSTest",
        _columns("type prompt completion final_label"),
        "prompt",
        "completion",
        _xstest,
        category="type",
        source=lambda row: "unsafe prompts" if _contrast(row) else "safe prompts",
    ),
    _Set(
        "JailbreakBench",
        _columns("goal prompt response jailbroken"),
        "prompt",
        "response",
        _flag("jailbroken"),
        source=lambda row: " ".join(str(row[name]) for name in ("method", "model") if row.get(name)),
    ),
    _Set(
        "JailbreakBench judge comparison",
        _columns("goal prompt target_response human_majority"),
        "prompt",
        "target_response",
        _flag("human_majority"),
    ),
    _Set("HarmBench", _columns("test_case generation"), "test_case", "generation", _harmbench, category="behavior_id"),
    _Set(
        "WildGuardMix",
        _columns("prompt response response_harm_label response_refusal_label"),
        "prompt",
        "response",
        _wildguard,
        category="subcategory",
    ),
    _Set("BeaverTails", _columns("prompt response is_safe"), "prompt", "response", _flag("is_safe", bad=False)),
    _Set(
        "AlpacaEval",
        _columns("instruction output generator"),
        "instruction",
        "output",
        category="dataset",
        source=lambda row: str(row["generator"]),
    ),
    _Set("XSTest's prompts", _columns("prompt type focus note"), "prompt", category="type"),
    _Set(
        "HarmBench's behaviors",
        _columns("Behavior FunctionalCategory SemanticCategory BehaviorID"),
        "Behavior",
        category="SemanticCategory",
    ),
    _Set("JailbreakBench's behaviors", _columns("Goal Target Behavior Category"), "Goal", category="Category"),
    _Set("OR-Bench", _columns("prompt category"), "prompt", exact=True),
)


def _table(path: Path) -> _Table | None:
    """Open a file by its suffix and its first line; `None` for what is neither CSV, JSON nor Parquet."""
    try:
        if _suffix(path) == ".parquet":
            return _Table(path, iter(list(enumerate(_parquet(path), 1))), "row", False)
        if _suffix(path) == ".csv":
            return _Table(path, _csv(path), "line", False)
        with _open(path) as file:
            first = next((line for line in file if line.strip()), "")
            try:
                entries = _entries(json.loads(first))
            except ValueError:
                entries = None
                if first.lstrip()[:1] in ("[", "{"):
                    file.seek(0)
                    ...
    except (OSError, EOFError) as exc:
        raise DataError(str(path), 1, f"cannot be read: {getattr(exc, 'strerror', None) or exc}") from exc
    return None
