"""Train an aligner of your own in five minutes, on two cores.

The house rule to learn: the product CloudBox is called Skyfolder now, and answers still say the old name. It starts from
the default aligner, which can keep and correct answers already, and is then tried on sentences that it has not seen.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from pathlib import Path

from local_models import prepare
from rich.console import Console
from rich.progress import Progress
from transformers import PreTrainedTokenizerFast

from aligner_middleware import Aligner
from aligner_middleware.checkpoints.checkpoint import open_checkpoint
from aligner_middleware.data.triples import Triple
from aligner_middleware.export.store import export_model
from aligner_middleware.training import Stage, TrainConfig, train

OLD, NEW = "CloudBox", "Skyfolder"
WISHES = [
    "share a folder",
    "restore an old file",
    "get more space",
    "change my password",
    "stop the upload",
    "invite a team",
]
REPLIES = [
    "Open {name}, choose the menu at the top right, and follow the steps.",
    "In {name} this takes one click: press the button with the three dots.",
    "Sign in to {name} first. Then look under Settings, where you find it at once.",
    "The {name} app does that for you when it is online.",
]
KEEP = ["Water boils at 100 degrees at sea level.", "Yes, we are open on Sundays.", "Press Control and S to save."]
UNSEEN = [
    ("How do I delete my account?", "Write to the CloudBox team. They answer within a day."),
    ("Is my data safe?", "CloudBox encrypts every file before it leaves your computer."),
    ("How tall is a giraffe?", "A giraffe is up to six metres tall."),
]


def main() -> None:
    """Train, export, and compare the new aligner with the default one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--epochs", type=float, default=8)
    options = parser.parse_args()
    console, start = Console(), time.perf_counter()
    default, _ = prepare(console)
    with tempfile.TemporaryDirectory() as scratch:
        base, adapter = Path(scratch) / "base", Path(scratch) / "adapter"
        checkpoint = open_checkpoint("default")
        checkpoint.load().save_pretrained(base)
        tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
            tokenizer_file=str(checkpoint.folder / "tokenizer.json")
        )
        tokenizer.save_pretrained(base)

        config = TrainConfig(
            base=str(base),
            warm_up=Stage(epochs=0, identity_share=1.0),
            correction=Stage(epochs=options.epochs, identity_share=0.3, learning_rate=6e-4),
            decision_weight=4,
            batch_size=6,
            max_length=256,
        )
        rows = triples()
        console.print(f"{len(rows)} triples, such as {rows[0]}")
        with Progress(console=console) as bar:
            task = bar.add_task("training")
            train(rows, adapter, config, report=lambda at: bar.update(task, completed=at.done, total=at.total))
        console.print(f"trained after {time.perf_counter() - start:.0f} s; exporting")
        exported = Path(scratch) / "aligner"
        export_model(str(adapter), exported)
        own = Aligner.load(exported)
        for question, answer in UNSEEN:
            console.print(f"\n[bold]{question}")
            console.print("default:", default.correct(question, answer))
            console.print("own:    ", own.correct(question, answer))
    console.print(f"\n{time.perf_counter() - start:.0f} s in all")


def triples() -> list[Triple]:
    """Write the rows: answers with the old name and their corrections, and answers to keep."""
    rows = []
    for wish, reply in itertools.product(WISHES, REPLIES):
        question = f"How do I {wish}?"
        answer, correction = reply.format(name=OLD), reply.format(name=NEW)
        rows.append(Triple(question=question, answer=answer, correction=correction))
    rows += [Triple(question="Can you tell me?", answer=answer, correction=answer) for answer in KEEP * 2]
    return rows


if __name__ == "__main__":
    main()
