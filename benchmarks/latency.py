"""What a correction costs, beside every rival, on the same weights, in one run.

    python benchmarks/latency.py [--lengths 32,128,256,512,2048] [--repeats 3] [--out benchmarks/results]

The prompt is the aligner's own, with a question and a real answer of so many tokens in it. What is written after it is

- unchanged: the answer once more;
- edited: the answer with another sentence in its middle;
- rewritten: another text of the same length.

Ours decides first: what is unchanged is kept by its verdict, an edit is written as operations on sentences. `copy` is how an
aligner without verdicts writes it on the same engine, `draft=False` the same without a draft.

Every engine runs in a process of its own, which gives its peak memory, and the processes take turns, so that a noisy machine
is noisy for all. The first round warms up; medians of the others are given. From 512 tokens on one round has to do, and an
engine that would take over a minute, going by the length before, is left out. A table, `latency.json` and `latency.png`
come out.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import traceback
from collections import defaultdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import rivals
from rich.console import Console
from rich.progress import track
from rich.table import Table

from aligner_middleware.artifact import TOKENIZER_FILE
from aligner_middleware.locations import DEFAULT_FOLDER, cached_folder
from aligner_middleware.text.template import DEFAULT, encode_prompt
from aligner_middleware.text.tokenizer import Tokenizer

CASES = ("unchanged", "edited", "rewritten")
PATIENCE = 60  # seconds
QUESTION = "Could you give me a few examples?"


def main() -> None:
    """Run the benchmark."""
    options = parse()
    lengths = [int(length) for length in options.lengths.split(",")]
    rivals.make_all(options.engines.split(";"))
    tasks = {length: texts(length) for length in lengths}
    workers = {name: Worker(name) for name in options.engines.split(";")}
    plan = [
        (repeat, length, case, name)
        for length in lengths
        for repeat in (range(options.repeats + 1) if length < 512 else (1,))
        for case in CASES
        for name in workers
        if case == "unchanged" or name in rivals.DRAFTED
    ]
    found: dict[tuple[str, int, str], list[rivals.Written]] = defaultdict(list)
    expected: dict[tuple[str, str], float] = {}  # seconds for a token
    for repeat, length, case, name in track(plan, "measuring", console=Console(stderr=True)):
        if length < 512 or expected.get((name, case), 0) * length < PATIENCE:
            written = workers[name].write(*tasks[length][case])
            expected[name, case] = written.seconds / length
            found[name, length, case] += [written] if repeat else []
    results = [
        {
            "engine": name,
            "answer_tokens": length,
            "case": case if name in rivals.DRAFTED else "any",
            "ms": 1000 * statistics.median(written.seconds for written in runs),
            "passes": runs[0].passes,
            "accepted": runs[0].accepted,
        }
        for (name, length, case), runs in found.items()
    ]
    memory = {name: worker.peak_memory() for name, worker in workers.items()}
    report = {"machine": machine(options.repeats), "peak_memory_mb": memory, "results": results}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "latency.json").write_text(json.dumps(report, indent=1) + "\n")
    show(report)
    plot(report, options.out / "latency.png")


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--lengths", default="32,128,256,512,2048", help="tokens in an answer, separated by commas")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--engines", default=";".join(rivals.ENGINES), help="separated by semicolons")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    return parser.parse_args()


def texts(length: int) -> dict[str, tuple[list[int], list[int], list[int]]]:
    """Make prompt, target and draft of each case from real answers."""
    tokenizer = Tokenizer.from_file(cached_folder("default", "int8") / TOKENIZER_FILE)
    ids = tokenizer.encode("\n\n".join(good_answers()))
    answer, other = ids[:length], ids[-length - 200 : -200]
    sentence = ids[-40 : -40 + max(6, min(24, length // 5))]
    at = (length - len(sentence)) // 2
    edited = answer[:at] + sentence + answer[at + len(sentence) :]
    if "".join(tokenizer.decode(ids) for ids in (answer, edited)).count("\ufffd"):
        raise ValueError(f"an answer of {length} tokens ends within a character: choose another length")
    prompt = encode_prompt(tokenizer, DEFAULT, QUESTION, tokenizer.decode(answer))
    targets = {"unchanged": answer, "edited": edited, "rewritten": other}
    return {case: (prompt, target, answer) for case, target in targets.items()}


def good_answers() -> list[str]:
    """Give the longer ones of the answers that the default aligner learnt to keep."""
    rows = map(json.loads, (DEFAULT_FOLDER / "corrections.jsonl").read_text(encoding="utf-8").splitlines())
    return [row["answer"] for row in rows if row["kind"] == "keep" and len(row["answer"]) > 200]


class Worker:
    """An engine in a process of its own."""

    def __init__(self, name: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._name = name
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(name, theirs), daemon=True)
        self._process.start()
        self._receive()

    def write(self, prompt: list[int], target: list[int], draft: list[int]) -> rivals.Written:
        """Have the engine write a text."""
        self._pipe.send((prompt, target, draft))
        written = self._receive()
        assert isinstance(written, rivals.Written)
        return written

    def peak_memory(self) -> int:
        """Give the most memory that it ever held, in MB."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) // 1000

    def _receive(self) -> Any:
        answer = self._pipe.recv()
        if isinstance(answer, str):
            raise RuntimeError(f"{self._name}: {answer}")
        return answer


def serve(name: str, pipe: Connection) -> None:
    """Load an engine and answer calls."""
    try:
        engine = rivals.ENGINES[name]()
        pipe.send(True)
        while True:
            pipe.send(engine.write(*pipe.recv()))
    except EOFError:
        return
    except Exception:
        pipe.send(traceback.format_exc())


def show(report: dict[str, Any]) -> None:
    """Print a table for each length."""
    lengths = dict.fromkeys(row["answer_tokens"] for row in report["results"])
    for length in lengths:
        rows = [row for row in report["results"] if row["answer_tokens"] == length]
        ours = {row["case"]: row["ms"] for row in rows if row["engine"] == "ours int8"}
        table = Table(title=f"an answer of {length} tokens: ms (times ours int8)")
        for column in ("engine", *CASES, "passes, accepted", "MB at most"):
            table.add_column(column, justify="left" if column == "engine" else "right")
        for engine in dict.fromkeys(row["engine"] for row in rows):
            of = {row["case"]: row for row in rows if row["engine"] == engine}
            cells = [of.get(case, of.get("any")) for case in CASES]
            told = [f"{row['passes']}, {row['accepted']}" for row in cells if row and row["accepted"] is not None]
            times = [
                f"{row['ms']:.0f} ({row['ms'] / ours[case]:.1f})" if row else ""
                for case, row in zip(CASES, cells, strict=True)
            ]
            table.add_row(engine, *times, " | ".join(told), str(report["peak_memory_mb"][engine]))
        Console(width=150).print(table)


def plot(report: dict[str, Any], path: Path) -> None:
    """Draw time against length, a panel for each case."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 5), sharey=True)
    for axis, case in zip(axes, CASES, strict=True):
        for engine in dict.fromkeys(row["engine"] for row in report["results"]):
            points = sorted(
                (row["answer_tokens"], row["ms"] / 1000)
                for row in report["results"]
                if row["engine"] == engine and row["case"] in (case, "any")
            )
            style = {"linewidth": 3, "marker": "o"} if engine == "ours int8" else {"linewidth": 1, "marker": "."}
            axis.plot(*zip(*points, strict=True), label=engine, **style)
        axis.set(xscale="log", yscale="log", title=case, xlabel="tokens in the answer")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("seconds a correction")
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def machine(repeats: int) -> dict[str, Any]:
    """Name what it ran on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {"cpu": names[0] if names else platform.processor(), "cores": os.cpu_count(), "repeats": repeats}


if __name__ == "__main__":
    main()
