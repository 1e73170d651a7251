"""How many tokens a step of vLLM's engine gives, with drafts from the answer and without.

    python benchmarks/vllm_drafts.py URL FOLDER ROWS.jsonl [--count 40] [--out FILE.json] [--same-as FILE.json]

URL is that of a vLLM server of FOLDER, which `aligner export MODEL FOLDER --form checkpoint` wrote (docs/remote-vllm.md has
the commands), and which nobody else asks meanwhile: one answer is corrected after the other, and the engine counts its steps.
ROWS hold question and answer; rows whose answer has 40 to 160 words are drawn. `--same-as` compares the tokens with those of
another run.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from aligner_middleware.artifact import CheckpointArtifact
from aligner_middleware.text.template import encode_prompt
from tests.integration.vllm_server import VllmServer

SHORTEST, LONGEST = 40, 160  # words of an answer
ROOM = 400  # tokens of a correction
COUNTERS = {"steps": "iteration_tokens_total_count", "drafted": "spec_decode_num_draft_tokens_total"}


def drawn(path: Path, count: int) -> list[dict[str, str]]:
    """Draw rows whose answers are of middle length."""
    rows: list[dict[str, str]] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if SHORTEST <= len(row["answer"].split()) <= LONGEST]
    random.Random(0).shuffle(rows)
    return rows[:count]


def main() -> None:
    """Ask for the corrections, and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("folder", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--same-as", type=Path)
    options = parser.parse_args()
    server = VllmServer(options.url, Path())
    artifact = CheckpointArtifact.read(options.folder)
    tokenizer = artifact.tokenizer(options.folder)

    def written(row: dict[str, str]) -> list[int]:
        prompt = encode_prompt(tokenizer, artifact.template, row["question"], row["answer"])
        tokens: list[int] = server.complete(prompt, max_tokens=ROOM)["token_ids"]
        return tokens

    before = {name: server.metric(counter) for name, counter in COUNTERS.items()}
    start = time.perf_counter()
    texts = [written(row) for row in drawn(options.rows, options.count)]
    seconds = time.perf_counter() - start
    counted = {name: server.metric(counter) - before[name] for name, counter in COUNTERS.items()}
    tokens = sum(map(len, texts))
    result = {"answers": len(texts), "tokens": tokens, "tokens_a_step": tokens / counted["steps"]} | counted
    print(json.dumps(result | {"seconds": seconds}, indent=2))
    if options.same_as:
        others = json.loads(options.same_as.read_text())["texts"]
        print(f"{sum(one == other for one, other in zip(texts, others, strict=True))} of {len(texts)} are the same")
    if options.out:
        options.out.write_text(json.dumps(result | {"seconds": seconds, "texts": texts}))


if __name__ == "__main__":
    main()
