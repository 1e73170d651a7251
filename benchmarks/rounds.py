"""Three rounds of DPO with the default aligner, beside a control whose preferences stay those of the first round.

The first policy is SmolLM2-135M-Instruct fine-tuned on the unaligned answers of the aligner's training rows, as the paper's
is a model without any alignment. Its prompts are the aligner's held-out questions, which neither of the two has learnt from:
two in three are answered and learnt from, the others are only scored. Every round of either arm takes the same number of
steps, however few pairs it has, so the arms differ in their pairs alone.

    python benchmarks/rounds.py build-out/rounds [--method sft] [--seed 1] [--rounds 3] [--prompts 614] [--steps 34]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from aligner_middleware.checkpoints.base import DEFAULT_BASE, base_folder
from aligner_middleware.checkpoints.cache import build_once
from aligner_middleware.data.files import write_lines, write_text
from aligner_middleware.locations import DEFAULT_FOLDER, cache_dir
from aligner_middleware.training import PolicyConfig
from aligner_middleware.training.policy_training import train_policy

UNALIGNED_ROWS = 1200
# On Linux CPUs: have the allocator keep what each step takes and gives back; nearly twice as fast.
ENVIRONMENT = os.environ | {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "30000000000"}
TOKENS = 64  # of an answer; those of the rows have 40 to 50


def main() -> None:
    """Make the first policy and the prompts, and run both arms through the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--method", default="dpo")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, help="so many, drawn at random; by default all")
    parser.add_argument("--steps", type=int, default=34, help="of a round; 34 are two epochs over 136 pairs")
    options = parser.parse_args()
    first = cache_dir() / f"benchmark-unaligned-{UNALIGNED_ROWS}"
    with ProcessPoolExecutor(1, get_context("spawn")) as process:  # what training allocates goes with it
        process.submit(build_once, first, make_unaligned).result()
    learnt, scored = split_prompts(options.out, options.prompts)
    times = {}
    for arm, more in {"new": [], "fixed": ["--fixed-preferences", "--beside", f"{options.out}/new"]}.items():
        if arm == "fixed":  # the first round is the same for both, and is not run again
            for number in (0, 1):
                shutil.copytree(
                    options.out / f"new/round-{number}", options.out / f"fixed/round-{number}", dirs_exist_ok=True
                )
            settings = json.loads((options.out / "new/rounds.json").read_text(encoding="utf-8"))
            write_text(options.out / "fixed/rounds.json", json.dumps(settings | {"fixed": True}, indent=2))
        start = time.perf_counter()
        command = ["rounds", learnt, f"{options.out}/{arm}", "--held-out", scored, "--policy", first]
        command += ["--method", options.method, "--seed", options.seed, "--rounds", options.rounds]
        command += [
            "--steps",
            options.steps,
            "--answer-tokens",
            TOKENS,
            "--learning-rate",
            2e-4,
            "--max-length",
            320,
            *more,
        ]
        subprocess.run([sys.executable, "-m", "aligner_middleware", *map(str, command)], check=True, env=ENVIRONMENT)
        times[arm] = time.perf_counter() - start
    print(json.dumps({"seconds": times}))


def make_unaligned(out: Path) -> None:
    """Fine-tune the base model on answers that nobody aligned, and merge the adapter."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    lines = (DEFAULT_FOLDER / "corrections.jsonl").read_text(encoding="utf-8").splitlines()
    every = [json.loads(line) for line in lines]
    rows = [every[at * len(every) // UNALIGNED_ROWS] for at in range(UNALIGNED_ROWS)]
    said = [
        {
            "prompt": [{"role": "user", "content": row["question"]}],
            "completion": [{"role": "assistant", "content": row["answer"]}],
        }
        for row in rows
    ]
    adapter = out.parent / "adapter"
    train_policy(said, adapter, PolicyConfig(method="sft", epochs=2), report=lambda at: print(at, file=sys.stderr))
    base, _ = base_folder(DEFAULT_BASE)
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter)).merge_and_unload()
    merged.save_pretrained(out)
    AutoTokenizer.from_pretrained(base).save_pretrained(out)  # type: ignore[no-untyped-call]


def split_prompts(folder: Path, at_most: int | None = None) -> tuple[Path, Path]:
    """Write the prompts to learn from, and those to score."""
    lines = (DEFAULT_FOLDER / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
    questions = list(dict.fromkeys(json.loads(line)["question"] for line in lines))
    if at_most is not None:
        questions = random.Random(0).sample(questions, at_most)
    learnt, scored = folder / "prompts.jsonl", folder / "held_out.jsonl"
    write_lines(learnt, ({"question": question} for at, question in enumerate(questions) if at % 3))
    write_lines(scored, ({"question": question} for question in questions[::3]))
    return learnt, scored


if __name__ == "__main__":
    main()
