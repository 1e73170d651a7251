"""Sentence by sentence beside whole answers: what leaves early, what that costs, and how soon the first words come.

    python benchmarks/sentences.py ROWS.jsonl INSERTED.jsonl [--good 120] [--harmful 60] [--inserted-rows 60] [--seconds 600]
        [--out FOLDER]
    python benchmarks/sentences.py ROWS.jsonl INSERTED.jsonl --speed [--answers 6]

ROWS are labelled answers of real models (`development.jsonl`), INSERTED good answers with one bad sentence
(`inserted.jsonl`, both of `default_rows/compose.py`). Samples of each, of at most 200 tokens, go through the aligner
twice, for as long as `--seconds` say: as whole answers, and word by word with `by_sentence=True` and a verdict at each
sentence's end. Printed for each kind:

- kept or changed, in both ways;
- in how many something had been shown of an answer that the verdict on the whole then changed, and which share of its text;
  for inserted sentences, in how many that very sentence had been shown;
- the tokens that had arrived when the first words were shown, and the answers that are kept and were not shown early.

`--speed` lets good answers arrive at 20 and at 50 tokens a second, and measures when the first words are shown, and how long
after the last token all are. A table comes out, and `sentences.json` or `sentences_speed.json`.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from inserted import inserted, plain
from latency import machine
from rich.console import Console
from rich.table import Table

from aligner_middleware import Aligner
from aligner_middleware import sentences as module
from aligner_middleware.strength import LEVELS, Strength

_LONGEST = 200  # tokens
_RATES = 20, 50  # tokens a second
_SEED = 11


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("inserted", type=Path)
    for name, default in (("good", 120), ("harmful", 60), ("inserted-rows", 60), ("answers", 6)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--strength", choices=LEVELS, default="medium")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    with Aligner.load(threads=options.threads) as aligner:
        rows = [row for row in read(options.rows) if aligner.count_tokens(row["answer"]) <= _LONGEST]
        good = sample([row for row in rows if row["kind"] == "keep"], options.good)
        if options.speed:
            report: dict[str, Any] = {"rates": [speed(aligner, good[: options.answers], rate) for rate in _RATES]}
            name = "sentences_speed.json"
        else:
            bad = [row for row in read(options.inserted) if row["kind"] != "keep"]
            short = [row for row in bad if aligner.count_tokens(row["answer"]) <= _LONGEST]
            kinds = {
                "good": good,
                "harmful": sample([row for row in rows if row["kind"] == "bad"], options.harmful),
                "inserted": sample(short, options.inserted_rows),
            }
            module._PAUSE = 0.0  # a verdict at each sentence's end, however slow this machine is
            made = compare_all(aligner, kinds, options.strength, options.seconds)
            report = {"kinds": {kind: summary(some) for kind, some in made.items()}, "answers": made}
            name = "sentences.json"
    report["machine"] = machine(1)
    show(report)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / name).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def read(path: Path) -> list[dict[str, Any]]:
    """Read rows."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def sample(rows: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Draw rows, the same each time."""
    return random.Random(_SEED).sample(rows, min(count, len(rows)))


def words(answer: str) -> list[str]:
    """Cut an answer into words, each with the white space before it."""
    return re.findall(r"\s*\S+|\s+$", answer)


def compare_all(
    aligner: Aligner, kinds: dict[str, list[dict[str, Any]]], strength: Strength, seconds: float
) -> dict[str, list[dict[str, Any]]]:
    """Correct the answers of all kinds, in turns, until the time is over."""
    end = time.monotonic() + seconds
    turns = [(at / len(some), kind, row) for kind, some in kinds.items() for at, row in enumerate(some)]
    made: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    for _, kind, row in sorted(turns, key=lambda turn: turn[:2]):
        if time.monotonic() < end:
            made[kind].append(compare(aligner, row, strength))
    return made


def compare(aligner: Aligner, row: dict[str, Any], strength: Strength) -> dict[str, Any]:
    """Correct an answer as a whole and by sentences."""
    question, answer = row["question"], row["answer"]
    whole = aligner.correct(question, answer, strength=strength)
    arrived, first = 0, None

    def arriving() -> Iterator[str]:
        nonlocal arrived
        for word in words(answer):
            arrived += 1
            yield word

    stream = aligner.stream(question, arriving(), by_sentence=True, strength=strength)
    for _ in stream:
        first = arrived if first is None else first
    made = stream.correction
    bad = inserted(answer, row["correction"]) if row.get("correction") else ""
    return {
        "whole": {"verdict": whole.verdict, "score": whole.score, "changed": whole.changed, "doubts": whole.doubts},
        "verdict": made.verdict,
        "changed": made.changed,
        "doubts": made.doubts,
        "released": made.released / len(answer),
        "late": made.late,
        "bad_shown": bool(bad) and bad in plain(answer[: made.released]),
        "bad_left": bool(bad) and bad in plain(made.corrected),
        "bad_left_whole": bool(bad) and bad in plain(whole.corrected),
        "tokens": aligner.count_tokens(answer),
        "first": aligner.count_tokens("".join(words(answer)[:first])),
    }


def summary(answers: list[dict[str, Any]]) -> dict[str, Any]:
    """Count over the answers of one kind."""
    changed = [one for one in answers if one["verdict"] != "keep"]
    shown = [one for one in changed if one["released"] > 0]
    return {
        "answers": len(answers),
        "unchanged, whole": sum(not one["whole"]["changed"] for one in answers),
        "unchanged, by sentence": sum(not one["changed"] for one in answers),
        "doubts, whole": sum(bool(one["whole"]["doubts"]) for one in answers),
        "doubts, by sentence": sum(bool(one["doubts"]) for one in answers),
        "verdict not keep": len(changed),
        "of these, something was shown before": len(shown),
        "share of their text": round(statistics.mean([one["released"] for one in shown] or [0]), 3),
        "the inserted sentence was shown before": sum(one["bad_shown"] for one in changed),
        "the inserted sentence is left, whole": sum(one["bad_left_whole"] for one in answers),
        "the inserted sentence is left, by sentence": sum(one["bad_left"] for one in answers),
        "tokens of an answer, median": statistics.median([one["tokens"] for one in answers]),
        "tokens before the first are shown, median": statistics.median([one["first"] for one in answers]),
        "kept as a whole, shown at the end only": sum(
            one["verdict"] == "keep" and not one["released"] for one in answers
        ),
    }


def speed(aligner: Aligner, rows: list[dict[str, Any]], rate: int) -> dict[str, Any]:
    """Let answers arrive at a rate; give medians of seconds."""
    found: dict[str, Any] = {"tokens a second": rate, "answers": len(rows)}
    for name, by_sentence in (("whole", False), ("by sentence", True)):
        firsts, waits, seconds = [], [], []
        for row in rows:
            start = time.perf_counter()
            first, arrived = None, [start]

            def arriving(answer: str = row["answer"], arrived: list[float] = arrived) -> Iterator[str]:
                due = arrived[0]
                for word in words(answer):
                    due += aligner.count_tokens(word) / rate
                    time.sleep(max(0.0, due - time.perf_counter()))
                    yield word
                arrived.append(time.perf_counter())

            for _ in aligner.stream(row["question"], arriving(), by_sentence=by_sentence):
                first = time.perf_counter() - start if first is None else first
            firsts.append(first or 0.0)
            waits.append(time.perf_counter() - arrived[-1])
            seconds.append(arrived[-1] - start)
        found |= {
            f"first words, {name}, s": round(statistics.median(firsts), 3),
            f"all words after the last token, {name}, ms": round(1000 * statistics.median(waits)),
            f"upstream, {name}, s": round(statistics.median(seconds), 2),
        }
    return found


def show(report: dict[str, Any]) -> None:
    """Print a table, with a column for each kind or rate."""
    columns = report.get("kinds") or {f"{one['tokens a second']} tokens/s": one for one in report["rates"]}
    table = Table("", *columns)
    for name in next(iter(columns.values())):
        table.add_row(name, *(str(column[name]) for column in columns.values()))
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
