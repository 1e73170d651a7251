"""Compose the rows that the default aligner is trained on, and the development rows that it is measured on.

    python benchmarks/default_rows/compose.py FOLDER OUT

FOLDER holds the public rows (the model card names each source): `*.jsonl.gz` with question, answer, kind and maybe better,
and `paradetox.tsv.gz`. Their text stays out of the repository; beside this script lie what readers said of them
(`labels.jsonl`) and corrections written for them (`corrections.jsonl`), by the hash of question and answer. OUT gets
`train.jsonl`, `development.jsonl`, a tenth of the questions of every file, never trained on, and `held_out_half.jsonl`, every
second held-out row of the project, for calibration.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from faker import Faker

from aligner_middleware.artifact import DEFAULT_FOLDER
from aligner_middleware.edits import split_sentences

Row = dict[str, Any]

# Rows taken of each file and kind, at most; the rest of a large or monotonous file adds little.
LIMITS = {
    ("gsm8k_train", "keep"): 220,
    ("gpteacher_roleplay", "keep"): 330,
    ("metaaligner_ultrafeedback", "keep"): 520,
    ("configurable_safety", "keep"): 450,
    ("advbench_llama2_refusals", "refusal"): 160,
    ("gptfuzz_labelled", "refusal"): 100,
    ("advbench_uncensored_vicuna", "bad"): 340,
    ("gptfuzz_labelled", "bad"): 200,
    ("shadow_alignment", "bad"): 360,
}
PER_QUESTION = {"gptfuzz_labelled": 5, "advbench_llama2_refusals": 1}
LABELLED = ("shadow_alignment", "hh_half_strong_answers")  # their `bad` is no more than where they come from
INSULTS, LEAKS = 430, 140  # composed rows

_RUDE = re.compile(
    r"\b(idiot|moron|stupid|dumb|fuck\w*|shit\w*|asshole|ass|bitch|bastard|loser|scum|dick|pathetic|jerk|fool|trash)\b"
)
_LEAK = (
    "{name} lives at {street} and has the number {phone}.",
    "You can reach {name}, who had the same problem, at {mail}.",
    "By the way, {name}'s private number is {phone}.",
    "Ask {name} ({mail}, {street}) how it went.",
    "A customer, {name}, card number {card}, bought one yesterday.",
)


def key(row: Row) -> str:
    """Name a public row without its text."""
    return hashlib.sha256(f"{row['question']}\0{row['answer']}".encode()).hexdigest()[:16]


def is_development(question: str) -> bool:
    """Choose a tenth of all questions, the same in every file."""
    plain = re.sub(r"\W+", " ", question.lower()).strip()
    return int(hashlib.sha256(plain.encode()).hexdigest(), 16) % 10 == 0


def read_public(folder: Path) -> Iterator[tuple[str, Row]]:
    """Give the public rows with their file's name, those that readers found harmless as what they are."""
    labels = {row["key"]: row["label"] for row in _lines(Path(__file__).with_name("labels.jsonl"))}
    written = {row["key"]: row["correction"] for row in _lines(Path(__file__).with_name("corrections.jsonl"))}
    seen = set()
    for path in sorted(folder.glob("*.jsonl.gz")):
        name = path.name.removesuffix(".jsonl.gz")
        for row in _lines(path):
            own = key(row)
            if own in seen:
                continue
            seen.add(own)
            label = labels.get(own)
            if row["kind"] == "bad" and (label in ("dull", "unsure") or (label is None and name in LABELLED)):
                continue  # neither clearly bad nor clearly good
            kind = "keep" if row["kind"] == "bad" and label == "good" else row["kind"]
            found = {"question": row["question"], "answer": row["answer"], "kind": kind, "source": name}
            if kind == "bad" and (better := written.get(own) or _own_better(name, row)):
                found["better"] = better
            yield name, found


def _own_better(name: str, row: Row) -> str | None:
    """Take a file's own corrections where they are more than a bare refusal."""
    return row.get("better") if name in ("configurable_safety", "hh_half_strong_answers") else None


def compose(good: list[Row], insults: list[str], draw: random.Random) -> Iterator[Row]:
    """Put an insult or somebody's data into good answers: the good answer is the correction."""
    fake = Faker(["en_US", "en_GB", "en_IN", "de_DE"])
    Faker.seed(draw.random())

    def leak() -> str:
        return draw.choice(_LEAK).format(
            name=fake.name(),
            street=fake.street_address(),
            phone=fake.phone_number(),
            mail=fake.email(),
            card=fake.credit_card_number(),
        )

    def insult() -> str:
        text = draw.choice(insults)
        return text if draw.random() < 0.3 else text[0].upper() + text[1:] + draw.choice([".", ".", "!"])

    kinds: list[tuple[str, Callable[[], str]]] = [("insult", insult)] * INSULTS + [("privacy", leak)] * LEAKS
    for (category, make), row in zip(kinds, draw.choices(good, k=len(kinds)), strict=True):
        pieces = split_sentences(row["answer"])
        if any(mark in row["answer"] for mark in ("```", "|--")):
            continue
        at = draw.choice([0, len(pieces), draw.randrange(len(pieces) + 1)])
        before = "".join(pieces[:at])
        gap = "" if not before or before[-1].isspace() else " "
        after = "".join(pieces[at:])
        answer = before + gap + make() + (" " + after if after else "")
        yield {
            "question": row["question"],
            "answer": answer,
            "correction": row["answer"],
            "kind": "correct",
            "category": category,
            "source": "composed on public rows",
        }


def main(folder: Path, out: Path) -> None:
    """Write both files."""
    draw = random.Random(0)
    public = list(read_public(folder))
    development = [row for _, row in public if is_development(row["question"])]
    groups: dict[tuple[str, str], list[Row]] = {}
    for name, row in public:
        if not is_development(row["question"]):
            groups.setdefault((name, row["kind"]), []).append(row)
    train: list[Row] = []
    for (name, kind), rows in groups.items():
        draw.shuffle(rows)
        rows.sort(key=lambda row: "better" not in row)  # those with a correction first
        asked: Counter[str] = Counter()
        taken = []
        for row in rows:
            asked[row["question"]] += 1
            if asked[row["question"]] <= PER_QUESTION.get(name, len(rows)):
                taken.append(row)
        train += taken[: LIMITS.get((name, kind), len(taken))]
    with gzip.open(folder / "paradetox.tsv.gz", "rt", encoding="utf-8") as file:
        toxic = [line.split("\t")[0].strip() for line in file][1:]
    insults = [text for text in toxic if _RUDE.search(text) and 4 <= len(text.split()) <= 16]
    good = [row for row in train if row["kind"] == "keep" and row["source"] != "gsm8k_train"]
    train += compose(good, insults, draw)
    own = _lines(DEFAULT_FOLDER / "corrections.jsonl")
    train += [row for row in own if not is_development(row["question"])]
    development += [
        {**row, "source": f"ours: {row['category']}"}
        for row in _lines(DEFAULT_FOLDER / "corrections.jsonl")
        if is_development(row["question"]) and row["category"] == "safe but scary"
    ]
    draw.shuffle(train)
    out.mkdir(parents=True, exist_ok=True)
    half = [
        {"question": row["question"], "answer": row["answer"], "kind": "keep" if row["kind"] == "keep" else "bad"}
        for row in list(_lines(DEFAULT_FOLDER / "held_out.jsonl"))[::2]
    ]
    for name, rows in (("train", train), ("development", development), ("held_out_half", half)):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (out / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(name, len(rows), dict(Counter(row["kind"] for row in rows)))


def _lines(path: Path) -> Iterator[Row]:
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
