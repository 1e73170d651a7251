"""A weak aligner's corrections as labels for a stronger model (paper, appendix A), at the size that two cores allow.

The weak aligner is SmolLM2-135M-Instruct with every third of its 30 layers cut out (99 M parameters), trained in full on the
packaged triples. The strong model is the unaligned policy of `rounds.py`, with all its layers. Its answers to prompts that
neither has learnt from are corrected by the weak aligner, and it is fine-tuned on the corrections (SFT), or prefers them over
its own answers (DPO).

    python benchmarks/weak_to_strong.py build-out/weak-to-strong [--methods sft,dpo] [--prompts 614]
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rounds import ENVIRONMENT, TOKENS, UNALIGNED_ROWS, make_unaligned, split_prompts

from aligner_middleware.checkpoints.base import base_folder
from aligner_middleware.checkpoints.cache import build_once
from aligner_middleware.locations import DEFAULT_FOLDER, cache_dir

EPOCHS = 0.5


def main() -> None:
    """Train the weak aligner, and the strong model on its labels, all through the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--methods", default="sft,dpo")
    parser.add_argument("--prompts", type=int, help="so many, drawn at random; by default all")
    options = parser.parse_args()
    out = options.out
    strong = cache_dir() / f"benchmark-unaligned-{UNALIGNED_ROWS}"
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        process.submit(build_once, strong, make_unaligned).result()
    shallow = cache_dir() / "benchmark-shallow"
    build_once(shallow, cut_layers)
    learnt, scored = split_prompts(out, options.prompts)
    weak, times = out / "weak-aligner", {}
    if not weak.is_dir():
        rows, held = DEFAULT_FOLDER / "corrections.jsonl", DEFAULT_FOLDER / "held_out.jsonl"
        settings = ["--method", "full", "--learning-rate", 2e-4, "--decision-weight", 4, "--max-length", 384]
        stages = ["--warm-up-epochs", 0.3, "--epochs", EPOCHS, "--identity-share", 0.2, "--save-steps", 300]
        times["weak aligner"] = aligner("train", rows, weak, "--held-out", held, "--base", shallow, *settings, *stages)
    aligner("evaluate", "--model", weak, "--json")
    for method in options.methods.split(","):
        rounds = ["--policy", strong, "--model", weak, "--rounds", 1, "--method", method]
        settings = ["--learning-rate", 2e-4, "--epochs", 2, "--answer-tokens", TOKENS, "--max-length", 320]
        times[method] = aligner("rounds", learnt, out / method, "--held-out", scored, *rounds, *settings)
    print(json.dumps({"seconds": times}))


def aligner(*arguments: Any) -> float:
    """Run a command of ours, and time it."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "aligner_middleware", *map(str, arguments)], check=True, env=ENVIRONMENT)
    return time.perf_counter() - start


def cut_layers(out: Path) -> None:
    """Write the base model without every third layer."""
    import torch
    from transformers import AutoModelForCausalLM

    base, _ = base_folder()
    network = AutoModelForCausalLM.from_pretrained(base)
    kept = [layer for at, layer in enumerate(network.model.layers) if at % 3 != 1]
    network.model.layers = torch.nn.ModuleList(kept)
    network.config.num_hidden_layers = len(kept)
    if getattr(network.config, "layer_types", None):
        network.config.layer_types = network.config.layer_types[: len(kept)]
    network.save_pretrained(out)
    for path in [*base.glob("tokenizer*"), *base.glob("special_tokens*"), *base.glob("*.jinja")]:
        shutil.copy(path, out)


if __name__ == "__main__":
    main()
