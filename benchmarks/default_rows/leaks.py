"""How near the rows that measure the default aligner are to those it is trained on.

    python benchmarks/default_rows/leaks.py OUT

OUT is the folder of `compose.py`. For each file of rows that measure, it prints how many questions stand in the training rows
word for word; how many have a near-duplicate there, by the cosine of all-MiniLM-L6-v2; how many rows have one with an alike
answer too; and the same among training rows. `OUT/development_apart.jsonl` gets the development rows without either.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from aligner_middleware.evaluation.sentence_encoder import SentenceEncoder
from aligner_middleware.locations import DEFAULT_FOLDER

NEAR = 0.9  # cosine of near-duplicates: the same question in other words
_CHARACTERS = 600  # of a text that are compared: two or three paragraphs


def plain(text: str) -> str:
    """Give a text's words alone."""
    return re.sub(r"\W+", " ", text.lower()).strip()


class Rows:
    """A file's rows with the vectors of their questions and answers."""

    def __init__(self, path: Path, encoder: SentenceEncoder) -> None:
        self.lines = path.read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in self.lines]
        self.questions = [plain(row["question"]) for row in rows]
        self.vectors = {
            side: encoder.encode([row[side][:_CHARACTERS] for row in rows]) for side in ("question", "answer")
        }

    def likeness(self, side: str, other: Rows) -> NDArray[np.float32]:
        """Give the cosine of every row with every one of `other`, `[N, M]`."""
        return self.vectors[side] @ other.vectors[side].T


def main(folder: Path) -> None:
    """Measure, and write the development rows that stand apart."""
    encoder = SentenceEncoder()
    train = Rows(folder / "train.jsonl", encoder)
    asked = set(train.questions)
    files = {name: folder / f"{name}.jsonl" for name in ("development", "inserted")}
    files["held_out"] = DEFAULT_FOLDER / "held_out.jsonl"
    print(f"{'rows':12} {'number':>6} {'same':>6} {'near':>6} {'near, answer too':>17}")
    for name, path in files.items():
        rows = Rows(path, encoder)
        same = np.array([question in asked for question in rows.questions])
        near = rows.likeness("question", train) > NEAR
        both = near & (rows.likeness("answer", train) > NEAR)
        print(f"{name:12} {len(same):6} {same.sum():6} {near.any(1).sum():6} {both.any(1).sum():17}")
        if name == "development":
            apart = [line for line, leaks in zip(rows.lines, near.any(1) | same, strict=True) if not leaks]
            (folder / "development_apart.jsonl").write_text("".join(f"{line}\n" for line in apart), encoding="utf-8")
    near = np.triu(train.likeness("question", train) > NEAR, 1)
    both = near & (train.likeness("answer", train) > NEAR)
    repeats = len(train.questions) - len(asked)
    print(f"{'train':12} {len(near):6} {repeats:6} {near.any(1).sum():6} {both.any(1).sum():17}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
