"""`aligner train`: from rows to an adapter, a difference or a checkpoint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from aligner_middleware.cli.options import options_from
from aligner_middleware.cli.output import console, note, write_json
from aligner_middleware.cli.progress import resumable, showing
from aligner_middleware.cli.rows import usable_rows
from aligner_middleware.errors import MissingExtraError
from aligner_middleware.training.config import TrainConfig

_STAGES = {
    "warm_up_epochs": ["warm_up.epochs"],
    "epochs": ["correction.epochs"],
    "identity_share": ["correction.identity_share"],
    "learning_rate": ["warm_up.learning_rate", "correction.learning_rate"],
    "schedule": ["warm_up.schedule", "correction.schedule"],
}


@options_from(TrainConfig, "config", _STAGES)
def train(
    data: Annotated[Path, typer.Argument(help="Rows to train on: JSON lines, plain or gzipped.")],
    out: Annotated[Path, typer.Argument(help="Folder to write the result to.")],
    config: TrainConfig,
    held_out: Annotated[Path | None, typer.Option(help="Rows that are scored and never trained on.")] = None,
    logs: Annotated[Path | None, typer.Option(help="Folder for TensorBoard's logs.")] = None,
) -> None:
    """Train an aligner in two stages: identity warm-up (correction := answer), then correction.

    Each row of DATA is a JSON object in one of these forms, told by its keys:

    - question, answer, correction: ours, and the published Aligner data; maybe instruction, which says how to correct

    - question, answer, kind (keep, refusal or bad), maybe better: labelled answers; without better a bad one teaches its
      verdict alone

    - prompt, chosen, rejected: TRL's preferences, texts or messages; rejected is the answer, chosen its correction

    - chosen, rejected: whole dialogues, as messages or as "Human: … Assistant: …"

    - prompt, response_0, response_1, is_response_0_safe, …: PKU-SafeRLHF

    - prompt, response, is_safe: BeaverTails; safe responses are kept

    Rows that teach nothing (an empty text, two unsafe responses) are left out and named by line. A line that is no such
    object stops the command before it trains.

    Repeat the command to resume an interrupted run from its last checkpoint. With several devices or machines, put
    `accelerate launch` before it: accelerate launch -m aligner_middleware train DATA OUT.

    OUT gets an adapter of peft's (or a difference, or a whole checkpoint) and training.json with the settings, for
    `aligner export OUT`.
    """
    try:
        from aligner_middleware.training import train as run
    except ImportError as exc:
        raise MissingExtraError("aligner train", "train") from exc
    console.quiet = quiet = os.environ.get("RANK", "0") != "0"  # under accelerate the first process writes for all
    rows = usable_rows(data)
    unseen = usable_rows(held_out) if held_out else []
    note(f"train: {len(rows)} rows")
    with resumable(), showing("train", "steps") as report:
        recipe = run(rows, out, config, held_out=unseen, logs=logs, report=report)
    if not quiet:
        note(f"train: done, {out}")
        write_json({"rows": recipe.rows, "rows_left_out": recipe.rows_left_out, "losses": recipe.losses})
