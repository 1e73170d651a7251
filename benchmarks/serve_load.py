"""`aligner serve` under load, beside LiteLLM's proxy, NeMo Guardrails' server, and the aligner without a service.

    python benchmarks/serve_load.py [PART …] [--seconds 10] [--at-once 1 8 32] [--litellm PROGRAM] [--nemo PROGRAM]

The load generator is wrk; the upstream is a stub that gives held-out answers at once (`serve_arms.py`); everything listens on
this machine's loopback. Each part runs for a few minutes at most, and replaces its own results in `serve.json`:

- compare: latency of the stub alone, of the service that decides nothing (a structured answer is asked for), in shadow mode
  and correcting, of LiteLLM's proxy alone and of NeMo's server without rails, in turns. The overhead of a request is its
  latency less the aligner's own time (`usage.seconds`), which its response tells;
- rate: answers a second of `Aligner.acorrect` in this process and through the service, in turns, and what happens at twice
  that rate, with arrivals at random from 600 connections;
- memory: what the service holds, after every 1,000 of 20,000 requests that decide nothing, then of `--decided` in shadow mode;
- streams: 500 streams at once, whose answers come word by word over 60 to 240 seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import random
import statistics
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import serve_arms as arms
from latency import machine
from rich.console import Console
from rich.table import Table

from aligner_middleware import Aligner

SCRIPT = arms.HERE / "serve_load.lua"
CONNECTIONS = 600  # of arrivals at random: with so many, what waits hardly slows down what arrives
Found = dict[str, Any]


@dataclass(frozen=True)
class Arm:
    """Where requests go, and what is in them beside the question."""

    server: arms.Server
    key: str = ""
    more: Found | None = None
    decides: bool = False

    def load(self, folder: Path, at_once: int, seconds: float, pause: float = 0) -> Found:
        """Send requests by wrk, and give what it measured; times are in ms."""
        with self.sending(folder, at_once, seconds, pause) as wrk:
            out, _ = wrk.communicate()
        line = next(line for line in out.splitlines() if line.startswith("RESULT "))
        return json.loads(line.removeprefix("RESULT ")) | self._noted(folder / "samples")

    @contextlib.contextmanager
    def sending(self, folder: Path, at_once: int, seconds: float, pause: float = 0) -> Iterator[subprocess.Popen[str]]:
        """Have wrk send requests, and stop it."""
        bodies = [self.body(question) for question, _ in arms.held_out()]
        (folder / "bodies").write_text("".join(json.dumps(body) + "\n" for body in bodies))
        url = f"{self.server.url}/v1/chat/completions"
        options = ["-t1", f"-c{at_once}", f"-d{seconds:.0f}s", "--timeout", "120s", "-H", f"Authorization: Bearer {self.key}"]
        command = ["wrk", *options, "-s", str(SCRIPT), url, "--", str(folder / "bodies"), str(folder / "samples"), str(pause)]
        wrk = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            yield wrk
        finally:
            wrk.terminate()
            wrk.wait(10)

    def body(self, question: str, **more: Any) -> Found:
        """Make the body of a request."""
        return {"model": arms.MODEL, "messages": [{"role": "user", "content": question}]} | (self.more or {}) | more

    def _noted(self, file: Path) -> Found:
        """Read what the script noted of each response."""
        rows = [line.split() for line in file.read_text().splitlines()]
        over = sorted(float(latency) - max(0.0, float(own)) for _, latency, own, _ in rows if float(latency) > 0)
        found: Found = {"status": dict(Counter(row[0] for row in rows))}
        found["retry_after"] = dict(Counter(row[3] for row in rows if row[3] != "-"))
        return found | {f"overhead_p{share}": percentile(over, share) for share in (50, 95, 99) if over}


def percentile(ordered: Sequence[float], share: int) -> float:
    """Give a percentile of numbers in order."""
    return ordered[min(len(ordered) - 1, len(ordered) * share // 100)]


def ours(server: arms.Server) -> dict[str, Arm]:
    """Give the arms of the service."""
    return {
        "deciding nothing": Arm(server, arms.KEY + "correct", {"response_format": {"type": "json_object"}}),
        "shadow": Arm(server, arms.KEY + "shadow", decides=True),
        "correcting": Arm(server, arms.KEY + "correct", decides=True),
    }


def compare(options: argparse.Namespace, folder: Path) -> Found:
    """Measure all arms in turns."""
    found: Found = {}
    with ExitStack() as stack:
        stub = stack.enter_context(arms.stub(folder))
        every = {"stub": Arm(stub)} | ours(stack.enter_context(arms.service(folder, stub)))
        if options.litellm:
            every["LiteLLM"] = Arm(stack.enter_context(arms.litellm(folder, stub, options.litellm)), arms.KEY)
        if options.nemo:
            server = stack.enter_context(arms.nemo(folder, stub, options.nemo))
            every["NeMo Guardrails"] = Arm(server, more={"guardrails": {"config_id": "passing"}})
        for arm in every.values():
            arm.load(folder, 2, 3)  # warms up
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
        per_second = statistics.mean(one["rate"] for one in alone)
        pause = CONNECTIONS / (2 * per_second)
        twice = arm.load(folder, CONNECTIONS, options.overload, pause)
    rates = [one["requests"] / one["seconds"] for one in through]
    return {"alone": alone, "through": through, "share": statistics.mean(rates) / per_second, "twice": twice}


async def in_process(aligner: Aligner, at_once: int, seconds: float) -> Found:
    """Correct the same answers in this process, so many at once."""
    pairs, end = itertools.cycle(arms.held_out()), time.perf_counter() + seconds
    latencies: list[float] = []

    async def one() -> None:
        for pair in pairs:
            start = time.perf_counter()
            await aligner.acorrect(*pair)
            if time.perf_counter() > end:
                return
            latencies.append(1000 * (time.perf_counter() - start))

    async with asyncio.TaskGroup() as group:
        for _ in range(at_once):
            group.create_task(one())
    latencies.sort()
    measured = {f"p{share}": percentile(latencies, share) for share in (50, 95, 99)}
    return {"rate": len(latencies) / seconds, **measured, "longest": latencies[-1]}


def memory(options: argparse.Namespace, folder: Path) -> Found:
    """Watch what the service holds while requests are answered."""
    found: Found = {}
    with arms.stub(folder) as stub, arms.service(folder, stub) as server:
        for name, count in (("deciding nothing", 20_000), ("shadow", options.decided)):
            arm, held, start = ours(server)[name], [server.megabytes()], served(server)
            with arm.sending(folder, 32, 3600):
                while (done := served(server) - start) < count:
                    time.sleep(0.2)
                    if done * 20 >= count * len(held):
                        held.append(server.megabytes())
            found[name] = {"requests": done, "megabytes": held}
            print(name, found[name], flush=True)
    return found


def served(server: arms.Server) -> int:
    """Ask the service how many chat completions it has answered."""
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    counts = [line for line in lines if line.startswith('aligner_requests_total{route="/v1/chat/completions",status="200"}')]
    return int(float(counts[0].split()[-1])) if counts else 0


def streams(options: argparse.Namespace, folder: Path) -> Found:
    """Open 500 streams at once, and read each to its end."""
    settings = {"concurrency": options.streams + 10, "keep_alive": 5, "correction_timeout": 240}
    with arms.stub(folder) as stub, arms.service(folder, stub, **settings) as server:
        arm = ours(server)["correcting"]
        arm.load(folder, 2, 3)
        before = server.megabytes()
        held: list[float] = []
        results = asyncio.run(all_streams(arm, options.streams, lambda: held.append(server.megabytes())))
        time.sleep(15)  # the aligner frees its cache after 10 seconds without work
        after = server.megabytes()
    silences = sorted(one["silence"] for one in results)
    return {
        "streams": len(results),
        "whole": sum(one["whole"] for one in results),
        "errors": dict(Counter(one["error"] for one in results if one["error"])),
        "longest_silence_s": silences[-1],
        "first_byte_s": max(one["first"] for one in results),
        "seconds": max(one["seconds"] for one in results),
        "after_the_last_word_p50_s": statistics.median(one["late"] for one in results),
        "after_the_last_word_longest_s": max(one["late"] for one in results),
        "megabytes": {"before": before, "most": max(held), "after": after},
    }


async def all_streams(arm: Arm, count: int, watch: Callable[[], None]) -> list[Found]:
    """Read so many streams at once; `watch` is called every second."""
    pairs, chance = itertools.cycle(arms.held_out()), random.Random(0)
    limits = httpx.Limits(max_connections=count)
    async with httpx.AsyncClient(limits=limits, timeout=300, headers={"Authorization": f"Bearer {arm.key}"}) as client:
        tasks = [asyncio.create_task(one_stream(client, arm, *next(pairs), chance.uniform(60, 240))) for _ in range(count)]
        while not all(task.done() for task in tasks):
            await asyncio.sleep(1)
            watch()
        return [task.result() for task in tasks]


async def one_stream(client: httpx.AsyncClient, arm: Arm, question: str, answer: str, seconds: float) -> Found:
    """Read one stream; tell how long it was silent, and whether its answer came whole."""
    body = arm.body(question, stream=True, metadata={"seconds": str(seconds)})
    start = last = time.perf_counter()
    silence, first, text, end, verdict, error = 0.0, 0.0, "", False, None, ""
    try:
        async with client.stream("POST", f"{arm.server.url}/v1/chat/completions", json=body) as response:
            error = "" if response.status_code == 200 else f"status {response.status_code}"
            async for line in response.aiter_lines():
                now = time.perf_counter()
                silence, last, first = max(silence, now - last), now, first or now - start
                if line == "data: [DONE]":
                    end = True
                elif line.startswith("data: "):
                    event = json.loads(line[6:])
                    error = error or str(event.get("error", ""))[:200]
                    for choice in event.get("choices", ()):
                        text += choice["delta"].get("content") or ""
                        verdict = choice.get("aligner", {}).get("verdict", verdict)
    except httpx.HTTPError as exc:
        error = type(exc).__name__
    took = time.perf_counter() - start
    whole = end and bool(text) and (verdict != "keep" or text == answer) and verdict is not None
    return {"silence": silence, "first": first, "seconds": took, "late": took - seconds, "whole": whole, "error": error}


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
    parser.add_argument("--litellm", type=Path, help="the program `litellm` of an environment of its own")
    parser.add_argument("--nemo", type=Path, help="the program `nemoguardrails` of an environment of its own")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    file = options.out / "serve.json"
    for part in options.parts:
        with tempfile.TemporaryDirectory() as folder:
            found = PARTS[part](options, Path(folder))
        kept = json.loads(file.read_text()) if file.is_file() else {}
        options.out.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(kept | {"machine": machine(1), part: found}, indent=1) + "\n")
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
            failed = run["broken"] + run["refused"]
            values = [f"{run[column]:.1f}" if column in run else "" for column in columns]
            table.add_row(name, at_once, f"{run['requests'] / run['seconds']:.1f}", *values, str(failed))
    return table


if __name__ == "__main__":
    main()
