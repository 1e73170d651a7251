"""Does the simulation of `fleet.py` predict this machine? The default aligner under Poisson load, measured and predicted.

    aligner correct rows.jsonl --out corrected.jsonl
    python benchmarks/scale_check.py corrected.jsonl [--use 0.3 0.6] [--seconds 60] [--threads 1] [--out benchmarks/results]

The times of a step are fitted to single calls. Then rows drawn at random arrive by a Poisson process in one event loop, and
their latencies are compared with those of a simulated server with the same times, verdicts and passes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from fleet import Machine, Result, Scenario, Simulation
from scale import show, works_of

from aligner_middleware import Aligner, Usage
from aligner_middleware.engine.decode import _PROMPT_TOKENS, _ROWS, _SHARED

Pair = tuple[str, str]


@dataclass(frozen=True)
class OwnEngine(Machine):
    """A server that makes one pass over new prompts and one over sequences that write, in each step.

    Attributes:
        decoding: Seconds of a pass that writes a token of one sequence; each further row adds a share of that.
    """

    decoding: float = 0.0

    def step(self, prefilled: int, decoding: int, context: int) -> float:
        """Add the seconds of both passes."""
        prefill = self.overhead + self.per_token * prefilled if prefilled else 0.0
        return prefill + (self.decoding * (1 + _SHARED * (decoding - 1)) if decoding else 0.0)


def fitted(aligner: Aligner, kept: Sequence[Pair], written: Sequence[Pair]) -> OwnEngine:
    """Fit the times of a step to calls one after the other: of answers that are kept, and of others."""

    def call(pair: Pair) -> tuple[float, Usage]:
        start = time.perf_counter()
        usage = aligner.correct(*pair).usage
        return time.perf_counter() - start, usage

    times = [(usage.prompt_tokens, seconds) for seconds, usage in map(call, kept)]
    tokens, whole = np.array(times).T
    per_token, overhead = np.polyfit(tokens, whole, 1)
    passes = [
        (seconds - overhead - per_token * usage.prompt_tokens) / max(1, usage.passes - 1)
        for seconds, usage in map(call, written)
    ]
    decoding = statistics.median(passes)
    return OwnEngine(
        float(per_token), overhead=float(overhead), decoding=float(decoding), budget=_PROMPT_TOKENS, rows=_ROWS
    )


async def loaded(aligner: Aligner, pairs: Sequence[Pair], rate: float, seconds: float, seed: int = 1) -> Result:
    """Let requests arrive, and measure their latencies."""
    chance, result, calls = random.Random(seed), Result([]), list[asyncio.Task[None]]()

    async def call(pair: Pair) -> None:
        start = time.perf_counter()
        await aligner.acorrect(*pair)
        result.latencies.append(time.perf_counter() - start)

    end = time.perf_counter() + seconds
    due = time.perf_counter()
    while (due := due + chance.expovariate(rate)) < end:
        await asyncio.sleep(due - time.perf_counter())
        calls.append(asyncio.create_task(call(chance.choice(pairs))))
    await asyncio.gather(*calls)
    return result


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("rows", type=Path, help="what `aligner correct … --out` wrote")
    parser.add_argument("--use", type=float, nargs="+", default=[0.3, 0.6], help="rate times a call's mean seconds")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--calls", type=int, default=60, help="to fit the times to")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = [
        row for line in options.rows.read_text(encoding="utf-8").splitlines() if (row := json.loads(line))["verdict"]
    ]
    pairs = {row["verdict"] == "keep": list[Pair]() for row in rows}
    for row in rows:
        pairs[row["verdict"] == "keep"].append((row["question"], row["original"]))
    table: list[dict[str, Any]] = []
    with Aligner.load(threads=options.threads) as aligner:
        for pair in pairs[True][: options.calls // 10]:
            aligner.correct(*pair)  # until memory and caches are warm
        machine = fitted(aligner, pairs[True][: options.calls // 2], pairs[False][: options.calls // 2])
        works = works_of(options.rows)
        mean = statistics.mean(machine.step(one.prompt, 0, 0) + one.passes * machine.step(0, 1, 0) for one in works)
        times = {"call": mean, "prompt": machine.overhead, "token of it": machine.per_token, "pass": machine.decoding}
        show("fitted, ms", [{name: 1000 * value for name, value in times.items()}])
        for use in options.use:
            scenario = Scenario(use / mean, 1, again=0.0, seconds=600)
            runs = {
                "measured": asyncio.run(loaded(aligner, [*pairs[True], *pairs[False]], scenario.rate, options.seconds)),
                "predicted": Simulation(machine, works, scenario).run(),
            }
            for name, run in runs.items():
                points = {f"p{round(100 * share)}, ms": 1000 * run.percentile(share) for share in (0.5, 0.95)}
                mean_ms = 1000 * statistics.mean(run.latencies)
                counts = {"rate": scenario.rate, "calls": len(run.latencies)}
                table.append({"load": use, "": name, **counts, "mean, ms": mean_ms, **points})
    show("latency", table)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "scale_check.json").write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
