"""How many GPUs hold a load of a 7 B aligner, with what latency and at what cost: tables from a simulation (`fleet.py`).

    aligner correct rows.jsonl --out corrected.jsonl
    python benchmarks/scale.py corrected.jsonl [--out benchmarks/results] [--seconds 20]

Lengths, verdicts and passes are those of the corrected rows, which the default aligner made: they are measured. The GPUs are
assumed: their peaks are the vendor's, and the shares of the peaks that are reached are the constants below
(docs/scale.md). Tables and `scale.json` come out.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fleet import POLICIES, TAIL, Machine, Scenario, Simulation, Work
from rich.console import Console
from rich.table import Table

GPUS = {"H100": (989e12, 3.35e12, 80e9, 2.5), "H200": (989e12, 4.8e12, 141e9, 3.5)}  # bf16 FLOP/s, bytes/s, bytes, $/h
PARAMETERS, LAYERS, WIDTH = 6.74e9, 32, 4096  # Llama 2 7B: each head has keys and values of its own
COMPUTE_SHARE, BANDWIDTH_SHARE, OVERHEAD = (
    0.5,
    0.65,
    0.003,
)  # of the peaks that are reached; seconds of a step beside it
LIMIT = 1.0  # seconds of the 99th percentile
BEST = "least loaded, prefix affinity"
CONSOLE = Console(width=120)


def kv_bytes(bits: int, kv_share: float = 1.0) -> float:
    """Give the bytes that keys and values of one token take."""
    return 2 * LAYERS * WIDTH * kv_share * bits / 8


def gpu(name: str = "H100", bits: int = 16, kv_share: float = 1.0, efficiency: float = 1.0) -> Machine:
    """Make the server of one GPU.

    Args:
        name: Of `GPUS`.
        bits: Of weights, keys and values, 16 or 8; products in 8 bits are twice as fast.
        kv_share: Heads with keys and values, as a share of all heads: 1 without grouped queries.
        efficiency: What is reached, as a share of what is assumed.
    """
    flops, bandwidth, memory, _ = GPUS[name]
    flops, bandwidth = flops * COMPUTE_SHARE * efficiency * 16 / bits, bandwidth * BANDWIDTH_SHARE * efficiency
    weights, kv = PARAMETERS * bits / 8, kv_bytes(bits, kv_share)
    room = int((memory * 0.9 - weights) / kv)
    return Machine(2 * PARAMETERS / flops, weights / bandwidth, kv / bandwidth, OVERHEAD, room)


def works_of(path: Path) -> list[Work]:
    """Read what each corrected row cost: `aligner correct … --out` wrote them."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [
        Work(row["usage"]["prompt_tokens"], 0 if row["verdict"] == "keep" else row["usage"]["passes"] - 1)
        for row in rows
        if row["verdict"]
    ]


def measured(works: Sequence[Work]) -> dict[str, float]:
    """Summarise what was measured: tokens of prompts, verdicts, passes of corrections."""
    prompts = [work.prompt for work in works]
    passes = [work.passes for work in works if work.passes]
    return {
        "rows": len(works),
        "kept": sum(not work.passes for work in works) / len(works),
        "prompt_mean": statistics.mean(prompts),
        **{f"prompt_p{share}": percentile(prompts, share) for share in (50, 95, 99)},
        "passes_mean": statistics.mean(passes),
        **{f"passes_p{share}": percentile(passes, share) for share in (50, 95, 99)},
    }


def percentile(values: Sequence[float], share: int) -> float:
    """Give a percentile."""
    return statistics.quantiles(values, n=100, method="inclusive")[share - 1]


def fewest(machine: Machine, works: Sequence[Work], scenario: Scenario) -> tuple[int | None, dict[str, float]]:
    """Find the fewest servers whose 99th percentile is within `LIMIT`, from those up that the arithmetic alone takes.

    Returns:
        How many, and their latencies; `None`, and those of very many, where a correction alone takes longer.
    """
    found: dict[int, dict[str, float]] = {}

    def holds(servers: int) -> bool:
        found[servers] = Simulation(machine, works, replace(scenario, servers=servers)).run().row()
        return found[servers]["p99"] <= LIMIT

    tokens = statistics.mean(TAIL * scenario.again + one.prompt * (1 - scenario.again) + one.passes for one in works)
    low = int(scenario.rate * machine.per_token * tokens)
    high = low + 1 + low // 16
    many = 4 * high + 4
    while not holds(high):
        if high > many:
            return None, found[high]
        low, high = high, high + 1 + high // 4
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high, found[high]


def sized(machine: Machine, price: float, works: Sequence[Work], scenario: Scenario) -> dict[str, Any]:
    """Find how many GPUs hold a load, and what a million answers cost at so many dollars for an hour of one."""
    servers, row = fewest(machine, works, scenario)
    cost = None if servers is None else round(servers * price / 3600 / scenario.rate * 1e6, 2)
    return {"gpus": servers, **row, "dollars a million": cost}


def compared(servers: int, seconds: float) -> Iterator[tuple[str, str, Scenario]]:
    """Name loads and policies to compare on one fleet at a thousand requests a second."""
    base = Scenario(1000, servers, seconds=seconds)
    loads = {
        "steady": base,
        "bursts": replace(base, burst=2.0),
        "50 clients, each with its list": replace(base, routers=50),
        "a server drains": replace(base, event="drains"),
        "a server dies": replace(base, event="dies"),
    }
    for load, scenario in loads.items():
        for policy in POLICIES:
            yield load, policy, replace(scenario, policy=policy)


def show(title: str, rows: Sequence[dict[str, Any]]) -> None:
    """Print rows as a table."""
    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    CONSOLE.print(table)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("rows", type=Path, help="what `aligner correct … --out` wrote")
    parser.add_argument("--seconds", type=float, default=20, help="simulated, of each run")
    parser.add_argument("--rates", type=int, nargs="+", default=[100, 1000, 10000])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    works = works_of(options.rows)
    results: dict[str, Any] = {"measured": measured(works)}
    show("measured", [results["measured"]])
    results["machines"] = [
        {"gpu": name, "bits": bits, "kv_bytes_a_token": kv_bytes(bits)} | asdict(gpu(name, bits))
        for name in GPUS
        for bits in (16, 8)
    ]
    results["sizes"] = [
        {"gpu": name, "bits": bits, "rate": rate}
        | sized(
            gpu(name, bits),
            GPUS[name][3],
            works,
            Scenario(rate, 0, BEST, seconds=options.seconds * min(1, 5000 / rate)),
        )
        for name in GPUS
        for bits in (16, 8)
        for rate in options.rates
    ]
    show(f"p99 within {LIMIT:g} s", results["sizes"])
    base = Scenario(1000, 0, BEST, seconds=options.seconds)
    variants = {
        "as assumed": (gpu(), works, base),
        "half of the peaks' shares": (gpu(efficiency=0.5), works, base),
        "an eighth of the heads' keys and values": (gpu(kv_share=0.125), works, base),
        "prompts of three times the length": (gpu(), [replace(one, prompt=3 * one.prompt) for one in works], base),
        "all answers corrected": (gpu(), [one for one in works if one.passes], base),
        "no prompt twice": (gpu(), works, replace(base, again=0.0)),
        "bursts": (gpu(), works, replace(base, burst=2.0)),
    }
    price = GPUS["H100"][3]
    results["variants"] = [
        {"": name} | sized(machine, price, rows, scenario) for name, (machine, rows, scenario) in variants.items()
    ]
    show("1,000 requests a second on H100s, bf16", results["variants"])
    servers = results["variants"][0]["gpus"] + 2
    results["policies"] = [
        {"load": load, "policy": policy} | Simulation(gpu(), works, scenario).run().row()
        for load, policy, scenario in compared(servers, options.seconds)
    ]
    show(f"1,000 requests a second, {servers} H100s, bf16", results["policies"])
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "scale.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
