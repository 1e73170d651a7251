"""What each precision costs in quality and gains in time, and whether drafts change anything.

    python benchmarks/precision.py [--rows 50] [--lossless 500] [--out benchmarks/results]

Quality: teacher-forced on the references of held-out rows, against PyTorch's float32: share of positions with the same arg
max, perplexity of the references. Time: a pass over 540 tokens with nothing cached, and one over a single token on top.

Losslessness: rows are corrected with their answer as the draft, and again by plain decoding of the same graph (in float32
a quarter of them). Where the two part, the difference between the two likeliest logits there tells how near a tie it was.

A table, `precision.json` and `lossless.json` come out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from latency import machine
from rich.console import Console
from rich.progress import track
from rich.table import Table

from aligner_middleware import Aligner
from aligner_middleware.artifact import MODEL_FILE, TOKENIZER_FILE, Artifact, Precision
from aligner_middleware.checkpoints.cache import build_once
from aligner_middleware.checkpoints.checkpoint import open_checkpoint
from aligner_middleware.engine.onnx import OnnxModel
from aligner_middleware.export import parity
from aligner_middleware.export.export import export
from aligner_middleware.export.quantize import WEIGHTS
from aligner_middleware.export.store import export_model
from aligner_middleware.locations import DEFAULT_FOLDER, cache_dir
from aligner_middleware.text.template import encode_prompt
from aligner_middleware.text.tokenizer import Tokenizer

FORMS: tuple[tuple[str, Precision, str], ...] = (
    ("float32", "float32", "floats"),
    ("float16", "float16", "floats"),
    ("int8", "int8", "products"),
    ("int8 in blocks", "int8", "blocks"),
    ("int4", "int4", "blocks"),
)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=50)
    parser.add_argument("--lossless", type=int, default=500)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    lines = (DEFAULT_FOLDER / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    compared = compare([rows[n * len(rows) // options.rows] for n in range(options.rows)])
    (options.out / "precision.json").write_text(
        json.dumps({"machine": machine(5), "results": compared}, indent=1) + "\n"
    )
    numbers: dict[Precision, int] = {"int8": options.lossless, "float32": options.lossless // 4}
    drafted = {precision: lossless(rows[:number], precision) for precision, number in numbers.items()}
    (options.out / "lossless.json").write_text(json.dumps(drafted, indent=1) + "\n")


def compare(rows: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Measure every form of the default aligner."""
    triples = [(row["question"], row["answer"], row["correction"]) for row in rows]
    checkpoint = open_checkpoint("default")
    network = checkpoint.load()
    table = Table("precision", "MB", "same arg max", "perplexity", "540 tokens, ms", "one token, ms")
    found = []
    for name, precision, weights in FORMS:
        folder = made(name, precision, weights)
        measured = parity.measure(network, checkpoint, folder / MODEL_FILE, triples)
        first, single = passes(folder)
        size = (folder / MODEL_FILE).stat().st_size / 1e6
        found.append({"form": name, "mb": size, "pass_540_ms": first, "pass_1_ms": single, **measured.model_dump()})
        rise = measured.perplexity / measured.reference_perplexity - 1
        cells = [f"{size:.0f}", f"{measured.same_argmax:.2%}", f"{measured.perplexity:.3f} ({rise:+.2%})"]
        table.add_row(name, *cells, f"{first:.0f}", f"{single:.1f}")
    Console(width=110).print(table)
    return found


def made(name: str, precision: Precision, weights: str) -> Path:
    """Export the default aligner in a form, once."""
    usual = precision != "int8" or weights == "products"
    if usual and precision != "float16":
        return export_model("default", None, precision).folder
    folder = (
        cache_dir() / f"benchmark-{name.replace(' ', '-')}-{export_model('default', None, 'float32').folder.name[-12:]}"
    )

    def make(out: Path) -> None:
        forms = WEIGHTS[precision]
        WEIGHTS[precision] = (weights,)  # type: ignore[assignment]
        try:
            export(open_checkpoint("default"), out, precision)
        finally:
            WEIGHTS[precision] = forms

    build_once(folder, make)
    return folder


def passes(folder: Path) -> tuple[float, float]:
    """Time a pass over 540 tokens and one over a single token, in milliseconds."""
    cache = OnnxModel(folder / MODEL_FILE, Artifact.load(folder)).new_cache(1, 1024)
    tokens = np.random.default_rng(0).integers(20, 40_000, 540).tolist()
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(6):
        for spent, given, wanted in ((times[0], tokens, 257), (times[1], tokens[:1], 1)):
            start = time.perf_counter()
            for logits in cache.extend(0, given, wanted):
                logits.argmax(-1)
            spent.append(1000 * (time.perf_counter() - start))
        cache.trim(0, 0)
    return statistics.median(times[0][1:]), statistics.median(times[1][1:])


def lossless(rows: list[dict[str, str]], precision: Precision) -> dict[str, Any]:
    """Correct rows with and without drafts and compare."""
    pairs = [(row["question"], row["answer"]) for row in rows]
    spent, outcomes = {}, {}
    for draft in (True, False):
        with Aligner.load(precision=precision, draft=draft) as aligner:
            start = time.perf_counter()
            outcomes[draft] = [aligner.correct(*pair) for pair in track(pairs, f"{precision}, draft={draft}")]
            spent[draft] = time.perf_counter() - start
    differing = [
        {"row": place, "drafted": a.corrected, "plain": b.corrected, "margin": margin(precision, a, b)}
        for place, (a, b) in enumerate(zip(outcomes[True], outcomes[False], strict=True))
        if a.corrected != b.corrected
    ]
    passes = sum(c.usage.passes for c in outcomes[True])
    report: dict[str, Any] = {
        "rows": len(rows),
        "differing": len(differing),
        "unchanged": sum(not c.changed for c in outcomes[True]),
    }
    report |= {"seconds_drafted": spent[True], "seconds_plain": spent[False], "passes_drafted": passes}
    print(precision, report, [row["margin"] for row in differing])
    return report | {"differences": differing}


def margin(precision: Precision, drafted: Any, plain: Any) -> float:
    """Give the difference of the two likeliest logits where two corrections part, in one pass."""
    folder, _ = export_model("default", None, precision)
    artifact = Artifact.load(folder)
    tokenizer = Tokenizer.from_file(folder / TOKENIZER_FILE)
    ids = [tokenizer.encode(c.corrected) for c in (drafted, plain)]
    common = next((n for n, (a, b) in enumerate(zip(*ids, strict=False)) if a != b), min(map(len, ids)))
    prompt = encode_prompt(tokenizer, artifact.template, drafted.question, drafted.original)
    cache = OnnxModel(folder / MODEL_FILE, artifact).new_cache(1, 4096)
    *_, logits = cache.extend(0, [*prompt, *ids[0][:common]], 1)
    second, first = np.sort(logits[0])[-2:]
    return float(first - second)


if __name__ == "__main__":
    main()
