"""`aligner serve` under load, beside LiteLLM's proxy, NeMo Guardrails' server, and the aligner without a service.

    python benchmarks/serve_load.py [PART …] [--seconds 10] [--at-once 1 8 32] [--litellm PROGRAM] [--nemo PROGRAM]

The load generator is wrk; the upstream is a stub that gives held-out answers at once (`serve_arms.py`); everything listens on
this machine's loopback. Each part runs for a few minutes at most, and replaces its own results in `serve.json`:

- compare: latency of the stub alone, of the service that decides nothing (a structured answer is asked for), in shadow mode
  and correcting, of LiteLLM's proxy alone, of NeMo's server without rails, and of `Aligner.acorrect` in this process, in
  turns. The overhead of a request is its latency less the time of its alignment (`x-aligner-duration-ms`);
- rate: answers a second of `Aligner.acorrect` in this process and through the service, in turns, and what happens at twice
  that rate, with arrivals at random from 600 connections;
- memory: what the service holds, after every 1,000 of 20,000 requests that decide nothing, then some in shadow mode;
- streams: 500 streams at once, whose answers come word by word, each over a time between `--over` seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import statistics
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx2
import serve_arms as arms
from latency import machine
from rich.console import Console
from rich.table import Table
from serve_streams import streams
from serve_wrk import Arm, Found, ours, percentiles

from aligner_middleware import Aligner

CONNECTIONS = 600  # of arrivals at random: with so many, what waits hardly slows down what arrives


def compare(options: argparse.Namespace, folder: Path) -> Found:
    """Measure all arms in turns."""
    found: Found = {}
    with Aligner.load() as aligner, ExitStack() as stack:
        stub = stack.enter_context(arms.stub(folder))
        every = {"stub": Arm(stub)} | ours(stack.enter_context(arms.service(folder, stub)))
        if options.litellm:
            every["LiteLLM"] = Arm(stack.enter_context(arms.litellm(folder, stub, options.litellm)), arms.KEY)
        if options.nemo:
            server = stack.enter_context(arms.nemo(folder, stub, options.nemo))
            every["NeMo Guardrails"] = Arm(server, more={"guardrails": {"config_id": "passing"}})
        for arm in every.values():
            arm.load(folder, 2, 3)  # warms up
        asyncio.run(in_process(aligner, 2, 3))
        for at_once in options.at_once:
            found.setdefault("acorrect", {})[str(at_once)] = asyncio.run(in_process(aligner, at_once, options.seconds))
        for at_once, (name, arm) in itertools.product(options.at_once, every.items()):
            before, stubs = arm.server.cpu(), stub.cpu()
            measured = arm.load(folder, at_once, options.seconds if arm.decides else options.seconds / 2)
            arm.server.settle()
            answered = max(1, measured["status"].get("200", 0))
            measured["cpu_ms"] = 1000 * (arm.server.cpu() - before) / answered
            measured["stub_cpu_ms"] = 1000 * (stub.cpu() - stubs) / answered
            found.setdefault(name, {})[str(at_once)] = measured
            print(name, at_once, measured, flush=True)
    return found


def rate(options: argparse.Namespace, folder: Path) -> Found:
    """Compare rates, and send twice as many requests as can be answered."""
    alone: list[Found] = []
    through: list[Found] = []
    with arms.stub(folder) as stub, arms.service(folder, stub) as server, Aligner.load() as aligner:
        arm = ours(server)["correcting"]
        arm.load(folder, 2, 3)
        for _ in range(2):
            alone.append(asyncio.run(in_process(aligner, 32, options.seconds)))
            through.append(arm.load(folder, 32, options.seconds))
            server.settle()
            print(alone[-1], through[-1], flush=True)
        per_second = statistics.mean(one["requests"] / one["seconds"] for one in alone)
        pause = CONNECTIONS / (2 * per_second)
        twice = arm.load(folder, CONNECTIONS, options.overload, pause)
    rates = [one["requests"] / one["seconds"] for one in through]
    return {"alone": alone, "through": through, "share": statistics.mean(rates) / per_second, "twice": twice}


async def in_process(aligner: Aligner, at_once: int, seconds: float) -> Found:
    """Correct the same answers in this process, so many at once."""
    pairs = itertools.cycle(arms.held_out())
    latencies, over = list[float](), list[float]()

    async def one() -> None:
        for pair in pairs:
            start = time.perf_counter()
            correction = await aligner.acorrect(*pair)
            latencies.append(1000 * (time.perf_counter() - start))
            over.append(latencies[-1] - 1000 * correction.usage.seconds)

    with suppress(TimeoutError):
        async with asyncio.timeout(seconds), asyncio.TaskGroup() as group:
            for _ in range(at_once):
                group.create_task(one())
    measured = percentiles("p", latencies) | percentiles("beyond_engine_p", over)
    return {"requests": len(latencies), "seconds": seconds} | measured


def memory(options: argparse.Namespace, folder: Path) -> Found:
    """Watch what the service holds while requests are answered."""
    found: Found = {}
    with arms.stub(folder) as stub, arms.service(folder, stub) as server:
        for name, count in (("deciding nothing", 20_000), ("shadow", options.decided)):
            arm, held, start = ours(server)[name], [server.megabytes()], served(server)
            with arm.sending(folder, 32, 3600):
                while (done := served(server) - start) < count:
                    time.sleep(0.5)
                    if done * 20 >= count * len(held):
                        held.append(server.megabytes())
            found[name] = {"requests": done, "megabytes": held}
            print(name, found[name], flush=True)
    return found


def served(server: arms.Server) -> int:
    """Ask the service how many chat completions it has answered."""
    lines = httpx2.get(f"{server.url}/metrics").text.splitlines()
    counts = [
        line for line in lines if line.startswith('aligner_requests_total{route="/v1/chat/completions",status="200"}')
    ]
    return int(float(counts[0].split()[-1])) if counts else 0


PARTS = {"compare": compare, "rate": rate, "memory": memory, "streams": streams}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seconds", type=float, default=10, help="of each arm")
    parser.add_argument("--overload", type=float, default=100, help="seconds at twice the rate")
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--decided", type=int, default=1000, help="requests in shadow mode, of memory")
    parser.add_argument("--streams", type=int, default=500)
    parser.add_argument("--over", type=float, nargs=2, default=[60, 240], help="seconds that an answer takes to come")
    parser.add_argument("--litellm", type=Path, help="the program `litellm` of an environment of its own")
    parser.add_argument("--nemo", type=Path, help="the program `nemoguardrails` of an environment of its own")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    file = options.out / "serve.json"
    for part in options.parts:
        load = os.getloadavg()[0]  # of the machine beside this
        with tempfile.TemporaryDirectory() as folder:
            found = PARTS[part](options, Path(folder))
        kept = json.loads(file.read_text()) if file.is_file() else {}
        options.out.mkdir(parents=True, exist_ok=True)
        file.write_text(
            json.dumps(kept | {"machine": machine(1), part: found | {"load_average": load}}, indent=1) + "\n"
        )
        if part == "compare":
            Console(width=130).print(as_table(found))
        else:
            print(json.dumps(found, indent=1))


def as_table(found: Found) -> Table:
    """Make a table of the arms."""
    columns = ("p50", "p95", "p99", "overhead_p50", "overhead_p95", "overhead_p99", "cpu_ms")
    table = Table("arm", "at once", "requests/s", *columns, "failed")
    for name, runs in found.items():
        for at_once, run in runs.items():
            failed = run.get("broken", 0) + run.get("refused", 0)
            values = [f"{run[column]:.1f}" if column in run else "" for column in columns]
            table.add_row(name, at_once, f"{run['requests'] / run['seconds']:.1f}", *values, str(failed))
    return table


if __name__ == "__main__":
    main()
