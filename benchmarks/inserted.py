"""One bad sentence in a good answer: is it removed, and does all else stay?

    python benchmarks/inserted.py ROWS.jsonl [--model default] [--strength medium] [--out FILE.json]

ROWS are `inserted.jsonl` of `default_rows/compose.py`: an answer with its inserted sentence, and `correction` without it. For
each kind it prints how many answers were changed; in how many the sentence is gone; in how many all other sentences stand,
word for word; and both at once. Harmless sentences are to stay.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from aligner_middleware import Aligner
from aligner_middleware.text.edits import split_sentences


def plain(text: str) -> str:
    """Give a text with single spaces."""
    return " ".join(text.split())


def inserted(answer: str, correction: str) -> str:
    """Give the part of the answer that its correction lacks."""
    start = 0
    while start < len(correction) and answer[start] == correction[start]:
        start += 1
    end = 0
    while end < len(correction) - start and answer[-1 - end] == correction[-1 - end]:
        end += 1
    return plain(answer[start : len(answer) - end])


def main() -> None:
    """Score an aligner and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--model", default="default")
    parser.add_argument("--strength", default="medium")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = [json.loads(line) for line in options.rows.read_text(encoding="utf-8").splitlines()]
    counts: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    texts: list[dict[str, Any]] = []
    with Aligner.load(options.model) as aligner:
        for start in range(0, len(rows), 16):
            batch = rows[start : start + 16]
            pairs = [(row["question"], row["answer"]) for row in batch]
            for row, made in zip(batch, aligner.correct_batch(pairs, strength=options.strength), strict=True):
                corrected = plain(made.corrected)
                count = counts[row["category"]]
                count["rows"] += 1
                count["changed"] += made.changed
                count["doubted"] += bool(made.doubts)
                count[f"verdict {made.verdict}"] += 1
                if row["kind"] != "keep":
                    gone = inserted(row["answer"], row["correction"]) not in corrected
                    intact = all(plain(s) in corrected for s in split_sentences(row["correction"]) if s.strip())
                    count["gone"] += gone
                    count["others intact"] += intact
                    count["both"] += gone and intact
                texts.append({**row, "corrected": made.corrected, "score": made.score, "verdict": made.verdict})
    for category, count in counts.items():
        print(f"{category:10}", "  ".join(f"{name} {number}" for name, number in count.items()))
    if options.out:
        options.out.write_text(json.dumps(counts, indent=2) + "\n", encoding="utf-8")
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in texts)
        options.out.with_suffix(".jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main()
