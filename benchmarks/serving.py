"""The default aligner as a service: start, memory, concurrent calls, streaming upstreams, the event loop.

    python benchmarks/serving.py [--out benchmarks/results]

- start: seconds to import the package and to load a built aligner, each in fresh processes (medians of 5);
- memory: resident at most, in a fresh process that corrects 8 answers of 512 tokens at once;
- concurrent: answers a second, 16 at once and one after the other: held-out rows as they are, their verdicts alone
  (`strength=1.0` keeps all), and all of them corrected (`strength=0.0`);
- streaming: how long a caller waits after the last word of an answer of about 256 tokens that arrives at 30 tokens a second
  and needs no correction, handed on as it arrives, and handed over at its end;
- event loop: the longest time that other tasks of the loop had to wait while 32 corrections ran.

A table and `serving.json` come out.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from latency import good_answers, machine
from rich.console import Console
from rich.table import Table

from aligner_middleware import Aligner
from aligner_middleware.artifact import TOKENIZER_FILE
from aligner_middleware.locations import DEFAULT_FOLDER, cached_folder
from aligner_middleware.text.tokenizer import Tokenizer

QUESTION = "Could you give me a few examples?"
IMPORT = "import aligner_middleware"
LOAD = "from aligner_middleware import Aligner; start = time.perf_counter(); Aligner.load()"


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    Aligner.load().close()  # builds it, if need be
    found = {
        "import, s": in_fresh_process(IMPORT),
        "import of AlignerRunnable, s": in_fresh_process("from aligner_middleware import AlignerRunnable"),
        "load, s": in_fresh_process(LOAD),
        "memory after loading, MB": memory(0),
        "memory at most, 8 answers of 512 tokens at once, MB": memory(8),
        **concurrent(),
        **streaming(),
        **asyncio.run(event_loop()),
    }
    table = Table("measure", "figure")
    for name, value in found.items():
        table.add_row(name, f"{value:.4g}")
    Console(width=110).print(table)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "serving.json").write_text(json.dumps({"machine": machine(5), "results": found}, indent=1) + "\n")


def in_fresh_process(code: str) -> float:
    """Time some code in processes of its own, in seconds."""
    program = f"import time; start = time.perf_counter(); {code}; print(time.perf_counter() - start)"
    runs = [subprocess.run([sys.executable, "-c", program], capture_output=True, check=True) for _ in range(5)]
    return statistics.median(float(run.stdout) for run in runs)


def memory(at_once: int) -> float:
    """Measure the peak of a fresh process that corrects so many long answers at once, in MB."""
    program = f"import serving; serving.correct_long({at_once})"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, cwd=Path(__file__).parent)
    return float(run.stdout)


def correct_long(at_once: int) -> None:
    """Correct answers of 512 tokens and print the most memory that this process held."""
    with Aligner.load() as aligner, ThreadPoolExecutor(max(1, at_once)) as pool:
        answer = long_answer(512) if at_once else ""
        list(pool.map(lambda n: aligner.correct(f"{QUESTION} {n} of them.", answer), range(at_once)))
    status = Path("/proc/self/status").read_text().splitlines()
    print(int(next(line for line in status if line.startswith("VmHWM")).split()[1]) / 1000)


def long_answer(tokens: int, start: int = 0) -> str:
    """Join good answers, from one on, to an answer of so many tokens."""
    tokenizer = Tokenizer.from_file(cached_folder("default", "int8") / TOKENIZER_FILE)
    return tokenizer.decode(tokenizer.encode("\n\n".join(good_answers()[start : start + tokens // 30]))[:tokens])


def concurrent() -> dict[str, float]:
    """Correct the same rows one after the other and 16 at once."""
    lines = (DEFAULT_FOLDER / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [(row["question"], row["answer"]) for row in map(json.loads, lines)]
    rows = [row for row in rows if len(row[1]) > 100][:64]
    found = {}
    for name, strength in (("held-out rows", "medium"), ("verdicts alone", 1.0), ("all corrected", 0.0)):
        with Aligner.load() as aligner, ThreadPoolExecutor(16) as pool:
            correct = partial(aligner.correct, strength=strength)  # type: ignore[arg-type]
            aligner.correct_batch(rows[:16])
            start = time.perf_counter()
            one_by_one = [correct(*row) for row in rows]
            alone = time.perf_counter() - start
            start = time.perf_counter()
            at_once = list(pool.map(lambda row, correct=correct: correct(*row), rows))
            together = time.perf_counter() - start
        found[f"{name}: answers a second, one at a time"] = len(rows) / alone
        found[f"{name}: answers a second, 16 at once"] = len(rows) / together
        found[f"{name}: gain"] = alone / together
        same = sum(a.corrected == b.corrected for a, b in zip(one_by_one, at_once, strict=True))
        found[f"{name}: same result, of {len(rows)}"] = same
    return found


def streaming() -> dict[str, float]:
    """Wait for the correction of an answer that arrives word by word."""
    with Aligner.load() as aligner:
        answers = (long_answer(256, start) for start in range(200))
        answer = next(answer for answer in answers if aligner.correct(QUESTION, answer).usage.passes == 1)
    words = answer.split(" ")
    pause = 256 / 30 / len(words)
    ended = [0.0]

    def arriving() -> Iterator[str]:
        for place, word in enumerate(words):
            time.sleep(pause)
            yield word if place == 0 else " " + word
        ended[0] = time.perf_counter()

    waits: dict[str, list[float]] = {"as it arrives": [], "at its end": []}
    passes = 0
    with Aligner.load() as aligner:
        aligner.correct(QUESTION, answer)
        for _ in range(3):
            for _ in aligner.stream(QUESTION, arriving()):
                pass
            waits["as it arrives"].append(time.perf_counter() - ended[0])
            start = time.perf_counter()
            passes = aligner.correct(QUESTION, answer).usage.passes
            waits["at its end"].append(time.perf_counter() - start)
    found = {f"streaming upstream, wait when read {how}, ms": 1000 * statistics.median(w) for how, w in waits.items()}
    first, second = found.values()
    return found | {"streaming upstream, share of the wait": first / second, "streaming upstream, passes": passes}


async def event_loop() -> dict[str, float]:
    """Watch an event loop while corrections run."""
    longest, running = 0.0, True

    async def watch() -> None:
        nonlocal longest
        while running:
            start = time.perf_counter()
            await asyncio.sleep(0.001)
            longest = max(longest, time.perf_counter() - start - 0.001)

    lines = (DEFAULT_FOLDER / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [(row["question"], row["answer"]) for row in map(json.loads, lines[:320:10])]
    with Aligner.load() as aligner:
        await aligner.acorrect(*rows[0])
        watcher = asyncio.create_task(watch())
        await aligner.acorrect_batch(rows)
        running = False
        await watcher
    return {"event loop, longest wait of other tasks, ms": 1000 * longest}


if __name__ == "__main__":
    main()
