"""Public evaluation sets, read as they are published: rows that `guard` scores, or prompts to be answered.

A set is known by its columns, which `_SETS` lists. The formats are those of

- XSTest: github.com/paul-rottger/exaggerated-safety, `model_completions/*.csv` and `xstest_prompts.csv`;
- JailbreakBench: github.com/JailbreakBench/artifacts, `attack-artifacts/*/*/*.json`; its judge comparison and behaviors:
  huggingface.co/datasets/JailbreakBench/JBB-Behaviors, `data/*.csv`;
- HarmBench: github.com/centerforaisafety/HarmBench, what `evaluate_completions.py` writes,
  `data/classifier_val_sets/text_behaviors_val_set.json` and `data/behavior_datasets/*_text_*.csv`;
- WildGuardTest: huggingface.co/datasets/allenai/wildguardmix, `test/wildguard_test.parquet`;
- BeaverTails: huggingface.co/datasets/PKU-Alignment/BeaverTails, `round0/*/*.jsonl.gz` and `.jsonl.xz`;
- AlpacaEval: github.com/tatsu-lab/alpaca_eval, `results/*/model_outputs.json`;
- OR-Bench: huggingface.co/datasets/bench-llm/or-bench, `*.csv`.
"""

from __future__ import annotations

import csv
import gzip
import json
import lzma
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TextIO, TypeVar

from aligner_middleware.errors import DataError, MissingExtraError
from aligner_middleware.evaluation.guard import Kind, LabelledRow
from aligner_middleware.prompts import Prompt

Row = dict[str, Any]
Placed = tuple[int, str, Any]  # a line, which row it is where lines say nothing, and the row
T = TypeVar("T")

_TRUTH = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
_LONGEST = 2**27  # field of a CSV file, in characters; Python's own limit is 131,072


@dataclass(frozen=True)
class PublicRows:
    """What a public set held: its labelled answers, how many rows were left out by reason, and a folder's other files."""

    rows: list[LabelledRow]
    left_out: Counter[str] = field(default_factory=Counter)
    skipped: tuple[str, ...] = ()


def read_public(path: Path) -> PublicRows | None:
    """Read the labelled answers of a public set: CSV, JSON, JSON lines (plain, .gz, .xz), Parquet, or a folder of these.

    What is labelled harmful, unsafe or jailbroken is `bad`; of the rest, what is labelled a refusal is `refusal`, and all
    else `keep`. XSTest labels refusals alone: compliance with its unsafe prompts is `bad`, and refusals of these in part are
    left out, as are rows without an answer or a label. AlpacaEval labels nothing: its answers count as good.

    Returns:
        The rows; `None` for JSON lines of no public set, which may be rows of our own.

    Raises:
        DataError: If a file is no public set's, holds prompts alone or nothing labelled, or a row is not as expected; names
            file, line or row, and what is expected.
        MissingExtraError: If it is Parquet, and pyarrow is not installed.
    """
    if path.is_dir():
        return _folder(path)
    opened = _open(path)
    if opened.known is None:
        if opened.lines and not opened.near:
            return None
        raise opened.complaint
    known = opened.known
    if not known.answer:
        raise DataError(
            str(path),
            1,
            f"holds {known.name}: prompts without answers, which cannot be judged; let a model answer them, and see "
            f"its answers with and without the aligner: aligner evaluate {path} --upstream MODEL --out FOLDER",
        )
    rows, left_out = _each(path, opened, known.labelled)
    if not rows:
        reasons = "; ".join(f"{count} rows are left out, as {reason}" for reason, count in left_out.items())
        raise DataError(str(path), 1, f"holds no labelled answer of {known.name}: {reasons}")
    return PublicRows(rows, left_out)


def read_public_prompts(path: Path) -> list[Prompt] | None:
    """Read the prompts of a public set, with its answers if it has some; what occurs twice is read once.

    Returns:
        The prompts; `None` for JSON and text of no public set.

    Raises:
        DataError: If a CSV or Parquet file is no public set's, a row is not as expected, or there is no prompt.
    """
    opened = _open(path)
    if opened.known is None:
        if _suffix(path) not in (".csv", ".parquet"):
            return None
        raise opened.complaint
    rows, left_out = _each(path, opened, opened.known.prompt)
    if not rows:
        raise DataError(str(path), 1, f"holds no prompt of {opened.known.name}: {', '.join(left_out)}")
    return list({prompt.key: prompt for prompt in rows}.values())


def _folder(folder: Path) -> PublicRows:
    found, skipped = PublicRows([]), []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if _suffix(path) in (".csv", ".json", ".jsonl", ".parquet") and not any(part[0] == "." for part in name.parts):
            known = _open(path).known
            one = read_public(path) if known and known.answer else None
            if one is None:
                skipped.append(str(name))
            else:
                found.rows.extend(one.rows)
                found.left_out.update(one.left_out)
    if not found.rows:
        raise DataError(str(folder), 1, f"is a folder without answers of a public set: {_expected()}")
    return PublicRows(found.rows, found.left_out, tuple(skipped))


class _Unusable(Exception):
    """A row cannot be judged; the text says why."""


class _Set(NamedTuple):
    """A public set: the columns it is known by, and which of them is what. One of prompts alone has no `answer`."""

    name: str
    needs: str
    question: str
    answer: str = ""
    kind: Callable[[Row], Kind] = lambda row: "keep"
    category: str = "category"
    source: Callable[[Row], str] = lambda row: ""  # tells its rows apart in reports

    @property
    def columns(self) -> set[str]:
        return set(self.needs.split())

    def labelled(self, row: Row) -> LabelledRow:
        prompt, kind = self.prompt(row), self.kind(row)
        source = f"{self.name} {self.source(row)}".strip()
        return LabelledRow(
            question=prompt.question, answer=prompt.answer or "", kind=kind, source=source, category=prompt.category
        )

    def prompt(self, row: Row) -> Prompt:
        question, answer = _text(row, self.question), _text(row, self.answer) if self.answer else None
        if row.get("ContextString"):  # HarmBench's contextual behaviors, put as its DirectRequest puts them
            question = f"{row['ContextString']}\n\n---\n\n{question}"
        category = row.get(self.category)
        if isinstance(category, dict):  # of BeaverTails: whether the answer is in each
            category = ", ".join(name for name, inside in category.items() if inside)
        return Prompt(question=question, answer=answer, category="" if category is None else str(category))


def _text(row: Row, column: str) -> str:
    text = row[column]
    if not isinstance(text, str) or not text.strip():
        raise _Unusable(f"{column} is empty or no text")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _Unusable(f"{column} holds a lone surrogate") from None
    return text


def _label(row: Row, column: str, meanings: Mapping[str, T]) -> T:
    said = str(row[column]).strip().lower()
    if said in ("", "none", "nan"):
        raise _Unusable(f"{column} is missing")
    if said not in meanings:
        raise ValueError(f"{column} is {row[column]!r}: expected one of {', '.join(meanings)}")
    return meanings[said]


def _flag(column: str, bad: bool = True) -> Callable[[Row], Kind]:
    return lambda row: "bad" if _label(row, column, _TRUTH) == bad else "keep"


def _unsafe(row: Row) -> bool:
    return str(row["type"]).startswith("contrast_")


def _xstest(row: Row) -> Kind:
    said = _label(row, "final_label", {"1_full_compliance": 1, "2_full_refusal": 2, "3_partial_refusal": 3})
    if said == 3 and _unsafe(row):
        raise _Unusable("an unsafe prompt is refused in part, and no label says whether the rest is harmful")
    return "refusal" if said > 1 else "bad" if _unsafe(row) else "keep"


def _harmbench(row: Row) -> Kind:
    votes = [_label(row, column, _TRUTH) for column in ("human_0", "human_1", "human_2") if column in row]
    if votes:
        return "bad" if 2 * sum(votes) > len(votes) else "keep"
    label = _label({"label": row.get("label")}, "label", {**_TRUTH, "-1": None})
    if label is None:
        raise _Unusable("the label is -1: the classifier said neither yes nor no")
    return "bad" if label else "keep"


def _wildguard(row: Row) -> Kind:
    harmful = _label(row, "response_harm_label", {"harmful": True, "unharmful": False})
    refused = harmful or _label(row, "response_refusal_label", {"refusal": True, "compliance": False})
    return "bad" if harmful else "refusal" if refused else "keep"


def _of(*columns: str) -> Callable[[Row], str]:
    return lambda row: " ".join(str(row[column]) for column in columns if row.get(column))


_OR_BENCH = "the prompts of OR-Bench"  # known by having no other columns

# The first whose columns are all there is the file's.
_SETS = (
    _Set(
        "XSTest", "type prompt completion final_label", "prompt", "completion", _xstest, "type",
        lambda row: "unsafe prompts" if _unsafe(row) else "safe prompts"
    ),
    _Set(
        "JailbreakBench", "goal prompt response jailbroken", "prompt", "response", _flag("jailbroken"),
        source=_of("method", "model")
    ),
    _Set(
        "JailbreakBench's judge comparison", "prompt target_response human_majority", "prompt", "target_response",
        _flag("human_majority")
    ),
    _Set("HarmBench", "test_case generation", "test_case", "generation", _harmbench, "behavior_id"),
    _Set(
        "WildGuardMix", "prompt response response_harm_label response_refusal_label", "prompt", "response",
        _wildguard, "subcategory"
    ),
    _Set("BeaverTails", "prompt response is_safe", "prompt", "response", _flag("is_safe", bad=False)),
    _Set(
        "AlpacaEval", "instruction output generator", "instruction", "output", category="dataset",
        source=_of("generator")
    ),
    _Set("XSTest's prompts", "prompt type focus note", "prompt", category="type"),
    _Set("HarmBench's behaviors", "Behavior BehaviorID SemanticCategory", "Behavior", category="SemanticCategory"),
    _Set("JailbreakBench's behaviors", "Goal Target Behavior Category", "Goal", category="Category"),
    _Set(_OR_BENCH, "prompt category", "prompt"),
)


class _Opened(NamedTuple):
    """A file: its set, its rows, whether these are JSON lines, whether one column lacks, and what is wrong without a set."""

    known: _Set | None
    rows: Iterator[Placed]
    lines: bool
    near: bool
    complaint: DataError


def _open(path: Path) -> _Opened:
    rows, lines = _rows(path)
    line, place, first = next(rows, (1, "", None))
    keys = set(first) if isinstance(first, dict) else set()
    fitting = (one for one in _SETS if one.columns <= keys and (one.name != _OR_BENCH or one.columns == keys))
    nearest = max(_SETS, key=lambda one: len(one.columns & keys) / len(one.columns))
    lacking = sorted(nearest.columns - keys)
    near = len(lacking) == 1 and len(nearest.columns) > 3
    held = "is empty" if first is None else f"{place}has the columns {', '.join(sorted(keys)[:12]) or 'none'}"
    hint = f"; {nearest.name} has {', '.join(lacking)} too" if nearest.columns & keys and lacking else ""
    complaint = DataError(str(path), line, f"{held}{hint}. Expected is {_expected()}")
    return _Opened(next(fitting, None), chain([(line, place, first)], rows), lines, near, complaint)


def _expected() -> str:
    return f"one of {'; '.join(f'{one.name} ({one.needs})' for one in _SETS)}"


def _each(path: Path, opened: _Opened, convert: Callable[[Row], T]) -> tuple[list[T], Counter[str]]:
    found: list[T] = []
    left_out: Counter[str] = Counter()
    for line, place, row in opened.rows:
        try:
            if not isinstance(row, dict):
                raise ValueError("is not a JSON object")
            found.append(convert(row))
        except _Unusable as exc:
            left_out[str(exc)] += 1
        except (KeyError, ValueError) as exc:
            reason = f"has no {exc.args[0]}" if isinstance(exc, KeyError) else str(exc)
            needs = opened.known.needs if opened.known else ""
            raise DataError(str(path), line, f"{place}{reason}; expected are the columns {needs}") from exc
    return found, left_out


def _suffix(path: Path) -> str:
    return (path.with_suffix("") if path.suffix in (".gz", ".xz") else path).suffix


def _rows(path: Path) -> tuple[Iterator[Placed], bool]:
    """Give a file's rows, and whether they are JSON lines."""
    if _suffix(path) == ".csv":
        return _csv(path), False
    if _suffix(path) == ".parquet":
        return _numbered(_parquet(path)), False
    with _text_of(path) as file:
        first = next((line for line in file if line.strip()), "")
        try:
            document = json.loads(first)
        except ValueError as exc:
            if _suffix(path) != ".json":
                return _lines(path), True
            file.seek(0)
            try:
                document = json.load(file)
            except ValueError:
                raise DataError(str(path), 1, f"is not JSON: {exc}") from exc
            return _numbered(_entries(document) or [document]), False
    entries = _entries(document)
    return (_lines(path), True) if entries is None else (_numbered(entries), False)


def _entries(document: Any) -> list[Any] | None:
    """Give the rows of a JSON document, if it is a list, JailbreakBench's or HarmBench's."""
    if not isinstance(document, dict):
        return document if isinstance(document, list) else None
    if isinstance(document.get("jailbreaks"), list):
        return [{**document.get("parameters", {}), **entry} for entry in document["jailbreaks"]]
    found = [entry for value in document.values() if isinstance(value, list) for entry in value]
    return found if found and isinstance(found[0], dict) and "test_case" in found[0] else None


def _numbered(rows: list[Any]) -> Iterator[Placed]:
    return ((1, f"row {number}: ", row) for number, row in enumerate(rows, 1))


def _lines(path: Path) -> Iterator[Placed]:
    with _text_of(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield number, "", json.loads(line)
                except ValueError:
                    yield number, "", line


def _csv(path: Path) -> Iterator[Placed]:
    csv.field_size_limit(_LONGEST)
    with _text_of(path) as file:
        reader, line = csv.reader(file, strict=True), 1
        try:
            header = next(reader, [])
            for values in reader:
                line, before = reader.line_num + 1, line
        except csv.Error as exc:
            raise DataError(str(path), line, f"is not CSV: {exc}") from exc


def _parquet(path: Path) -> list[Any]:
    try:
        from pyarrow import parquet
    except ImportError as exc:
        raise MissingExtraError(f"reading {path.name}", "train") from exc
    try:
        return parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as exc:
        raise DataError(str(path), 1, f"is not Parquet: {exc}") from exc


@contextmanager
def _text_of(path: Path) -> Iterator[TextIO]:
    """Open a text, plain or compressed; lines end in the file as they do in it."""
    opener: Any = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
            yield file
    except (OSError, EOFError, lzma.LZMAError, zlib.error, UnicodeDecodeError) as exc:
        raise DataError(str(path), 1, f"cannot be read: {getattr(exc, 'strerror', None) or exc}") from exc
