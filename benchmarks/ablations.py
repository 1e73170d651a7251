"""What each part of the default's recipe is worth: equal data and steps, one thing changed at a time.

    python benchmarks/ablations.py OUT [--rows 320] [--tokens 160] [--only "verdict weight 5" …]

OUT is the folder of `default_rows/compose.py`. Every arm trains the base for one epoch on as many rows (added identity rows
included), of at most so many tokens, in batches of 8; all but those that name other rows see the same ones. Scores, the same
rows for every arm, half of them bad:

- AUC of the evidence on development rows of real models, and on rows with one bad sentence put into a real answer
- perplexity of held-out reference corrections, a token

The trained weights of the recipe are then stored as differences of other widths, and the recipe is exported in int8; both are
scored again. OUT/ablations.json gets the figures; arms in it are not trained again.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
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
BASELINE = "the recipe"
OURS = {"written", "composed", "chat model"}
COMPOSED = {"composed", "composed on public rows"}
# What each arm changes; `sources` says which rows it sees.
ARMS: dict[str, dict[str, Any]] = {
    BASELINE: {},
    "no public rows": {"sources": OURS.__contains__},
    "no composed rows": {"sources": lambda source: source not in COMPOSED},
    "LoRA, rank 64": {"method": "lora", "learning_rate": 4e-4, "lora_rank": 64, "lora_alpha": 128},
    "verdict weight 0.5": {"verdict_weight": 0.5},
    "verdict weight 5": {"verdict_weight": 5.0},
    "identity share 0.3": {"identity_share": 0.3},
    "decision weight 1": {"decision_weight": 1.0},
    "full": {"method": "full"},  # the recipe's weights, before they are stored as a difference
}
BITS = (1, 2, 4, 8)


def main() -> None:
    """Train and score the arms that are not in the results yet, then print all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path, help="folder of compose.py")
    parser.add_argument("--rows", type=int, default=320, help="rows that an arm is trained on")
    parser.add_argument("--tokens", type=int, default=160, help="longest row")
    parser.add_argument("--only", nargs="*", choices=[*ARMS, "stored"], default=[*ARMS, "stored"])
    options = parser.parse_args()
    file: Path = options.out / "ablations.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    scorer = Scorer(options.out)

    def note(name: str, make: Callable[[], Path], **engine: Any) -> None:
        if name in found:
            return
        folder = make()
        found[name] = scorer.score(folder, **engine)
        file.write_text(json.dumps(found) + "\n", encoding="utf-8")
        print(name, {key: value for key, value in found[name].items() if key != "evidence"}, flush=True)

    for name in filter(options.only.__contains__, ARMS):
        note(name, partial(run, name, options))
    if "stored" in options.only:
        note("int8", partial(run, BASELINE, options), precision="int8")
        for bits in BITS:
            note(f"{bits} bits", partial(stored, folder_of("full", options.out), bits))
    Console(width=130).print(scorer.table(found))


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
    """Train an arm unless that was done before, and give its folder."""
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
    if not folder.is_dir():
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

    def __init__(self, out: Path) -> None:
        self.rows = {
            "development": halved(out / "development.jsonl", 1200, 60),
            "inserted": halved(out / "inserted.jsonl", 1000, 30),
        }
        lines = (DEFAULT_FOLDER / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
        self.references = [row for row in map(json.loads, lines) if row["answer"] != row["correction"]][:40]

    def score(self, folder: Path, **engine: Any) -> dict[str, Any]:
        """Score a trained aligner, in float32 by default."""
        with Aligner.load(folder, **(engine or {"engine": "torch", "precision": "float32"})) as aligner:
            evidence = {
                name: [round(aligner.evidence(row.question, row.answer), 3) for row in rows]
                for name, rows in self.rows.items()
            }
            return {
                "evidence": evidence,
                **{name: self.auc(name, values) for name, values in evidence.items()},
                "perplexity": self._perplexity(aligner),
                "megabytes": sum(file.stat().st_size for file in folder.iterdir()) / 1e6,
            }

    def auc(self, name: str, evidence: Sequence[float]) -> dict[str, float]:
        """Say how well the evidence tells bad answers from good ones, with a 95 % interval."""
        found: dict[str, float] = Auc.of(evidence, [row.unsafe for row in self.rows[name]]).model_dump()
        return found

    def difference(self, name: str, evidence: Sequence[float], base: Sequence[float]) -> tuple[float, float]:
        """Give the 95 % interval of one AUC minus another on the same rows, by paired bootstrap within each class."""
        unsafe = np.array([row.unsafe for row in self.rows[name]])
        rng, drawn = np.random.default_rng(0), []
        for _ in range(1000):
            at = np.concatenate([rng.choice(np.flatnonzero(unsafe == side), (unsafe == side).sum()) for side in (0, 1)])
            areas = [Auc.of(np.array(one)[at], unsafe[at], draws=1).value for one in (evidence, base)]
            drawn.append(areas[0] - areas[1])
        low, high = np.quantile(drawn, (0.025, 0.975))
        return float(low), float(high)

    def _perplexity(self, aligner: Aligner) -> float:
        nats = tokens = 0.0
        for row in self.references:
            ((likelihood, _),) = aligner.log_likelihood(row["question"], row["answer"], [row["correction"]])
            nats, tokens = nats - likelihood, tokens + aligner.count_tokens(row["correction"])
        return math.exp(nats / tokens)

    def table(self, found: dict[str, Any]) -> Table:
        """Show the arms."""
        table = Table(
            "arm", "AUC, real answers", "minus recipe's", "AUC, one sentence", "minus recipe's", "perplexity", "MB"
        )
        for name, scores in found.items():
            cells: list[str] = []
            for rows, values in scores["evidence"].items():
                low, high = self.difference(rows, values, found[BASELINE]["evidence"][rows])
                cells += [f"{scores[rows]['value']:.3f}", f"{low:+.3f} to {high:+.3f}"]
            table.add_row(name, *cells, f"{scores['perplexity']:.2f}", f"{scores['megabytes']:.0f}")
        return table


def halved(path: Path, characters: int, each: int) -> list[LabelledRow]:
    """Draw as many bad as good rows, of at most so many characters."""
    rows = [row for row in read_labelled(path) if len(row.question) + len(row.answer) <= characters]
    sides = ([row for row in rows if row.unsafe], [row for row in rows if not row.unsafe])
    return [row for side in sides for row in random.Random(0).sample(side, min(each, len(side)))]


if __name__ == "__main__":
    main()
