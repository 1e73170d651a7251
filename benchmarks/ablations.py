"""What each part of the recipe is worth: the same number of steps, one thing changed at a time.

    python benchmarks/ablations.py [--rows …/corrections.jsonl] [--steps 220] [--only decision_weight_5 …]

Each variant is `aligner train` with other options. Its held-out rows are scored under teacher forcing, in one pass each:
a row is kept where the model's arg max is the answer's next token at every position, its end included; otherwise it is
changed. That is what decoding would do (`aligner evaluate` decodes), but for the bfloat16 autocast used here.

- kept: share of the good answers; changed: share of the bad ones
- AUC: chance that a bad answer's smallest margin (logit of its own next token, less the largest other) lies below a good
  one's: how well the two are told apart, wherever the threshold is
- perplexity of the reference corrections
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from aligner_middleware.checkpoints.checkpoint import end_token_ids, open_checkpoint
from aligner_middleware.export.parity import encode
from aligner_middleware.locations import DEFAULT_FOLDER

matplotlib.use("Agg")
from matplotlib import pyplot

RESULTS = Path(__file__).parent / "results"
BATCH = 8
WARM_UP = 24  # steps of the identity stage
RECIPE: dict[str, float | str] = {
    "learning-rate": 6e-4,
    "identity-share": 0.1,
    "lora-rank": 16,
    "lora-alpha": 32,
    "decision-weight": 5,
}
# What each variant changes; `data` is the share of rows that it sees, for as many steps.
VARIANTS: dict[str, dict[str, Any]] = {
    "the recipe": {},
    "decision weight 1": {"decision-weight": 1},
    "no warm-up": {"warm-up": 0},
    "no identity mix": {"identity-share": 0},
    "identity mix of a third": {"identity-share": 0.33},
    "LoRA rank 4": {"lora-rank": 4, "lora-alpha": 8},
    "LoRA rank 32": {"lora-rank": 32, "lora-alpha": 64},
    "LoRA rank 32, rate 1.5e-3": {"lora-rank": 32, "lora-alpha": 64, "learning-rate": 1.5e-3},
    "full fine-tuning": {"method": "full", "learning-rate": 1e-4},
    "25 % of the data": {"data": 0.25},
    "50 % of the data": {"data": 0.5},
}


def main() -> None:
    """Train and score what is not in the results yet; then print all and draw them."""
    options = parse()
    scores: dict[str, Any] = json.loads(options.out.read_text()) if options.out.is_file() else {}
    for name in options.only or VARIANTS:
        if name not in scores:
            start = time.perf_counter()
            adapter = train(name, options)
            seconds = time.perf_counter() - start
            scores[name] = score(str(adapter), read(options.held_out)) | {"seconds": round(seconds)}
            options.out.write_text(json.dumps(scores, indent=1) + "\n")
            print(name, scores[name], flush=True)
    show(scores)
    draw(scores, options.out.with_suffix(".png"))


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=Path, default=DEFAULT_FOLDER / "corrections.jsonl")
    parser.add_argument("--held-out", type=Path, default=DEFAULT_FOLDER / "held_out.jsonl")
    parser.add_argument("--steps", type=int, default=220)
    parser.add_argument("--max-length", type=int, default=384)
    parser.add_argument("--only", nargs="*", choices=VARIANTS)
    parser.add_argument("--work", type=Path, default=Path("build-out/ablations"))
    parser.add_argument("--out", type=Path, default=RESULTS / "ablations.json")
    return parser.parse_args()


def read(path: Path) -> list[dict[str, str]]:
    """Read JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def train(name: str, options: argparse.Namespace) -> Path:
    """Train a variant; epochs are chosen so that all take the same number of steps."""
    changed = dict(VARIANTS[name])
    warm_up = changed.pop("warm-up", WARM_UP)
    rows = read(options.rows)
    rows = rows[: round(len(rows) * changed.pop("data", 1.0))]
    folder: Path = options.work / name.replace(" ", "_").replace("%", "percent")
    folder.parent.mkdir(parents=True, exist_ok=True)
    data = folder.with_suffix(".jsonl")
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = RECIPE | changed
    if settings.get("method") == "full":
        settings = {key: value for key, value in settings.items() if not key.startswith("lora")}
    share = float(settings["identity-share"])
    arguments: dict[str, Any] = settings | {
        "warm-up-epochs": warm_up * BATCH / len(rows),
        "epochs": (options.steps - warm_up) * BATCH / len(rows) * (1 - share),
        "max-length": options.max_length,
        "save-steps": 10_000,
    }
    flags = [text for key, value in arguments.items() for text in (f"--{key}", str(value))]
    command = [sys.executable, "-m", "aligner_middleware", "train", str(data), str(folder), "--no-verdict", *flags]
    subprocess.run(command, check=True)
    return folder


@torch.inference_mode()
def score(model: str, rows: Sequence[dict[str, str]]) -> dict[str, float]:
    """Score a trained model; see the module's text."""
    checkpoint = open_checkpoint(model)
    network = checkpoint.load()
    margins: dict[str, list[float]] = {"keep": [], "correct": []}
    losses: list[np.ndarray] = []

    def logits(ids: Sequence[int], count: int) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            found = network(input_ids=torch.tensor([list(ids)]), logits_to_keep=count + 1).logits
        last: torch.Tensor = found[0, :-1].float()
        return last

    tokenizer = checkpoint.tokenizer()
    end = end_token_ids(checkpoint.folder, tokenizer, checkpoint.template)[0]
    copies, references = (
        encode(tokenizer, checkpoint.template, end, [(row["question"], row["answer"], row[target]) for row in rows])
        for target in ("answer", "correction")
    )
    for row, (ids, count), (reference, length) in zip(rows, copies, references, strict=True):
        found = logits(ids, count)
        targets = torch.tensor(ids[-count:])[:, None]
        own = found.gather(1, targets)
        margins[row["kind"]].append(float((own - found.scatter(1, targets, -torch.inf).amax(1, keepdim=True)).min()))
        found = logits(reference, length)
        losses.append(
            torch.nn.functional.cross_entropy(found, torch.tensor(reference[-length:]), reduction="none").numpy()
        )
    keep, correct = np.array(margins["keep"]), np.array(margins["correct"])
    return {
        "kept": float((keep > 0).mean()),
        "changed": float((correct <= 0).mean()),
        "auc": float((correct[:, None] < keep[None]).mean()),
        "perplexity": float(np.exp(np.concatenate(losses).mean())),
    }


def show(scores: dict[str, Any]) -> None:
    """Print the table."""
    table = Table("variant", "kept", "changed", "AUC", "perplexity", "seconds")
    for name, found in scores.items():
        numbers = (
            f"{found['kept']:.1%}",
            f"{found['changed']:.1%}",
            f"{found['auc']:.3f}",
            f"{found['perplexity']:.2f}",
        )
        table.add_row(name, *numbers, str(found["seconds"]))
    Console(width=100).print(table)


def draw(scores: dict[str, Any], path: Path) -> None:
    """Plot kept against changed, with the AUC beside each name."""
    figure, axes = pyplot.subplots(figsize=(7, 5))
    for name, found in scores.items():
        axes.scatter(100 * found["kept"], 100 * found["changed"])
        label = f"{name} ({found['auc']:.2f})"
        axes.annotate(
            label, (100 * found["kept"], 100 * found["changed"]), (5, 4), textcoords="offset points", fontsize=8
        )
    axes.set(xlabel="good answers kept, %", ylabel="bad answers changed, %", title="Ablations on held-out rows (AUC)")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
