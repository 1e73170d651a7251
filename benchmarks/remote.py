"""An aligner that a server runs, beside the same one here: are corrections equal; requests, bytes, milliseconds of each.

    aligner export default checkpoint --form checkpoint     # what the server serves
    python benchmarks/remote.py http://localhost:8000/v1 [ROWS.jsonl] [--count 200] [--alone 30]

Bytes are those of the connections, headers included, counted by a relay between client and server.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import anyio
from anyio.abc import SocketAttribute, SocketStream, TaskStatus
from anyio.from_thread import start_blocking_portal

from aligner_middleware import Aligner
from aligner_middleware.correction import Correction
from aligner_middleware.engine import Generation
from aligner_middleware.locations import DEFAULT_FOLDER

Pair = tuple[str, str]
NEAR = 0.05  # nats between two tokens that may change places with the order of a sum


@dataclass
class Relay:
    """Hands bytes on to the server at `target`, which may change, and counts them; `url` is its own address."""

    target: str
    up: int = 0
    down: int = 0
    url: str = ""


@contextlib.contextmanager
def relay(url: str) -> Iterator[Relay]:
    """Stand between client and server."""
    counts = Relay(url)

    async def hand_on(reader: SocketStream, writer: SocketStream, name: str) -> None:
        with contextlib.suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
            async for data in reader:
                setattr(counts, name, getattr(counts, name) + len(data))
                await writer.send(data)
        await writer.aclose()

    async def connected(client: SocketStream) -> None:
        place = urlsplit(counts.target)
        async with client:
            with contextlib.suppress(OSError):
                async with (
                    await anyio.connect_tcp(place.hostname or "", place.port or 80) as there,
                    anyio.create_task_group() as both,
                ):
                    both.start_soon(hand_on, client, there, "up")
                    both.start_soon(hand_on, there, client, "down")

    async def serve(*, task_status: TaskStatus[str]) -> None:
        async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener:
            port = listener.extra(SocketAttribute.local_port)
            task_status.started(f"http://127.0.0.1:{port}{urlsplit(url).path}")
            await listener.serve(connected)

    with start_blocking_portal() as portal:
        server, counts.url = portal.start_task(serve)
        try:
            yield counts
        finally:
            server.cancel()


def generated(aligner: Aligner, pairs: Sequence[Pair]) -> list[Generation]:
    """Generate the tokens of all pairs, at the same time."""
    requests = [aligner._codec.encode(*pair) for pair in pairs]
    futures = [aligner._scheduler.submit(request.generation) for request in requests if request.generation]
    return [future.result() for future in futures]


def difference(here: Generation, there: Generation, local: Aligner) -> float | None:
    """Give how many nats apart the tokens are at which two generations part; `None` where they do not.

    Where verdicts differ, it is how far the log odds are apart.
    """
    if here.verdict != there.verdict:
        return abs((here.log_odds or 0.0) - (there.log_odds or 0.0))
    if here.tokens == there.tokens and here.finish_reason == there.finish_reason:
        return None
    end = [min(local._codec.eos_token_ids)]
    one, other = ([*generation.tokens, *end] for generation in (here, there))
    at = next(place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    before = [*here.prompt, *([] if here.verdict is None else [here.verdict]), *one[:at]]
    (first, _), (second, _) = local._scheduler.log_likelihoods(before, [[one[at]], [other[at]]])
    return abs(first - second)


def compare(local: Aligner, remote: Aligner, pairs: Sequence[Pair]) -> dict[str, object]:
    """Compare verdicts, scores and tokens."""
    here, there = generated(local, pairs), generated(remote, pairs)
    apart = [difference(a, b, local) for a, b in zip(here, there, strict=True)]
    odds = [abs((a.log_odds or 0.0) - (b.log_odds or 0.0)) for a, b in zip(here, there, strict=True)]
    parted = sorted(one for one in apart if one is not None)
    return {
        "rows": len(pairs),
        "equal": apart.count(None),
        "near ties": len([one for one in parted if one <= NEAR]),
        "nats at which tokens part": [round(one, 4) for one in parted],
        "other verdicts": sum(a.verdict != b.verdict for a, b in zip(here, there, strict=True)),
        "largest difference of log odds": round(max(odds), 5),
    }


def costs(remote: Aligner, counts: Relay, pairs: Sequence[Pair]) -> dict[str, dict[str, float]]:
    """Measure corrections one after the other, by verdict: medians."""
    found: dict[str, list[tuple[Correction, int, int, float]]] = {}
    for pair in pairs:
        up, down, start = counts.up, counts.down, time.perf_counter()
        correction = remote.correct(*pair)
        seconds = time.perf_counter() - start
        time.sleep(0.05)  # the rest of a stream that was left
        found.setdefault(correction.verdict or "none", []).append(
            (correction, counts.up - up, counts.down - down, seconds)
        )
    return {
        verdict: {
            "corrections": len(some),
            "requests": statistics.median(one.usage.passes for one, *_ in some),
            "tokens of the prompt": statistics.median(one.usage.prompt_tokens for one, *_ in some),
            "tokens written": statistics.median(one.usage.decoded_tokens for one, *_ in some),
            "bytes up": statistics.median(up for _, up, _, _ in some),
            "bytes down": statistics.median(down for _, _, down, _ in some),
            "milliseconds": round(statistics.median(seconds for *_, seconds in some) * 1000, 1),
        }
        for verdict, some in sorted(found.items())
    }


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("rows", nargs="?", type=Path, default=DEFAULT_FOLDER / "held_out.jsonl")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--alone", type=int, default=30)
    parser.add_argument("--aligner", default="default", help="the same aligner here, or its exported folder in float32")
    parser.add_argument("--template", help="another prompt, such as that of an aligner without verdicts")
    asked = parser.parse_args()
    rows = [json.loads(line) for line in asked.rows.read_text(encoding="utf-8").splitlines()]
    rows = rows[:: max(1, len(rows) // asked.count)][: asked.count]
    pairs = [(row["question"], row["answer"]) for row in rows]
    with (
        relay(asked.url) as counts,
        Aligner.connect(counts.url, asked.aligner, template=asked.template, silence=600, patience=600) as remote,
        Aligner.load(asked.aligner, precision="float32", prompt=asked.template) as local,
    ):
        print(remote, flush=True)
        remote.correct("What is two and two?", "Four.")  # a server's first requests may take long
        print(json.dumps(compare(local, remote, pairs), indent=1), flush=True)
        print(json.dumps(costs(remote, counts, pairs[:: max(1, len(pairs) // asked.alone)]), indent=1), flush=True)
        start = time.perf_counter()
        remote.correct_batch(pairs[:64])
        print(f"{min(64, len(pairs))} at once: {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
