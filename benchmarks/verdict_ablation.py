"""Three ways to write a correction, trained on equal data for equal steps: is a verdict worth it, and how is an edit written?

    python benchmarks/verdict_ablation.py TRAIN.jsonl DEVELOPMENT.jsonl OUT [--rows 800] [--every 3]

- `operations`: a verdict, edits as operations on sentences
- `copy after verdict`: a verdict, edits as copies
- `copy`: no verdict; every answer is copied or corrected, as the published aligners do

Each arm trains all weights but the embeddings on the same rows in the same order, is exported as int8, calibrated on one
half of some development rows and scored on the other at medium; where there are verdicts, held-out answers that want an edit
are corrected whatever the verdict's score. OUT keeps the arms' folders, `ablation.json` the figures.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

from aligner_middleware import Aligner
from aligner_middleware.data.triples import read_rows
from aligner_middleware.evaluation.calibration import calibrate, measure, save_calibration
from aligner_middleware.evaluation.guard import guard
from aligner_middleware.evaluation.labelled_rows import read_labelled
from aligner_middleware.export.store import export_model
from aligner_middleware.locations import DEFAULT_FOLDER
from aligner_middleware.text.edits import split_sentences
from aligner_middleware.text.targets import verdict_of
from aligner_middleware.training import Stage, TrainConfig
from aligner_middleware.training.aligner import train

ARMS: dict[str, dict[str, Any]] = {
    "operations": {"verdict": True, "edits": "operations"},
    "copy": {"verdict": False},
    "copy after verdict": {"verdict": True, "edits": "copy"},
}


def edits(aligner: Aligner) -> dict[str, int]:
    """Have held-out answers corrected whose corrections are edits, and count what becomes of their sentences."""
    lines = (DEFAULT_FOLDER / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if verdict_of(row["answer"], row["correction"]) == "edit"][:70]
    found: Counter[str] = Counter()
    for row in rows:
        made = aligner.correct(row["question"], row["answer"], strength=0.0, on_doubt="keep")
        answer, reference, corrected = (
            {piece.strip() for piece in split_sentences(text)}
            for text in (row["answer"], row["correction"], made.corrected)
        )
        equal, intact = made.corrected == row["correction"], answer & reference <= corrected
        found.update({"rows": 1, "equal": equal, "intact": intact, "passes": made.usage.passes})
    return dict(found)


def main() -> None:
    """Train, export and score every arm."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("train", type=Path)
    parser.add_argument("development", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", type=int, default=800, help="rows trained on")
    parser.add_argument("--every", type=int, default=3, help="score every so many development rows")
    options = parser.parse_args()
    rows = [row for row in read_rows(options.train).triples if row.correction][: options.rows]
    labelled = read_labelled(options.development)[:: options.every]
    found = {}
    for name, settings in ARMS.items():
        folder = options.out / name.replace(" ", "-")
        config = TrainConfig(
            method="difference",
            difference_bits=4,
            max_length=640,
            decision_weight=6.0,
            warm_up=Stage(epochs=0),
            correction=Stage(epochs=1, identity_share=0),
            **settings,
        )
        if not (folder / "trained").is_dir():
            train(
                rows, folder / "trained", config, report=lambda at: print(at, flush=True) if at.done % 10 == 0 else None
            )
        if not (folder / "int8").is_dir():
            export_model(str(folder / "trained"), folder / "int8")
        with Aligner.load(folder / "int8") as aligner:
            measured = measure(aligner, labelled[::2])
            report = calibrate(measured, verdicts=aligner.has_verdicts, name=str(options.development))
        save_calibration(report.calibration, folder / "int8")
        with Aligner.load(folder / "int8") as aligner:
            evaluation = guard(aligner, labelled[1::2], ("medium",))
            found[name] = evaluation.summary() | ({"edits": edits(aligner)} if aligner.has_verdicts else {})
        (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in evaluation.lines("medium")))
        (options.out / "ablation.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(
            name, json.dumps(found[name]["strengths"] if "strengths" in found[name] else found[name])[:600], flush=True
        )


if __name__ == "__main__":
    main()
