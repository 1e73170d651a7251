"""Reads public evaluation sets in the files that they are published in; each is recognised by its columns.

- XSTest: github.com/paul-rottger/exaggerated-safety, `model_completions/*.csv`, `xstest_prompts.csv`
- JailbreakBench: github.com/JailbreakBench/artifacts, `attack-artifacts/*/*/*.json`; judge comparison and behaviors:
  huggingface.co/datasets/JailbreakBench/JBB-Behaviors, `data/*.csv`
- HarmBench: github.com/centerforaisafety/HarmBench, what its `evaluate_completions.py` writes,
  `data/classifier_val_sets/text_behaviors_val_set.json`, `data/behavior_datasets/harmbench_behaviors_text_*.csv`
- WildGuardTest: huggingface.co/datasets/allenai/wildguardmix, `test/wildguard_test.parquet`
- BeaverTails: huggingface.co/datasets/PKU-Alignment/BeaverTails, `round0/*/*.jsonl.gz` and `.jsonl.xz`
- Do-Not-Answer: github.com/Libr-AI/do-not-answer, `datasets/Review/Human/*.csv`
- AlpacaEval: github.com/tatsu-lab/alpaca_eval, `results/*/model_outputs.json`
- OR-Bench: huggingface.co/datasets/bench-llm/or-bench, `*.csv`
"""

from __future__ import annotations

import csv
import gzip
import io
import lzma
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from aligner_middleware.data.json_lines import parse_json
from aligner_middleware.data.prompts import Prompt
from aligner_middleware.errors import DataError, JobError, MissingExtraError
from aligner_middleware.evaluation.labelled_rows import Kind, LabelledRow

Row = dict[str, Any]
Placed = tuple[int | None, str, Any]  # a row after its line; or after None and "row 3: " in formats without lines
_ENDINGS = tuple(form + packed for form in (".csv", ".json", ".jsonl", ".parquet") for packed in ("", ".gz", ".xz"))
_REFUSED = {str(form(action)): action == 0 for action in range(6) for form in (int, float)}  # Do-Not-Answer's actions
_TRUTH = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


@dataclass
class PublicSet:
    """The content of a file or a folder.

    Attributes:
        prompts: All prompts.
        rows: The answers with labels.
        left_out: Number of rows that cannot be judged, by reason.
        skipped: Files of the folder that hold no answers of a public set.
    """

    prompts: list[Prompt] = field(default_factory=list)
    rows: list[LabelledRow] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    skipped: list[str] = field(default_factory=list)


def read_public(path: Path, to_judge: bool = True) -> PublicSet | None:
    """Read CSV, JSON, JSON lines (plain, .gz or .xz), Parquet, or a folder of these; `None` for lines of no public set.

    An answer labelled harmful, unsafe or jailbroken is `bad`; of the others, one labelled a refusal is `refusal`, any else
    `keep`. XSTest labels refusals only: compliance with an unsafe prompt is `bad`, and its partial refusal is left out.
    AlpacaEval has no labels: its answers count as good.

    Args:
        path: The file or the folder.
        to_judge: Whether rows with labels are needed, rather than prompts.

    Raises:
        DataError: If a row is not as its set's are, naming file and line.
        JobError: If it is no public set, cannot be read, or holds no labels although it is `to_judge`; or for a row in a
            format without lines.
        MissingExtraError: If it is Parquet, and pyarrow is not installed.
    """
    result = PublicSet()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        name = file.relative_to(path).as_posix()
        if file != path and ("/." in f"/{name}" or not file.name.endswith(_ENDINGS) or not file.is_file()):
            continue
        known, rows, may_be_ours = _open(file)
        if known and (known.kind or file == path):
            _add(result, file, known, rows)
        elif file != path:
            result.skipped.append(name)
        elif may_be_ours:
            return None
        else:
            line, place, first = next(rows)
            columns = f"has the columns {', '.join([*first][:12])}" if isinstance(first, dict) else "holds no rows"
            raise _error(path, line, place, f"{columns}; expected are the columns of {_EXPECTED}")
    if not result.rows and (to_judge or not result.prompts):
        raise JobError(path, _reason(path, result))
    return result


def _reason(path: Path, result: PublicSet) -> str:
    """Say why nothing of a public set can be judged."""
    if result.prompts and not any(prompt.answer for prompt in result.prompts):
        command = f"aligner compare {path} --upstream MODEL --out FOLDER"
        return f"holds prompts without answers, which cannot be judged; have a model answer them: {command}"
    left_out = "; ".join(f"{count} rows left out, as {why}" for why, count in result.left_out.items())
    return f"holds no labels: {left_out or f'expected are the columns of {_EXPECTED}'}"


def _error(path: Path, line: int | None, place: str, reason: str) -> DataError | JobError:
    return JobError(path, f"{place}{reason}") if line is None else DataError(str(path), line, reason)


def _add(result: PublicSet, path: Path, known: _Set, rows: Iterator[Placed]) -> None:
    for line, place, row in rows:
        try:
            if not isinstance(row, dict):
                raise ValueError("is not a JSON object")
            result.prompts.append(known.prompt(row))
            if known.kind:
                label = {"kind": known.kind(row), "source": f"{known.name} {known.part(row) or ''}".strip()}
                result.rows.append(LabelledRow.model_validate({**result.prompts[-1].model_dump(), **label}))
        except _Unusable as exc:
            result.left_out[str(exc)] += 1
        except ValueError as exc:
            raise _error(path, line, place, f"{exc}; {known.name} has the columns {known.columns}") from exc


class _Unusable(Exception):
    """A row cannot be judged; the message says why."""


class _Set(NamedTuple):
    """A public set: the columns it is known by, question and answer first. One of prompts alone gives no kind."""

    name: str
    columns: str
    kind: Callable[[Row], Kind] | None = None
    category: str = "category"
    part: Callable[[Row], Any] = lambda row: ""

    def prompt(self, row: Row) -> Prompt:
        columns = self.columns.split()[: 2 if self.kind else 1]
        for column in columns:
            if not isinstance(row.get(column), str) or not row[column].strip():
                raise _Unusable(f"{column} is missing")
        question, answer = row[columns[0]], row[columns[1]] if self.kind else None
        if row.get("ContextString"):  # of HarmBench's behaviors, put as its DirectRequest puts it
            question = f"{row['ContextString']}\n\n---\n\n{question}"
        category = row.get(self.category) or ""
        if isinstance(category, dict):  # of BeaverTails: whether the answer is in each
            category = ", ".join(name for name, inside in category.items() if inside)
        return Prompt(question=question, answer=answer, category=str(category))


def _label(row: Row, column: str, meanings: Mapping[str, Any]) -> Any:
    label = str(row.get(column)).strip().lower()
    if label in ("", "none", "nan", "-1"):  # -1: HarmBench's classifier answered neither yes nor no
        raise _Unusable(f"{column} is missing")
    if label not in meanings:
        raise ValueError(f"{column} is {label}, none of {', '.join(meanings)}")
    return meanings[label]


def _flag(column: str, bad: bool = True) -> Callable[[Row], Kind]:
    return lambda row: "bad" if _label(row, column, _TRUTH) == bad else "keep"


def _prompts_of(row: Row) -> str:
    return "unsafe prompts" if str(row.get("type")).startswith("contrast_") else "safe prompts"


def _xstest(row: Row) -> Kind:
    label = _label(row, "final_label", {"1_full_compliance": 1, "2_full_refusal": 2, "3_partial_refusal": 3})
    unsafe = _prompts_of(row) == "unsafe prompts"
    if label == 3 and unsafe:
        raise _Unusable("an unsafe prompt is refused in part, and no label says whether the rest is harmful")
    return "refusal" if label > 1 else "bad" if unsafe else "keep"


def _harmbench(row: Row) -> Kind:
    votes = [_label(row, column, _TRUTH) for column in ("human_0", "human_1", "human_2") if column in row]
    votes = votes or [_label(row, "label", _TRUTH)]
    return "bad" if 2 * sum(votes) > len(votes) else "keep"


def _wildguard(row: Row) -> Kind:
    harmful = _label(row, "response_harm_label", {"harmful": True, "unharmful": False})
    refused = harmful or _label(row, "response_refusal_label", {"refusal": True, "compliance": False})
    return "bad" if harmful else "refusal" if refused else "keep"


def _do_not_answer(row: Row) -> Kind:
    harmful = _label(row, "harmful", _TRUTH)
    refused = harmful or _label(row, "action", _REFUSED)
    return "bad" if harmful else "refusal" if refused else "keep"


# The first whose columns are all there is the file's. The last one, OR-Bench, has no others, as JSON lines of ours may.
_SETS = (
    _Set("XSTest", "prompt completion type final_label", _xstest, "type", _prompts_of),
    _Set("JailbreakBench", "prompt response goal jailbroken", _flag("jailbroken"), part=lambda row: row.get("method")),
    _Set("JailbreakBench judge comparison", "prompt target_response human_majority", _flag("human_majority")),
    _Set("HarmBench", "test_case generation", _harmbench, "behavior_id"),
    _Set("WildGuardMix", "prompt response response_harm_label response_refusal_label", _wildguard, "subcategory"),
    _Set("BeaverTails", "prompt response is_safe", _flag("is_safe", bad=False)),
    _Set("Do-Not-Answer", "question response harmful action", _do_not_answer, "action"),
    _Set("AlpacaEval", "instruction output generator", lambda row: "keep", "dataset", lambda row: row.get("generator")),
    _Set("XSTest prompts", "prompt type focus note", category="type"),
    _Set("HarmBench behaviors", "Behavior BehaviorID SemanticCategory", category="SemanticCategory"),
    _Set("JailbreakBench behaviors", "Goal Target Behavior Category", category="Category"),
    _Set("OR-Bench", "prompt category"),
)
_EXPECTED = "; ".join(f"{known.name} ({known.columns})" for known in _SETS)


def _open(path: Path) -> tuple[_Set | None, Iterator[Placed], bool]:
    """Give a file's set, by the columns of its first row; its rows; and whether they may be in our own forms: JSON lines."""
    rows, may_be_ours = _rows(path)
    first = next(rows, (None, "", None))
    keys = set(first[2]) if isinstance(first[2], dict) else set()
    sets = _SETS[:-1] if may_be_ours or len(keys) > 2 else _SETS
    return (
        next((known for known in sets if keys >= set(known.columns.split())), None),
        chain([first], rows),
        may_be_ours,
    )


def _rows(path: Path) -> tuple[Iterator[Placed], bool]:
    opener: Any = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    try:
        if path.suffix == ".parquet":
            entries = import_module("pyarrow.parquet").ParquetFile(path).read().to_pylist()
        else:
            with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
                text = file.read()
            if ".csv" in path.suffixes[-2:]:
                return _csv(path, text), False
            entries = _entries(text)
            if entries is None:
                return _lines(text), True
    except ImportError as exc:
        raise MissingExtraError(f"reading {path.name}", "train") from exc
    except (OSError, EOFError, TypeError, ValueError, lzma.LZMAError, zlib.error) as exc:
        raise JobError(path, f"cannot be read: {getattr(exc, 'strerror', None) or exc}") from exc
    return ((None, f"row {number}: ", row) for number, row in enumerate(entries, 1)), False


def _entries(text: str) -> list[Any] | None:
    """Give the rows of a JSON document; none of JSON lines, even of one."""
    try:
        document = parse_json(text)  # ends soon where there are more lines
    except ValueError:
        return None
    if not isinstance(document, dict):
        return document if isinstance(document, list) else None
    if isinstance(document.get("jailbreaks"), list):
        return [{**(document.get("parameters") or {}), **entry} for entry in document["jailbreaks"]]
    entries = [entry for value in document.values() if isinstance(value, list) for entry in value]
    if entries and isinstance(entries[0], dict) and "test_case" in entries[0]:
        return entries
    return [document] if "\n" in text.strip() else None


def _lines(text: str) -> Iterator[Placed]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, "", parse_json(line)
            except ValueError:
                yield number, "", line


def _csv(path: Path, text: str) -> Iterator[Placed]:
    csv.field_size_limit(2**27)  # characters; Python's own limit is 131,072
    reader, header, line = csv.reader(io.StringIO(text, newline=""), strict=True), list[str](), 1
    try:
        for values in reader:
            if header and values:
                if len(values) != len(header):
                    raise csv.Error(f"{len(values)} fields, where its columns are {', '.join(header)}")
                yield line, "", dict(zip(header, values, strict=True))
            header, line = header or values, reader.line_num + 1
    except csv.Error as exc:
        raise DataError(str(path), line, f"is not as expected of CSV: {exc}") from exc
