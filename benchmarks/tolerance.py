"""Does a tolerance stop an aligner that copies from skipping? On good answers in which copying is hard.

    python benchmarks/tolerance.py MODEL ROWS.jsonl… [--tolerances 0,1,3,6] [--limit 120] [--out benchmarks/results]

MODEL is an exported aligner without verdicts. Of the rows (question, answer, kind) those are taken that are to be kept and
hold a list, a table, code or over 120 words. Each is corrected at each tolerance, doubtful corrections included. Counted are:
kept byte for byte, copies with holes (`safeguards.holes`), repetitions and cut-offs, other changes.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from aligner_middleware import Aligner
from aligner_middleware.evaluation.labelled_rows import read_labelled

_KINDS = {
    "code": re.compile(r"```"),
    "table": re.compile(r"(?m)^\|.*\|$"),
    "list": re.compile(r"(?ms)^\s*(\d+[.)]|[-*]) .*^\s*(\d+[.)]|[-*]) .*^\s*(\d+[.)]|[-*]) "),
    "long text": re.compile(r"(?s)(\S+\s+){120}"),
}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model")
    parser.add_argument("rows", type=Path, nargs="+")
    parser.add_argument("--tolerances", default="0,1,3,6")
    parser.add_argument("--limit", type=int, default=120)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    tolerances = [float(value) for value in options.tolerances.split(",")]
    rows = [row for path in options.rows for row in read_labelled(path) if not row.unsafe]
    chosen = [(kind, row) for row in rows if (kind := kind_of(row.answer))]
    chosen = chosen[:: max(1, len(chosen) // options.limit)][: options.limit]
    found: dict[float, Counter[str]] = {tolerance: Counter() for tolerance in tolerances}
    with Aligner.load(options.model) as aligner:
        for kind, row in track(chosen, "correcting", console=Console(stderr=True)):
            for tolerance in tolerances:
                made = aligner.correct(row.question, row.answer, strength=tolerance, on_doubt="keep")
                outcome = "kept" if not made.changed else next(iter(made.doubts), "other change")
                found[tolerance].update([outcome, f"{kind}: {'kept' if not made.changed else 'changed'}"])
    names = sorted({name for counts in found.values() for name in counts})
    table = Table("tolerance, nats", *names, title=f"{len(chosen)} good answers")
    for tolerance, counts in found.items():
        table.add_row(f"{tolerance:g}", *(str(counts[name]) for name in names))
    Console(width=160).print(table)
    report = {
        "model": Path(options.model).name,
        "rows": len(chosen),
        "tolerances": {f"{t:g}": dict(c) for t, c in found.items()},
    }
    (options.out / "tolerance.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def kind_of(answer: str) -> str | None:
    """Say why an answer is hard to copy, if it is."""
    return next((kind for kind, pattern in _KINDS.items() if pattern.search(answer)), None)


if __name__ == "__main__":
    main()
