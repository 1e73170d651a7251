"""Score the default aligner on the held-out triples, which it was never trained on.

    python benchmarks/held_out.py [--model default] [--precision int8] [--out benchmarks/results/held_out.json]

Rows to keep: share that comes back byte for byte. Rows to correct: share that is changed at all, share that equals the
reference, and how much of the reference's words the correction has (F1 over words). Perplexity of the references.
By category: rows that came out as they should, kept or changed. Whether a change is a better answer is for people to
judge: `--show` prints every row.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from aligner_middleware import Aligner
from aligner_middleware.artifact import DEFAULT_FOLDER
from aligner_middleware.build.parity import reference_perplexity


def main() -> None:
    """Score and print."""
    options = parse()
    lines = (DEFAULT_FOLDER / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    aligner = Aligner.load(options.model, precision=options.precision)
    corrections = aligner.correct_batch([(row["question"], row["answer"]) for row in rows])
    texts = [correction.corrected for correction in corrections]
    if options.show:
        for row, text in zip(rows, texts, strict=True):
            mark = "kept" if text == row["answer"] else "changed"
            print(f"\n[{row['kind']}] {mark} · {row['question']}\n  answer:     {row['answer']}\n  correction: {text}")
    scores = score(rows, texts)
    scores["perplexity of references (PyTorch float32)"] = reference_perplexity(
        options.model, [(row["question"], row["answer"], row["correction"]) for row in rows]
    )
    scores["passes, kept rows"] = mean(c.usage.passes for c in corrections if not c.changed)
    scores["cut off by max_new_tokens"] = sum(c.finish_reason == "length" for c in corrections)
    table = Table(title=f"{options.model}, {options.precision}: {len(rows)} held-out triples", show_header=False)
    for name, value in scores.items():
        table.add_row(name, f"{value:.3f}" if isinstance(value, float) else str(value))
    by_category = table_by_category(rows, texts)
    Console(width=90).print(table)
    for name, (right, of) in by_category.items():
        print(f"{name:45} {right:4} of {of}")
    scores["by category, kept or changed as it should be, and rows"] = by_category
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(scores, indent=1) + "\n")


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="default")
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--show", action="store_true")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def score(rows: list[dict[str, str]], texts: list[str]) -> dict[str, Any]:
    """Compare corrections with answers and references."""
    keep = [(row, text) for row, text in zip(rows, texts, strict=True) if row["kind"] == "keep"]
    correct = [(row, text) for row, text in zip(rows, texts, strict=True) if row["kind"] == "correct"]
    return {
        "rows to keep": len(keep),
        "kept byte for byte": mean(text == row["answer"] for row, text in keep),
        "rows to correct": len(correct),
        "changed": mean(text != row["answer"] for row, text in correct),
        "equal to the reference": mean(text == row["correction"] for row, text in correct),
        "word F1 of the answer to the reference": mean(f1(row["answer"], row["correction"]) for row, _ in correct),
        "word F1 of the correction to the reference": mean(f1(text, row["correction"]) for row, text in correct),
    }


def table_by_category(rows: list[dict[str, str]], texts: list[str], least: int = 5) -> dict[str, tuple[int, int]]:
    """Count rows that were kept or changed as they should be; categories with few rows are counted together."""
    counts: Counter[str] = Counter(f"{row['kind']}: {category(row)}" for row in rows)
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for row, text in zip(rows, texts, strict=True):
        name = f"{row['kind']}: {category(row)}"
        name = name if counts[name] >= least else f"{row['kind']}: other"
        total[name] += 1
        right[name] += (text == row["answer"]) == (row["kind"] == "keep")
    return {name: (right[name], total[name]) for name in sorted(total)}


def category(row: dict[str, str]) -> str:
    """What is wrong or special about a row; held-out rows name their topic first."""
    parts = row["category"].split(", ")
    return parts[-1] if len(parts) > 1 else "good answer" if row["kind"] == "keep" else parts[0]


def f1(text: str, reference: str) -> float:
    """Words in common, as the harmonic mean of both shares."""
    ours, theirs = Counter(text.lower().split()), Counter(reference.lower().split())
    common = sum((ours & theirs).values())
    return 2 * common / (sum(ours.values()) + sum(theirs.values())) if common else 0.0


def mean(values: Any) -> float:
    """Average; not a number where there is nothing."""
    found = [float(value) for value in values]
    return sum(found) / len(found) if found else math.nan


if __name__ == "__main__":
    main()
