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
    """A file's rows with the vectors of their questions, and of those answers that were compared."""

    def __init__(self, path: Path, encoder: SentenceEncoder) -> None:
        self.lines = path.read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in self.lines]
        self.answers = [row["answer"][:_CHARACTERS] for row in rows]
        self.questions = [plain(row["question"]) for row in rows]
        self.vectors = encoder.encode([row["question"][:_CHARACTERS] for row in rows])


def near_pairs(rows: Rows, others: Rows) -> NDArray[np.intp]:
    """Give the pairs of rows with near-duplicate questions, `[P, 2]`; each pair once where both sides are the same rows."""
    near = rows.vectors @ others.vectors.T > NEAR
    return np.argwhere(np.triu(near, 1) if rows is others else near)


def alike_answers(pairs: NDArray[np.intp], rows: Rows, others: Rows, encoder: SentenceEncoder) -> NDArray[np.bool_]:
    """Say of each pair whether its answers are near-duplicates too, `[P]`."""
    if not len(pairs):
        return np.zeros(0, bool)
    sides = []
    for side, of in enumerate((rows, others)):
        wanted, place = np.unique(pairs[:, side], return_inverse=True)  # long texts, so each is encoded once
        sides.append(encoder.encode([of.answers[row] for row in wanted])[place])
    cosines: NDArray[np.float32] = (sides[0] * sides[1]).sum(1)
    return np.greater(cosines, NEAR)


def main(folder: Path) -> None:
    """Measure, and write the development rows that stand apart."""
    encoder = SentenceEncoder()
    train = Rows(folder / "train.jsonl", encoder)
    asked = set(train.questions)
    files = {name: folder / f"{name}.jsonl" for name in ("development", "inserted")}
    files["held_out"] = DEFAULT_FOLDER / "held_out.jsonl"
    files["train"] = folder / "train.jsonl"
    print(f"{'rows':12} {'number':>6} {'same':>6} {'near':>6} {'near, answer too':>17}")
    for name, path in files.items():
        rows = train if name == "train" else Rows(path, encoder)
        same = [question in asked for question in rows.questions]
        repeated = len(same) - len(asked) if rows is train else sum(same)
        pairs = near_pairs(rows, train)
        near = set(pairs[:, 0])
        both = set(pairs[alike_answers(pairs, rows, train, encoder), 0])
        print(f"{name:12} {len(same):6} {repeated:6} {len(near):6} {len(both):17}", flush=True)
        if name == "development":
            apart = [line for row, line in enumerate(rows.lines) if row not in near and not same[row]]
            (folder / "development_apart.jsonl").write_text("".join(f"{line}\n" for line in apart), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
