"""What each part of the default's recipe is worth: equal data and steps, one thing changed at a time.

    python benchmarks/ablations.py OUT [--rows 400] [--tokens 200] [--only "decision weight 1" …]

OUT is the folder of `default_rows/compose.py`. Every arm trains the base for one epoch on as many rows (added identity rows
included), of at most so many tokens, in batches of 8; all but those that name other rows see the same ones. Scores:

- AUC of the evidence on development rows of real models, and on rows with one bad sentence put into a real answer
- perplexity of held-out reference corrections, a token

The trained weights of the recipe are then stored as differences of 1 to 8 bits, and scored again. OUT/ablations.json gets the
figures; arms in it are not trained again.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from aligner_middleware import Aligner
from aligner_middleware.data.triples import Triple, read_rows
from aligner_middleware.evaluation.detection import Auc
from aligner_middleware.evaluation.labelled_rows import LabelledRow, read_labelled
from aligner_middleware.locations import DEFAULT_FOLDER
from aligner_middleware.training import Stage, TrainConfig
from aligner_middleware.training.aligner import train
from aligner_middleware.training.origin import Origin
from aligner_middleware.training.output import write_trained
from aligner_middleware.training.recipe import Recipe

RECIPE: dict[str, Any] = {
    "method": "difference",
    "learning_rate": 1.5e-4,
    "decision_weight": 6.0,
    "identity_share": 0.06,
}
OURS = {"written", "composed", "chat model"}
COMPOSED = {"composed", "composed on public rows"}
# What each arm changes; `sources` says which rows it sees.
ARMS: dict[str, dict[str, Any]] = {
    "the recipe": {},
    "decision weight 1": {"decision_weight": 1.0},
    "verdict weight 0.5": {"verdict_weight": 0.5},
    "verdict weight 5": {"verdict_weight": 5.0},
    "no public rows": {"sources": OURS.__contains__},
    "no composed rows": {"sources": lambda source: source not in COMPOSED},
    "no identity rows": {"identity_share": 0.0},
    "identity share 0.3": {"identity_share": 0.3},
    "LoRA, rank 16": {"method": "lora", "learning_rate": 4e-4},
    "LoRA, rank 64": {"method": "lora", "learning_rate": 4e-4, "lora_rank": 64, "lora_alpha": 128},
    "full": {"method": "full"},
}
BITS = (1, 2, 3, 4, 8)


def main() -> None:
    """Train and score the arms that are not in the results yet, then print all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path, help="folder of compose.py")
    parser.add_argument("--rows", type=int, default=400, help="rows that an arm is trained on")
    parser.add_argument("--tokens", type=int, default=200, help="longest row")
    parser.add_argument("--only", nargs="*", choices=[*ARMS, "bits"], default=[*ARMS, "bits"])
    options = parser.parse_args()
    file: Path = options.out / "ablations.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    scorer = Scorer(options.out, options.tokens)

    def note(name: str, folder: Path, seconds: float) -> None:
        found[name] = scorer.score(folder) | {"seconds": round(seconds)}
        file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(name, found[name], flush=True)

    for name in ARMS:
        if name in options.only and name not in found:
            start = time.perf_counter()
            note(name, run(name, options), time.perf_counter() - start)
    if "bits" in options.only:
        for bits in BITS:
            if f"{bits} bits" not in found:
                note(f"{bits} bits", stored(folder_of("full", options.out), bits), 0)
    Console(width=120).print(as_table(found))


def folder_of(name: str, out: Path) -> Path:
    """Name an arm's folder."""
    return out / "ablations" / name.replace(" ", "-").replace(",", "")


def short_rows(out: Path, tokens: int) -> list[tuple[str, Triple]]:
    """Give the rows that are short enough with their sources, shuffled."""
    path = out / "train.jsonl"
    sources = [json.loads(line)["source"] for line in path.read_text(encoding="utf-8").splitlines()]
    found = read_rows(path)
    left_out = {row.line for row in found.left_out}
    kept = [source for line, source in enumerate(sources, 1) if line not in left_out]
    tokenizer = Origin.open(TrainConfig()).tokenizer
    rows = [
        (source, row)
        for source, row in zip(kept, found.triples, strict=True)
        if len(tokenizer.encode(f"{row.question}{row.answer}{row.correction}")) <= tokens
    ]
    random.Random(0).shuffle(rows)
    return rows


def run(name: str, options: argparse.Namespace) -> Path:
    """Train an arm, and give its folder."""
    settings = RECIPE | ARMS[name]
    wanted: Callable[[str], bool] = settings.pop("sources", lambda source: True)
    share: float = settings.pop("identity_share")
    rows = [row for source, row in short_rows(options.out, options.tokens) if wanted(source)]
    config = TrainConfig(
        max_length=2 * options.tokens,
        warm_up=Stage(epochs=0),
        correction=Stage(epochs=1, identity_share=share, learning_rate=settings.pop("learning_rate")),
        **settings,
    )
    folder = folder_of(name, options.out)
    shutil.rmtree(folder, ignore_errors=True)
    train(rows[: round(options.rows * (1 - share))], folder, config)
    return folder


def stored(full: Path, bits: int) -> Path:
    """Store the weights of full fine-tuning as a difference to the base."""
    folder = full.parent / f"{bits}-bits"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    recipe = Recipe.model_validate_json((full / "training.json").read_text(encoding="utf-8"))
    config = recipe.config.model_copy(update={"method": "difference", "difference_bits": bits})
    write_trained(full, Origin.open(config).folder, recipe.model_copy(update={"config": config}), folder)
    return folder


class Scorer:
    """The rows that an arm is scored on."""

    def __init__(self, out: Path, tokens: int) -> None:
        self.development = read_short(out / "development.jsonl", tokens, 160)
        self.inserted = read_short(out / "inserted.jsonl", tokens, 100)
        lines = (DEFAULT_FOLDER / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
        self.references = [row for row in map(json.loads, lines) if row["answer"] != row["correction"]][:60]

    def score(self, folder: Path) -> dict[str, Any]:
        """Score a trained aligner in float32."""
        with Aligner.load(folder, engine="torch", precision="float32") as aligner:
            return {
                "development": auc(aligner, self.development),
                "inserted": auc(aligner, self.inserted),
                "perplexity": self._perplexity(aligner),
                "megabytes": sum(file.stat().st_size for file in folder.iterdir()) / 1e6,
            }

    def _perplexity(self, aligner: Aligner) -> float:
        nats = tokens = 0.0
        for row in self.references:
            ((likelihood, _),) = aligner.log_likelihood(row["question"], row["answer"], [row["correction"]])
            nats, tokens = nats - likelihood, tokens + aligner.count_tokens(row["correction"])
        return math.exp(nats / tokens)


def read_short(path: Path, tokens: int, number: int) -> list[LabelledRow]:
    """Draw labelled rows of at most so many tokens, counted as four characters."""
    rows = [row for row in read_labelled(path) if len(row.question) + len(row.answer) <= 4 * tokens]
    return random.Random(0).sample(rows, min(number, len(rows)))


def auc(aligner: Aligner, rows: Sequence[LabelledRow]) -> dict[str, float]:
    """Say how well the evidence tells bad answers from good ones, with a 95 % interval."""
    evidence = [aligner.evidence(row.question, row.answer) for row in rows]
    found: dict[str, float] = Auc.of(evidence, [row.unsafe for row in rows]).model_dump()
    return found


def as_table(found: dict[str, Any]) -> Table:
    """Show the arms."""
    table = Table("arm", "AUC, real answers", "AUC, one sentence", "perplexity", "MB", "seconds")
    for name, scores in found.items():
        areas = [
            f"{a['value']:.3f} ({a['low']:.3f} to {a['high']:.3f})" for a in (scores["development"], scores["inserted"])
        ]
        table.add_row(name, *areas, f"{scores['perplexity']:.2f}", f"{scores['megabytes']:.0f}", str(scores["seconds"]))
    return table


if __name__ == "__main__":
    main()
