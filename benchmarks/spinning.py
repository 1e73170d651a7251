"""How long may idle threads of ONNX Runtime spin? The default aligner on a machine of its own, and beside busy processes.

    python benchmarks/spinning.py [--busy 2] [--kept 14] [--changed 4] [--turns 3] [--out benchmarks/results]

Each arm is the same aligner with another limit. The arms take turns. Given are medians of the turns: milliseconds of a call
alone, for answers that are kept and for others, and seconds of all of them at once; each by the clock.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from rich.console import Console
from rich.table import Table

from aligner_middleware import Aligner
from aligner_middleware.engine import onnx_session
from aligner_middleware.locations import DEFAULT_FOLDER

Pair = tuple[str, str]
ARMS: Mapping[str, object] = {
    "own": "of ONNX Runtime",
    "0": 0,
    "5": 5,
    "20": 20,
    "100": 100,
}  # what it cannot read it leaves


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Keep processes running that never wait."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def timed(aligner: Aligner, kept: Sequence[Pair], changed: Sequence[Pair]) -> dict[str, float]:
    """Time calls one after the other, and all at once."""
    found = {}
    for name, pairs in (("kept, ms", kept), ("changed, ms", changed)):
        start = time.perf_counter()
        for pair in pairs:
            aligner.correct(*pair)
        found[name] = 1000 * (time.perf_counter() - start) / len(pairs)
    start = time.perf_counter()
    aligner.correct_batch([*kept, *changed])
    return found | {"all at once, s": time.perf_counter() - start}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--busy", type=int, default=2, help="processes beside it, in the second part")
    parser.add_argument("--kept", type=int, default=14, help="answers that are kept")
    parser.add_argument("--changed", type=int, default=4, help="answers that are changed")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    lines = (DEFAULT_FOLDER / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    aligners = {}
    for name, limit in ARMS.items():
        with patch.object(onnx_session, "_SPIN", limit):
            aligners[name] = Aligner.load()
    judge = aligners["20"]
    kept: list[Pair] = []
    changed: list[Pair] = []
    for row in rows[:: len(rows) // (4 * (options.kept + options.changed))]:
        pair = row["question"], row["answer"]
        (changed if judge.correct(*pair).changed else kept).append(pair)
    table: list[dict[str, Any]] = []
    for beside in (0, options.busy):
        turns: list[dict[str, dict[str, float]]] = []
        with busy_processes(beside):
            for _ in range(options.turns):
                turns.append(
                    {
                        name: timed(aligner, kept[: options.kept], changed[: options.changed])
                        for name, aligner in aligners.items()
                    }
                )
        for name in ARMS:
            medians = {figure: statistics.median(turn[name][figure] for turn in turns) for figure in turns[0][name]}
            table.append({"busy processes": beside, "spins, µs": name} | medians)
    shown = Table(*table[0])
    for line in table:
        shown.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in line.values()))
    Console(width=120).print(shown)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "spinning.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
