"""Requests by wrk, for `serve_load.py`: where they go, what is in them, and what came of them."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import serve_arms as arms

SCRIPT = arms.HERE / "serve_load.lua"
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
        measured: Found = json.loads(line.removeprefix("RESULT "))
        return measured | self._noted(folder / "samples")

    @contextlib.contextmanager
    def sending(self, folder: Path, at_once: int, seconds: float, pause: float = 0) -> Iterator[subprocess.Popen[str]]:
        """Have wrk send requests, and stop it."""
        bodies = [self.body(question) for question, _ in arms.held_out()]
        (folder / "bodies").write_text("".join(json.dumps(body) + "\n" for body in bodies))
        url = f"{self.server.url}/v1/chat/completions"
        options = [
            "-t1",
            f"-c{at_once}",
            f"-d{seconds:.0f}s",
            "--timeout",
            "120s",
            "-H",
            f"Authorization: Bearer {self.key}",
        ]
        command = [
            "wrk",
            *options,
            "-s",
            str(SCRIPT),
            url,
            "--",
            str(folder / "bodies"),
            str(folder / "samples"),
            str(pause),
        ]
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
        found: Found = {"status": dict(Counter(row[0] for row in rows))}
        found["retry_after"] = dict(Counter(row[4] for row in rows if row[4] != "-"))
        timed = [tuple(map(float, row[1:4])) for row in rows if row[0] == "200" and float(row[1]) > 0]
        found |= percentiles("overhead_p", [latency - aligned for latency, _, aligned in timed])
        return found | percentiles("beyond_engine_p", [latency - engine for latency, engine, _ in timed])


def percentiles(name: str, values: Sequence[float]) -> Found:
    """Give some percentiles of numbers, and the largest as the 100th; none, where there are no numbers."""
    if not values:
        return {}
    ordered = sorted(values)
    found = {f"{name}{share}": ordered[min(len(ordered) - 1, len(ordered) * share // 100)] for share in (50, 95, 99)}
    return found | {f"{name}100": ordered[-1]}


def ours(server: arms.Server) -> dict[str, Arm]:
    """Give the arms of the service."""
    return {
        "deciding nothing": Arm(server, arms.KEY + "correct", {"response_format": {"type": "json_object"}}),
        "shadow": Arm(server, arms.KEY + "shadow", decides=True),
        "correcting": Arm(server, arms.KEY + "correct", decides=True),
    }
