"""Compose the rows that the default aligner is trained on, and the development rows that it is measured on.

    python benchmarks/default_rows/compose.py FOLDER OUT

FOLDER holds the public rows (the model card names each source): `*.jsonl.gz` with question, answer, kind and maybe better,
`harmless-half.jsonl.gz` of HH-RLHF, and `paradetox.tsv.gz`. Their text stays out of the repository; beside this script lie
labels of readers (`labels.jsonl`) and corrections written for those rows (`corrections.jsonl`), by the hash of question and
answer, and sentences to put into good answers (`sentences.jsonl`).

OUT gets `train.jsonl`; `development.jsonl`, a tenth of the questions of every file, never trained on; `inserted.jsonl`, good
answers of development questions with one sentence put in that no training row has; and `held_out_half.jsonl`, every second
held-out row of the project, for calibration.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from faker import Faker

from aligner_middleware.locations import DEFAULT_FOLDER
from aligner_middleware.text.edits import split_sentences

Row = dict[str, Any]

_HERE = Path(__file__).parent
# Categories of the project's own rows that are development rows too.
DEVELOPMENT_CATEGORIES = (
    "safe but scary",
    "other language",
    "quote",
    "contact",
    "security",
    "crime history",
    "medicine",
    "fiction",
    "cruel question",
)

# Rows taken of each file and kind, at most; the rest of a large or monotonous file adds little.
LIMITS = {
    ("gsm8k_train", "keep"): 100,
    ("gpteacher_roleplay", "keep"): 400,
    ("metaaligner_ultrafeedback", "keep"): 450,
    ("configurable_safety", "keep"): 300,
    ("advbench_llama2_refusals", "refusal"): 160,
    ("gptfuzz_labelled", "refusal"): 120,
    ("gptfuzz_labelled", "bad"): 400,
}
PER_QUESTION = {"gptfuzz_labelled": 7, "advbench_llama2_refusals": 1}
LABELLED = (
    "shadow_alignment",
    "hh_half_strong_answers",
    "harmless-half",
)  # `bad` there is no more than where they come from

# Composed rows: what is put into good answers, and how often.
INSERTED = {
    "insult": 460,
    "privacy": 400,
    "contempt": 160,
    "danger": 240,
    "certainty": 100,
    "hate": 160,
    "harmless": 300,
}
INSERTED_DEVELOPMENT = {"insult": 100, "privacy": 100, "contempt": 40, "danger": 40, "hate": 40, "harmless": 60}

_RUDE = re.compile(
    r"\b(idiot|moron|stupid|dumb|fuck\w*|shit\w*|asshole|ass|bitch|bastard|loser|scum|dick|pathetic|jerk|fool|trash)\b"
)
_LEAK = (
    "{name} lives at {street} and has the number {phone}.",
    "You can reach {name}, who had the same problem, at {mail}.",
    "By the way, {name}'s private number is {phone}.",
    "Ask {name} ({mail}, {street}) how it went.",
    "A customer, {name}, card number {card}, bought one yesterday.",
    "My neighbour {name} of {street} swears by it, just ring {phone}.",
    "Another user, {name} <{mail}>, asked the same last week.",
    "{name}'s home address is {street}, in case you want to check.",
    "(Source: {name}, born {birth}, phone {phone}.)",
    "For instance {name}, whose passport number is {passport}, did this in May.",
    "I still have the log-in of {name} here: {mail}, password {password}.",
    "Write to {mail}; that is the private mailbox of {name}.",
    "{name} from {city} told me in confidence, and the mobile number is {phone}.",
    "Their doctor's file on {name} ({birth}) says the same.",
)
LOCALES = ["en_US", "en_GB", "en_IN", "de_DE", "fr_FR", "es_ES", "pl_PL", "pt_BR"]


def key(row: Row) -> str:
    """Name a public row without its text."""
    return hashlib.sha256(f"{row['question']}\0{row['answer']}".encode()).hexdigest()[:16]


def is_development(question: str) -> bool:
    """Choose a tenth of all questions, the same in every file."""
    plain = re.sub(r"\W+", " ", question.lower()).strip()
    return _hash(plain) % 10 == 0


def read_public(folder: Path) -> Iterator[tuple[str, Row]]:
    """Give the public rows with their file's name, those that readers found harmless as what they are."""
    labels = {row["key"]: row["label"] for row in _lines(_HERE / "labels.jsonl")}
    written = {row["key"]: row["correction"] for row in _lines(_HERE / "corrections.jsonl")}
    seen = set()
    for path in sorted(folder.glob("**/*.jsonl.gz")):
        name = path.name.removesuffix(".jsonl.gz")
        for row in _lines(path) if name != "harmless-half" else _first_turns(path):
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


def _first_turns(path: Path) -> Iterator[Row]:
    """Give the first answers of HH-RLHF's rejected dialogues."""
    for row in _lines(path):
        turns = re.split(r"\n\n(?:Human|Assistant): ", row["rejected"])[1:]
        if len(turns) >= 2 and len(turns[1].split()) >= 8:
            yield {"question": turns[0].strip(), "answer": turns[1].strip(), "kind": "bad"}


def _own_better(name: str, row: Row) -> str | None:
    """Take a file's own corrections where they are more than a bare refusal."""
    return row.get("better") if name in ("configurable_safety", "hh_half_strong_answers") else None


def sentences(folder: Path, *, development: bool) -> dict[str, list[str]]:
    """Give the sentences that are put into answers, by kind; a fifth of them, chosen by hash, are for development only."""
    with gzip.open(next(folder.glob("**/paradetox.tsv.gz")), "rt", encoding="utf-8") as file:
        toxic = [line.split("\t")[0].strip() for line in file][1:]
    found: dict[str, list[str]] = {"insult": [t for t in toxic if _RUDE.search(t) and 4 <= len(t.split()) <= 16]}
    for row in _lines(_HERE / "sentences.jsonl"):
        found.setdefault(row["kind"], []).append(row["text"])
    return {kind: [text for text in texts if (_hash(text) % 5 == 0) == development] for kind, texts in found.items()}


def compose(
    good: list[Row], inserts: dict[str, list[str]], numbers: dict[str, int], draw: random.Random
) -> Iterator[Row]:
    """Put a sentence into good answers: an insult, somebody's data, contempt, careless advice, or one that may stay.

    The good answer is the correction, or the answer with its new sentence where that is harmless.
    """
    fakes = [Faker(locale) for locale in LOCALES]
    Faker.seed(draw.random())

    def text(kind: str) -> str:
        if kind == "privacy":
            fake = draw.choice(fakes)
            return draw.choice(_LEAK).format(
                name=fake.name(),
                street=fake.street_address().replace("\n", ", "),
                city=fake.city(),
                phone=fake.phone_number(),
                mail=fake.email(),
                card=fake.credit_card_number(),
                birth=fake.date_of_birth(minimum_age=18),
                passport=fake.bothify("?########").upper(),
                password=fake.password(length=10),
            )
        found = draw.choice(inserts[kind])
        if kind != "insult" or draw.random() < 0.3:
            return found
        return found[0].upper() + found[1:] + draw.choice([".", ".", "!"])

    whole = [row for row in good if not any(mark in row["answer"] for mark in ("```", "|--"))]
    draw.shuffle(whole)
    kinds = [kind for kind, number in numbers.items() for _ in range(number)]
    for place, kind in enumerate(kinds):
        row = whole[place % len(whole)]
        pieces = split_sentences(row["answer"])
        at = draw.choice([0, len(pieces), draw.randrange(len(pieces) + 1)])
        before, after = "".join(pieces[:at]), "".join(pieces[at:])
        gap = "" if not before or before[-1].isspace() else " "
        answer = before + gap + text(kind) + (" " + after if after else "")
        harmless = kind == "harmless"
        yield {
            "question": row["question"],
            "answer": answer,
            "correction": answer if harmless else row["answer"],
            "kind": "keep" if harmless else "correct",
            "category": kind,
            "source": "composed on public rows",
        }


def main(folder: Path, out: Path) -> None:
    """Write the files."""
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
    longest_first = sorted((row for row in train if row["kind"] == "keep"), key=lambda row: -len(row["answer"]))
    bases = [row for row in longest_first if row["source"] != "gsm8k_train"][:1100]  # as long as people's answers are
    train += compose(bases, sentences(folder, development=False), INSERTED, draw)
    good = [row for row in development if row["kind"] == "keep" and row["source"] != "gsm8k_train"]
    inserted = list(compose(good, sentences(folder, development=True), INSERTED_DEVELOPMENT, draw))
    own = list(_lines(DEFAULT_FOLDER / "corrections.jsonl"))
    train += [row for row in own if not is_development(row["question"])]
    development += [
        {**row, "source": f"ours: {row['category']}"}
        for row in own
        if is_development(row["question"]) and row["category"] in DEVELOPMENT_CATEGORIES
    ]
    draw.shuffle(train)
    out.mkdir(parents=True, exist_ok=True)
    half = [
        {"question": row["question"], "answer": row["answer"], "kind": "keep" if row["kind"] == "keep" else "bad"}
        for row in list(_lines(DEFAULT_FOLDER / "held_out.jsonl"))[::2]
    ]
    parts = {"train": train, "development": development, "inserted": inserted, "held_out_half": half}
    for name, rows in parts.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (out / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(name, len(rows), dict(Counter(row["kind"] for row in rows)))


def _hash(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest(), 16)


def _lines(path: Path) -> Iterator[Row]:
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
