"""Additions to the trainer of transformers: progress, a guard of the memory, and the checkpoint to resume from."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from aligner_middleware.data.files import write_text
from aligner_middleware.data.progress import Progress, Report

RUN_FILE = "run.json"  # marks the folder of an unfinished run as ours
_MEMORY_SHARE = 0.85  # of the memory: a process that holds more ends its run


def run_folder(out: Path) -> Path:
    """Give the folder of the checkpoints of an unfinished run, beside the folder that the run writes."""
    return out.with_name(f".{out.name}.run")


def last_checkpoint(folder: Path) -> str | None:
    """Find the newest whole checkpoint; the trainer writes its state last."""
    whole = []
    for checkpoint in folder.glob("checkpoint-*"):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        whole.append(checkpoint)
    newest = max(whole, key=lambda checkpoint: int(checkpoint.name.split("-")[1]), default=None)
    if newest is None:
        return None
    state = newest / "trainer_state.json"
    content = json.loads(state.read_text(encoding="utf-8"))
    if best := content.get("best_model_checkpoint"):  # an absolute path; the run's folder may have moved since
        content["best_model_checkpoint"] = str(folder / Path(best).name)
        write_text(state, json.dumps(content, indent=2))
    return str(newest)


def memory_share() -> float:
    """Give the share, 0 to 1, of this machine's or container's memory that this process holds."""
    limit = int(psutil.virtual_memory().total)
    with suppress(OSError, ValueError):  # not Linux, or "max"
        limit = min(limit, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    return int(psutil.Process().memory_info().rss) / limit


class MemoryGuard(TrainerCallback):
    """Ends a run with a checkpoint before the system would kill it: an allocator may keep more memory with each new shape.

    Attributes:
        exceeded: Whether it ended the run.
    """

    def __init__(self) -> None:
        self.exceeded = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """See `TrainerCallback.on_step_end`."""
        if state.global_step < state.max_steps and memory_share() > _MEMORY_SHARE:
            self.exceeded = control.should_save = control.should_training_stop = True


class Reporter(TrainerCallback):
    """Reports every step, with its loss in nats a token (of DPO: in nats a pair) and the tokens a second since the start.

    Args:
        stage: Name of the stage.
        report: Called in the first process only.
    """

    def __init__(self, stage: str, report: Report) -> None:
        self._stage = stage
        self._report = report
        self._start: tuple[float, int] | None = None  # time in seconds, and tokens seen by then

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """See `TrainerCallback.on_train_begin`; reports a run that resumes from a checkpoint."""
        if state.global_step and state.is_world_process_zero:
            self._start = time.monotonic(), int(state.num_input_tokens_seen)
            left = state.max_steps - state.global_step
            self._send(state, f"resumes after step {state.global_step}, {left} steps left")

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """See `TrainerCallback.on_log`."""
        if logs and "loss" in logs and state.is_world_process_zero:
            now = time.monotonic(), int(state.num_input_tokens_seen)
            self._start = self._start or now  # the first step, which prepares kernels, does not count
            seconds, tokens = now[0] - self._start[0], now[1] - self._start[1]
            speed = f", {tokens / seconds:.0f} tokens/s" if seconds > 1 else ""
            self._send(state, f"loss {float(logs['loss']):.3f}{speed}")

    def _send(self, state: TrainerState, detail: str) -> None:
        self._report(Progress(self._stage, state.global_step, state.max_steps, detail))
