"""Many open streams at once, for `serve_load.py`. wrk sees no bytes before the last, so these are read by httpx2."""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import httpx2
import serve_arms as arms
from serve_wrk import Arm, Found, ours


def streams(options: argparse.Namespace, folder: Path) -> Found:
    """Open 500 streams at once, and read each to its end."""
    settings = {
        "concurrency": options.streams + 10,
        "keep_alive": 5,
        "correction_timeout": 240,
    }  # many answers may end together
    with arms.stub(folder) as stub, arms.service(folder, stub, **settings) as server:
        arm = ours(server)["correcting"]
        arm.load(folder, 2, 3)
        before = server.megabytes()
        held: list[float] = []
        results = asyncio.run(all_streams(arm, options.streams, options.over, lambda: held.append(server.megabytes())))
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


async def all_streams(arm: Arm, count: int, over: Sequence[float], watch: Callable[[], None]) -> list[Found]:
    """Read so many streams at once; `watch` is called every second."""
    pairs, chance = itertools.cycle(arms.held_out()), random.Random(0)
    limits = httpx2.Limits(max_connections=count)
    async with httpx2.AsyncClient(limits=limits, timeout=300, headers={"Authorization": f"Bearer {arm.key}"}) as client:
        tasks = [
            asyncio.create_task(one_stream(client, arm, *next(pairs), chance.uniform(*over))) for _ in range(count)
        ]
        while not all(task.done() for task in tasks):
            await asyncio.sleep(1)
            watch()
        return [task.result() for task in tasks]


async def one_stream(client: httpx2.AsyncClient, arm: Arm, question: str, answer: str, seconds: float) -> Found:
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
    except httpx2.HTTPError as exc:
        error = type(exc).__name__
    took = time.perf_counter() - start
    whole = end and bool(text) and (verdict != "keep" or text == answer) and verdict is not None
    return {"silence": silence, "first": first, "seconds": took, "late": took - seconds, "whole": whole, "error": error}
