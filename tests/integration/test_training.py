"""`aligner train` as a practitioner runs it: killed and repeated, in full, on two processes."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from aligner_middleware import Aligner
from aligner_middleware.data.triples import Triple
from aligner_middleware.errors import BuildError, ConfigError
from aligner_middleware.export.store import export_model
from aligner_middleware.training import Stage, TrainConfig, train
from tests.integration.conftest import random_checkpoint

STAGE = Stage(epochs=2, learning_rate=5e-3)
ROWS = [Triple(question=f"question {n}", answer="bad " * (n % 5 + 1), correction=f"good {n}") for n in range(48)]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return random_checkpoint("llama", tmp_path / "llama")


def command(base: Path, out: Path, *options: str) -> list[str]:
    data = base.parent / "rows.jsonl"
    data.write_text("".join(row.model_dump_json() + "\n" for row in ROWS))
    settings = ["--base", str(base), "--epochs", "6", "--batch-size", "4", "--save-steps", "5", "--no-bfloat16"]
    return ["-m", "aligner_middleware", "train", str(data), str(out), *settings, *options]


def run(*arguments: str) -> str:
    result = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_killed_run_resumes_elsewhere_and_ends_as_if_it_had_not_been_killed(base: Path, tmp_path: Path) -> None:
    options = ("--held-out", str(base.parent / "rows.jsonl"), "--patience", "50")
    run(*command(base, tmp_path / "whole", *options))
    killed = subprocess.Popen(
        [sys.executable, *command(base, tmp_path / "killed", *options)], stderr=subprocess.DEVNULL
    )
    checkpoints = tmp_path / ".killed.run" / "correction"
    deadline = time.monotonic() + 120
    while not list(checkpoints.glob("checkpoint-*/trainer_state.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed").exists()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".killed.run").rename(tmp_path / "elsewhere" / ".moved.run")
    resuming = [sys.executable, *command(base, tmp_path / "elsewhere" / "moved", *options)]
    result = subprocess.run(resuming, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert re.search(r"resumes after step \d+, \d+ steps left", result.stderr)
    whole, resumed = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "elsewhere/moved"))
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value)
    assert not (tmp_path / "elsewhere" / ".moved.run").exists()


def test_a_run_ends_with_a_checkpoint_before_memory_does(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig(base=str(base), warm_up=Stage(epochs=0), correction=STAGE, bfloat16=False, save_steps=1000)
    shares = iter([0.5, 0.6, 0.9])
    steps: list[int] = []
    with monkeypatch.context() as short:
        short.setattr("aligner_middleware.training.trainer.memory_share", lambda: next(shares))
        with pytest.raises(BuildError, match=r"held nearly all memory after step 3 of \d+"):
            train(ROWS, tmp_path / "out", config, report=lambda progress: steps.append(progress.done))
    assert steps == [1, 2, 3]
    train(ROWS, tmp_path / "out", config, report=lambda progress: steps.append(progress.done))
    assert steps[3:] == list(range(3, steps[-1] + 1))


def test_an_unfinished_run_with_other_settings_is_not_overwritten(base: Path, tmp_path: Path) -> None:
    def stop(progress: object) -> None:
        raise KeyboardInterrupt

    config = TrainConfig(base=str(base), warm_up=STAGE, correction=STAGE)
    with pytest.raises(KeyboardInterrupt):
        train(ROWS, tmp_path / "out", config, report=stop)
    with pytest.raises(ConfigError, match="unfinished run with other rows or settings"):
        train(ROWS[1:], tmp_path / "out", config)
    assert train(ROWS, tmp_path / "out", config).rows == len(ROWS)


def test_full_fine_tuning_gives_a_checkpoint_that_exports_with_its_prompt(base: Path, tmp_path: Path) -> None:
    config = TrainConfig(
        base=str(base),
        method="full",
        template="Q: {question}\nA: {answer}\nC: ",
        warm_up=Stage(epochs=0),
        correction=STAGE,
        batch_size=2,
        accumulation=2,
        checkpointing=True,
        save_steps=2,
        patience=1,
    )
    recipe = train(ROWS, tmp_path / "full", config, held_out=ROWS[:4], logs=tmp_path / "logs")
    assert recipe.losses["correction_held_out"] < 6
    assert list((tmp_path / "logs").rglob("events.out.tfevents*"))
    artifact = export_model(str(tmp_path / "full"), tmp_path / "out", "float32").artifact
    assert artifact.template == recipe.template
    assert artifact.template.name != "default"


def test_two_processes_train_together(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # `--multi_gpu` is accelerate's name for torchrun; with `--cpu` it would want MPI.
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1"]
    output = run(*launch, *command(base, tmp_path / "two"))
    recipe = json.loads((tmp_path / "two" / "training.json").read_text())
    assert recipe["devices"] == 2
    assert json.loads(output)["losses"] == recipe["losses"]
    assert recipe["losses"]["correction"] < recipe["losses"]["warm_up"]


def test_rows_with_instructions_give_an_aligner_that_takes_them(base: Path, tmp_path: Path) -> None:
    rows = [row.model_copy(update={"instruction": "formal" if n % 3 else None}) for n, row in enumerate(ROWS[:12])]
    config = TrainConfig(base=str(base), template="Q: {question}\nA: {answer}\nC: ", correction=STAGE)
    recipe = train(rows, tmp_path / "told", config)
    assert recipe.instructions == {"formal": 8}
    export_model(str(tmp_path / "told"), tmp_path / "out", "float32")
    with Aligner.load(tmp_path / "out", instruction="formal") as aligner:
        told, plain = (aligner.correct("q", "a", instruction=text).usage.prompt_tokens for text in (None, ""))
        assert told - plain == aligner.count_tokens("Instruction: formal\n")
    with pytest.raises(ConfigError, match="4 of the rows have none: give each an instruction"):
        train(rows, tmp_path / "none", config.model_copy(update={"template": "{instruction}|{question}|{answer}|"}))
