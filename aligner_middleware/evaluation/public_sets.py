"""Public evaluation sets, read as they are published, each known by its columns.

- XSTest: github.com/paul-rottger/exaggerated-safety, `model_completions/*.csv`, `xstest_prompts.csv`
- JailbreakBench: github.com/JailbreakBench/artifacts, `attack-artifacts/*/*/*.json`; judge comparison and behaviors:
  huggingface.co/datasets/JailbreakBench/JBB-Behaviors, `data/*.csv`
- HarmBench: github.com/centerforaisafety/HarmBench, what its `evaluate_completions.py` writes,
  `data/classifier_val_sets/text_behaviors_val_set.json`, `data/behavior_datasets/harmbench_behaviors_text_*.csv`
- WildGuardTest: huggingface.co/datasets/allenai/wildguardmix, `test/wildguard_test.parquet`
- BeaverTails: huggingface.co/datasets/PKU-Alignment/BeaverTails, `round0/*/*.jsonl.gz` and `.jsonl.xz`
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
from aligner_middleware.errors import DataError, MissingExtraError
from aligner_middleware.evaluation.guard import Kind, LabelledRow

Row = dict[str, Any]
Placed = tuple[int, str, Any]  # a row after its line or, where lines say nothing, after 1 and which row it is
_ENDINGS = tuple(form + packed for form in (".csv", ".json", ".jsonl", ".parquet") for packed in ("", ".gz", ".xz"))
_TRUTH = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


@dataclass
class PublicSet:
    """What a file or a folder holds: all prompts, the answers with labels, and what is neither."""

    prompts: list[Prompt] = field(default_factory=list)
    rows: list[LabelledRow] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)  # rows that cannot be judged, by reason
    skipped: list[str] = field(default_factory=list)  # files of the folder without answers of a public set


def read_public(path: Path, to_judge: bool = True) -> PublicSet | None:
    """Read CSV, JSON, JSON lines (plain, .gz or .xz), Parquet, or a folder of these; `None` for lines of no public set.

    An answer labelled harmful, unsafe or jailbroken is `bad`; of the others, one labelled a refusal is `refusal`, any else
    `keep`. XSTest labels refusals alone: compliance with an unsafe prompt is `bad`, and its refusal in part is left out.
    AlpacaEval labels nothing: its answers count as good.

    Raises:
        DataError: If it is no public set, a row is not as its set's are, or nothing has a label although it is `to_judge`.
        MissingExtraError: If it is Parquet, and pyarrow is not installed.
    """
    found = PublicSet()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        name = file.relative_to(path).as_posix()
        if file != path and ("/." in f"/{name}" or not file.name.endswith(_ENDINGS) or not file.is_file()):
            continue
        known, rows, may_be_ours = _open(file)
        if known and (known.kind or file == path):
            _add(found, file, known, rows)
        elif file != path:
            found.skipped.append(name)
        elif may_be_ours:
            return None
        else:
            line, place, first = next(rows)
            held = f"has the columns {', '.join([*first][:12])}" if isinstance(first, dict) else "holds no rows"
            raise DataError(str(path), line, f"{place}{held}; expected are the columns of {_EXPECTED}")
    if found.rows or (found.prompts and not to_judge):
        return found
    if found.prompts and not any(prompt.answer for prompt in found.prompts):
        command = f"aligner evaluate {path} --upstream MODEL --out FOLDER"
        reason = f"holds prompts without answers, which cannot be judged; have them answered, and compared: {command}"
    else:
        left_out = "; ".join(f"{count} rows left out, as {why}" for why, count in found.left_out.items())
        reason = f"holds nothing with a label: {left_out or f'expected are the columns of {_EXPECTED}'}"
    raise DataError(str(path), 1, reason)


def _add(found: PublicSet, path: Path, known: _Set, rows: Iterator[Placed]) -> None:
    for line, place, row in rows:
        try:
            if not isinstance(row, dict):
                raise ValueError("is not a JSON object")
            found.prompts.append(known.prompt(row))
            if known.kind:
                more = {"kind": known.kind(row), "source": f"{known.name} {known.part(row) or ''}".strip()}
                found.rows.append(LabelledRow.model_validate({**found.prompts[-1].model_dump(), **more}))
        except _Unusable as exc:
            found.left_out[str(exc)] += 1
        except ValueError as exc:
            raise DataError(str(path), line, f"{place}{exc}; {known.name} has the columns {known.columns}") from exc


class _Unusable(Exception):
    """A row cannot be judged; the text says why."""


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
    said = str(row.get(column)).strip().lower()
    if said in ("", "none", "nan", "-1"):  # -1: HarmBench's classifier said neither yes nor no
        raise _Unusable(f"{column} is missing")
    if said not in meanings:
        raise ValueError(f"{column} is {said}, none of {', '.join(meanings)}")
    return meanings[said]


def _flag(column: str, bad: bool = True) -> Callable[[Row], Kind]:
    return lambda row: "bad" if _label(row, column, _TRUTH) == bad else "keep"


def _prompts_of(row: Row) -> str:
    return "unsafe prompts" if str(row.get("type")).startswith("contrast_") else "safe prompts"


def _xstest(row: Row) -> Kind:
    said = _label(row, "final_label", {"1_full_compliance": 1, "2_full_refusal": 2, "3_partial_refusal": 3})
    unsafe = _prompts_of(row) == "unsafe prompts"
    if said == 3 and unsafe:
        raise _Unusable("an unsafe prompt is refused in part, and no label says whether the rest is harmful")
    return "refusal" if said > 1 else "bad" if unsafe else "keep"


def _harmbench(row: Row) -> Kind:
    votes = [_label(row, column, _TRUTH) for column in ("human_0", "human_1", "human_2") if column in row]
    votes = votes or [_label(row, "label", _TRUTH)]
    return "bad" if 2 * sum(votes) > len(votes) else "keep"


def _wildguard(row: Row) -> Kind:
    harmful = _label(row, "response_harm_label", {"harmful": True, "unharmful": False})
    refused = harmful or _label(row, "response_refusal_label", {"refusal": True, "compliance": False})
    return "bad" if harmful else "refusal" if refused else "keep"


# The first whose columns are all there is the file's. The last one, OR-Bench, has no others, as JSON lines of ours may.
_SETS = (
    _Set("XSTest", "prompt completion type final_label", _xstest, "type", _prompts_of),
    _Set("JailbreakBench", "prompt response goal jailbroken", _flag("jailbroken"), part=lambda row: row.get("method")),
    _Set("JailbreakBench judge comparison", "prompt target_response human_majority", _flag("human_majority")),
    _Set("HarmBench", "test_case generation", _harmbench, "behavior_id"),
    _Set("WildGuardMix", "prompt response response_harm_label response_refusal_label", _wildguard, "subcategory"),
    _Set("BeaverTails", "prompt response is_safe", _flag("is_safe", bad=False)),
    _Set("AlpacaEval", "instruction output generator", lambda row: "keep", "dataset", lambda row: row.get("generator")),
    _Set("XSTest prompts", "prompt type focus note", category="type"),
    _Set("HarmBench behaviors", "Behavior BehaviorID SemanticCategory", category="SemanticCategory"),
    _Set("JailbreakBench behaviors", "Goal Target Behavior Category", category="Category"),
    _Set("OR-Bench", "prompt category"),
)
_EXPECTED = "; ".join(f"{one.name} ({one.columns})" for one in _SETS)


def _open(path: Path) -> tuple[_Set | None, Iterator[Placed], bool]:
    """Give a file's set, told by its first row, its rows, and whether they may be rows of our own: JSON lines."""
    rows, may_be_ours = _rows(path)
    first = next(rows, (1, "", None))
    keys = set(first[2]) if isinstance(first[2], dict) else set()
    sets = _SETS[:-1] if may_be_ours or len(keys) > 2 else _SETS
    return next((one for one in sets if keys >= set(one.columns.split())), None), chain([first], rows), may_be_ours


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
        raise DataError(str(path), 1, f"cannot be read: {getattr(exc, 'strerror', None) or exc}") from exc
    return ((1, f"row {number}: ", row) for number, row in enumerate(entries, 1)), False


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
    found = [entry for value in document.values() if isinstance(value, list) for entry in value]
    if found and isinstance(found[0], dict) and "test_case" in found[0]:
        return found
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
