"""ONNX Runtime against PyTorch: same weights, same prompts, one run.

    python benchmarks/latency.py [--lengths 32,128,256] [--repeats 5] [--out benchmarks/results]

For every engine and answer length it measures

- prefill: one pass over the prompt (question and answer), in milliseconds;
- a token: one decoding pass on top of it, in milliseconds;
- decoded: a whole correction of that length, written token by token;
- drafted: the same correction with the answer as its draft, all of it accepted: what an answer costs that is kept.

`generate` is PyTorch's own, with its prompt lookup of 10 tokens: the rival that also takes words from the prompt. Engines
take turns in every repeat, so that a noisy machine is noisy for all; medians are given. A table, `latency.json` and
`latency.png` come out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from aligner_middleware.artifact import ARTIFACT_FILE, DEFAULT_FOLDER, MODEL_FILE, Artifact, cached_folder, home
from aligner_middleware.build import build_cached, export_folder
from aligner_middleware.build.checkpoint import open_checkpoint
from aligner_middleware.engine import Generation, Model, decode
from aligner_middleware.engine.onnx import OnnxModel
from aligner_middleware.engine.pytorch import TorchModel
from aligner_middleware.prompt import DEFAULT, encode_prompt

MEASURES = ("prefill", "a token", "decoded", "drafted")


def main() -> None:
    """Run the benchmark."""
    options = parse()
    lengths = [int(length) for length in options.lengths.split(",")]
    engines, generate = load()
    prompts = {length: prompt_of(length) for length in lengths}
    timings: dict[tuple[str, int, str], list[float]] = defaultdict(list)
    for repeat in range(options.repeats + 1):  # the first round warms up
        for length, prompt in prompts.items():
            for name, model in engines.items():
                for measure, seconds in run(model, prompt, length).items():
                    timings[name, length, measure] += [seconds] if repeat else []
            if repeat in (1, 2):
                timings["PyTorch float32 generate, prompt lookup", length, "drafted"].append(
                    clock(lambda p=prompt, n=length: generate(p, n))
                )
    results = [
        {"engine": engine, "answer_tokens": length, "measure": measure, "ms": 1000 * statistics.median(values)}
        for (engine, length, measure), values in timings.items()
    ]
    options.out.mkdir(parents=True, exist_ok=True)
    machine = {
        "cpu": cpu(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "repeats": options.repeats,
    }
    (options.out / "latency.json").write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")
    for length in lengths:
        show(length, len(prompts[length]), results)
    plot(results, lengths, options.out / "latency.png")
    print(json.dumps(machine))


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--lengths", default="32,128,256", help="tokens in an answer, separated by commas")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    return parser.parse_args()


def load() -> tuple[dict[str, Model], Callable[[list[int], int], None]]:
    """Load the default aligner in every form."""
    checkpoint = open_checkpoint("default")
    network = checkpoint.load()
    standard = home() / f"benchmark-standard-{cached_folder('default', 'float32').name[-12:]}"
    if not (standard / ARTIFACT_FILE).is_file():
        export_folder("default", standard, "float32", fused=False)
    folders = {
        "ONNX float32, as optimum exports it": standard,
        "ONNX float32, fused": build_cached("default", "float32"),
        "ONNX int8, fused": build_cached("default", "int8"),
    }
    engines: dict[str, Model] = {
        "PyTorch float32": TorchModel(network),
        "PyTorch bfloat16": TorchModel(checkpoint.load("bfloat16")),
    }
    engines |= {name: OnnxModel(folder / MODEL_FILE, Artifact.load(folder)) for name, folder in folders.items()}

    def generate(prompt: list[int], length: int) -> None:
        ids = torch.tensor([prompt])
        settings = {"do_sample": False, "min_new_tokens": length, "max_new_tokens": length, "pad_token_id": 2}
        with torch.inference_mode():
            network.generate(ids, attention_mask=torch.ones_like(ids), prompt_lookup_num_tokens=10, **settings)

    return engines, generate


def prompt_of(length: int) -> list[int]:
    """Make the prompt for a real answer cut to `length` tokens."""
    tokenizer = open_checkpoint("default").tokenizer()
    rows = map(json.loads, (DEFAULT_FOLDER / "corrections.jsonl").read_text(encoding="utf-8").splitlines())
    answers = [row["answer"] for row in rows if row["kind"] == "keep" and len(row["answer"]) > 200]
    answer = tokenizer.decode(tokenizer.encode("\n\n".join(answers))[:length])
    return encode_prompt(tokenizer, DEFAULT, "Could you give me a few examples?", answer)


def run(model: Model, prompt: list[int], length: int) -> dict[str, float]:
    """Measure one engine on one prompt, in seconds."""
    generation = Generation(prompt, max_new_tokens=length)
    passes = decode(model, [generation], frozenset())
    start = time.perf_counter()
    next(passes)
    prefill = time.perf_counter() - start
    for _ in passes:
        pass
    decoded = time.perf_counter() - start
    drafted = Generation(prompt, list(generation.tokens), max_new_tokens=length)
    seconds = clock(lambda: [*decode(model, [drafted], frozenset())])
    return {
        "prefill": prefill,
        "a token": (decoded - prefill) / (length - 1),
        "decoded": decoded,
        **({"drafted": seconds} if drafted.passes == 1 else {}),  # an engine may disagree with itself on a near tie
    }


def clock(action: Callable[[], object]) -> float:
    """Time an action, in seconds."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def show(length: int, prompt: int, results: list[dict[str, object]]) -> None:
    """Print the table of one answer length."""
    table = Table(title=f"answer of {length} tokens, prompt of {prompt}: milliseconds")
    for column in ("engine", *MEASURES):
        table.add_column(column, justify="left" if column == "engine" else "right")
    found = {(row["engine"], row["measure"]): row["ms"] for row in results if row["answer_tokens"] == length}
    for engine in dict.fromkeys(engine for engine, _ in found):
        cells = (found.get((engine, measure)) for measure in MEASURES)
        table.add_row(str(engine), *("" if cell is None else f"{cell:.1f}" for cell in cells))
    Console(width=110).print(table)


def plot(results: list[dict[str, object]], lengths: list[int], path: Path) -> None:
    """Draw what a kept answer costs, decoded and drafted."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    for axis, measure in zip(axes, ("decoded", "drafted"), strict=True):
        names = list(dict.fromkeys(str(row["engine"]) for row in results if row["measure"] == measure))
        for place, name in enumerate(names):
            heights = [
                next(
                    (
                        row["ms"]
                        for row in results
                        if (row["engine"], row["answer_tokens"], row["measure"]) == (name, n, measure)
                    ),
                    np.nan,
                )
                for n in lengths
            ]
            axis.bar(np.arange(len(lengths)) + 0.15 * place, heights, 0.15, label=name)
        axis.set_xticks(np.arange(len(lengths)) + 0.3, [f"{length} tokens" for length in lengths])
        axis.set_yscale("log")
        axis.set_title({"decoded": "written token by token", "drafted": "answer as draft, all accepted"}[measure])
        axis.legend(fontsize=7)
    axes[0].set_ylabel("ms a correction")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def cpu() -> str:
    """Name the processor."""
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
