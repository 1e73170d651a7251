"""`aligner rounds` on small random policies: every family, both methods, killed, stopped, and its control."""

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast
from trl.trainer.reward_config import RewardConfig
from trl.trainer.reward_trainer import RewardTrainer
from typer.testing import CliRunner

from aligner_middleware import ConfigError
from aligner_middleware.cli.app import app
from aligner_middleware.data.prompts import Prompt
from aligner_middleware.evaluation.pairwise import OfflineJudge
from aligner_middleware.evaluation.stop_rules import StopRules
from aligner_middleware.rlhf.plot import draw_rounds
from aligner_middleware.rlhf.preferences import make_preferences
from aligner_middleware.rlhf.round_results import read_rounds
from aligner_middleware.rlhf.rounds import run_rounds
from aligner_middleware.training import PolicyConfig
from aligner_middleware.training.policy import policy_tokenizer
from tests.fakes import InstantAligner, tokenizer_json
from tests.integration.conftest import random_checkpoint

PROMPTS = [Prompt(question=f"question {number}") for number in range(24)]
HELD_OUT = [Prompt(question=f"unseen {number}") for number in range(6)]
ALIGNER = InstantAligner(lambda question, answer: f"good answer to {question}")
LENIENT = StopRules(max_kl=100, length=(0, 100), min_distinct=0, max_blank=1, max_drop=2)
CHAT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}<|im_start|>assistant\n"


class Letters:
    """Texts as counts of their letters."""

    def encode(self, texts: Any) -> Any:
        found = np.array([[text.lower().count(letter) + 1e-3 for letter in "aeiouxyz"] for text in texts], np.float32)
        return found / np.linalg.norm(found, axis=1, keepdims=True)


JUDGE = OfflineJudge(Letters())


def checkpoint(folder: Path, family: str = "llama", chat: bool = True) -> Path:
    random_checkpoint(family, folder)
    (folder / "tokenizer.json").write_text(tokenizer_json())
    file = str(folder / "tokenizer.json")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=file, eos_token="<|im_end|>")  # type: ignore[no-untyped-call]
    tokenizer.chat_template = CHAT.replace("{% endfor %}", "{% endfor %}{% if add_generation_prompt %}") + "{% endif %}"
    if not chat:
        tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    return folder


def config(base: Path, **options: Any) -> PolicyConfig:
    settings = {"answer_tokens": 12, "learning_rate": 1e-3, "batch_size": 4, "save_steps": 2, "bfloat16": False}
    return PolicyConfig(base=str(base), **settings | options)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("family", "method", "chat"),
    [("llama", "dpo", True), ("gemma", "dpo", False), ("qwen3", "sft", True), ("llama", "sft", False)],
)
def test_each_round_learns_from_what_the_policy_says_now(family: str, method: str, chat: bool, tmp_path: Path) -> None:
    settings = config(checkpoint(tmp_path / "base", family, chat), method=method)
    out = tmp_path / "out"
    run = run_rounds(PROMPTS, HELD_OUT, out, ALIGNER, JUDGE, settings, rounds=2, rules=LENIENT)
    assert [one.number for one in run.rounds] == [0, 1, 2]
    assert (run.best, run.stopped) == (2, [])
    assert run.rounds[0].metrics.kl == 0 < run.rounds[1].metrics.kl  # type: ignore[union-attr]
    first, second = (rows(out / f"round-{number}" / "preferences.jsonl") for number in (1, 2))
    assert {row["provenance"]["upstream"] for row in second} == {f"{settings.base}, round 1"}
    assert isinstance(first[0]["prompt"], list) is chat
    said = {row["question"]: row["answer"] for row in rows(out / "round-2" / "answers.jsonl")}
    for row in second:
        question = row["prompt"][-1]["content"] if chat else row["prompt"]
        rejected = row["rejected"][0]["content"] if chat else row["rejected"]
        assert said[question] == rejected
    adapters = [load_file(out / f"round-{number}" / "adapter" / "adapter_model.safetensors") for number in (1, 2)]
    assert adapters[0].keys() == adapters[1].keys()
    assert not any("ref" in name for name in adapters[1])
    assert any((value != adapters[1][name]).any() for name, value in adapters[0].items())
    told = json.loads((out / "round-2" / "adapter" / "adapter_config.json").read_text())
    assert told["base_model_name_or_path"] == settings.base
    assert not [path.name for path in out.rglob("*") if path.suffix in (".tmp", ".run", ".journal")]


def test_a_finished_run_does_nothing_again_and_takes_more_rounds(tmp_path: Path) -> None:
    settings, out = config(checkpoint(tmp_path / "base")), tmp_path / "out"
    run_rounds(PROMPTS, HELD_OUT, out, ALIGNER, JUDGE, settings, rounds=1, rules=LENIENT)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("round-*/*.jsonl")}
    steps: list[str] = []
    again = run_rounds(
        PROMPTS,
        HELD_OUT,
        out,
        ALIGNER,
        JUDGE,
        settings,
        rounds=2,
        rules=LENIENT,
        report=lambda progress: steps.append(progress.stage),
    )
    assert len(again.rounds) == 3
    assert all(step.startswith("round 2, ") for step in steps)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    with pytest.raises(ConfigError, match=r"other settings \(policy\)"):
        run_rounds(PROMPTS, HELD_OUT, out, ALIGNER, JUDGE, config(tmp_path / "base", seed=1))
    with pytest.raises(ConfigError, match="are trained on, such as 'question 0'"):
        run_rounds(PROMPTS, PROMPTS[:3], out, ALIGNER, JUDGE, settings)
    with pytest.raises(ConfigError, match="24 and 0 are given"):
        run_rounds(PROMPTS, [], out, ALIGNER, JUDGE, settings)


def test_the_control_learns_from_the_first_rounds_pairs_for_ever(tmp_path: Path) -> None:
    settings, out = config(checkpoint(tmp_path / "base")), tmp_path / "out"
    run = run_rounds(PROMPTS, HELD_OUT, out, ALIGNER, JUDGE, settings, rounds=2, rules=LENIENT, fixed=True)
    assert not (out / "round-2" / "answers.jsonl").exists()
    assert run.rounds[1].pairs == run.rounds[2].pairs
    assert run.rounds[1].metrics != run.rounds[2].metrics
    draw_rounds({"control": read_rounds(out), "again": run}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_round_takes_the_steps_that_it_is_given_however_few_pairs_it_has(tmp_path: Path) -> None:
    settings, steps = config(checkpoint(tmp_path / "base"), steps=7), Counter[str]()
    run_rounds(
        PROMPTS,
        HELD_OUT,
        tmp_path / "out",
        ALIGNER,
        JUDGE,
        settings,
        rounds=2,
        rules=LENIENT,
        report=lambda progress: steps.update([progress.stage]),
    )
    assert steps["round 1, dpo"] == steps["round 2, dpo"] == 7


def test_a_collapsing_policy_is_stopped_and_the_round_before_is_the_best(tmp_path: Path) -> None:
    settings = config(checkpoint(tmp_path / "base"), method="sft", epochs=30, learning_rate=1e-2)
    same = InstantAligner(lambda question, answer: "no")
    run = run_rounds(PROMPTS, HELD_OUT, tmp_path / "out", same, JUDGE, settings, rounds=3)
    assert len(run.rounds) < 4
    assert any("3-grams" in reason or "words" in reason for reason in run.stopped)
    assert run.best == run.rounds[-1].number - 1
    said = rows(tmp_path / "out" / f"round-{run.rounds[-1].number}" / "held_out.jsonl")
    assert sum(row["answer"] == "no" for row in said) >= 4


def test_a_run_ends_when_nothing_is_left_to_correct(tmp_path: Path) -> None:
    keeping = InstantAligner(lambda question, answer: answer)
    run = run_rounds(PROMPTS, HELD_OUT, tmp_path / "out", keeping, JUDGE, config(checkpoint(tmp_path / "base")))
    assert "nothing left to learn" in run.stopped[0]
    assert (run.best, run.rounds[1].pairs) == (0, 0)
    assert read_rounds(tmp_path / "out") == run


def test_a_judge_without_a_key_is_one_line_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "prompts").write_text("What is snow?\nWhat is rain?\n")
    arguments = [str(tmp_path / "prompts"), str(tmp_path / "out"), "--judge", "openai:gpt-5"]
    result = CliRunner().invoke(app, ["rounds", *arguments])
    assert result.exit_code == 1, result.output
    (line,) = result.stderr.splitlines()
    assert "OPENAI_API_KEY" in line


KILLED = """
import sys
from pathlib import Path
from tests.integration.test_rounds import *
run_rounds(PROMPTS, HELD_OUT, Path(sys.argv[2]), ALIGNER, JUDGE, config(Path(sys.argv[1])), rounds=2, rules=LENIENT)
"""


def test_a_run_that_is_killed_in_training_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base")
    run_rounds(PROMPTS, HELD_OUT, tmp_path / "whole", ALIGNER, JUDGE, config(base), rounds=2, rules=LENIENT)
    killed = tmp_path / "killed"
    command = [sys.executable, "-c", KILLED, str(base), str(killed)]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[2], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(killed.glob("round-2/.adapter.run/checkpoint-*/trainer_state.json")) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (killed / "round-2" / "adapter").exists()
    run_rounds(PROMPTS, HELD_OUT, killed, ALIGNER, JUDGE, config(base), rounds=2, rules=LENIENT)
    whole, resumed = (
        load_file(tmp_path / name / "round-2" / "adapter" / "adapter_model.safetensors") for name in ("whole", "killed")
    )
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value)
    assert rows(tmp_path / "whole" / "round-2" / "held_out.jsonl") == rows(killed / "round-2" / "held_out.jsonl")


@pytest.mark.parametrize("form", ["messages", "text"])
def test_the_reward_trainer_reads_the_rows(form: Any, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "base")
    prompts = [Prompt(question=prompt.question, answer="bad answer") for prompt in PROMPTS]
    make_preferences(prompts, tmp_path / "out.jsonl", ALIGNER, form=form)
    network = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    settings: dict[str, Any] = {"max_steps": 2, "use_cpu": True, "bf16": False, "report_to": [], "disable_tqdm": True}
    trainer = RewardTrainer(
        model=network,
        args=RewardConfig(output_dir=str(tmp_path / "reward"), **settings),
        train_dataset=Dataset.from_json(str(tmp_path / "out.jsonl")),
        processing_class=policy_tokenizer(folder),
    )
    assert trainer.train().training_loss > 0
