"""Every example runs on the local models, without a key, and prints what it did."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
# What each prints if it did its work; more arguments, and what is typed, where it takes any.
CASES: dict[str, tuple[str, list[str], str]] = {
    "chain": ("Canberra.", [], ""),
    "batch": ("4 tasks at once", [], ""),
    "streaming": ("chain.stream", [], ""),
    "agent": ("aligner_correction", [], ""),
    "graph": ("2 messages in the state", [], ""),
    "api_model": ("usage of the API", [], ""),
    "own_policy": ("'changed': 1", [], ""),
    "train_your_own": ("s in all", ["--epochs", "0.4"], ""),
    "terminal_chat": ("you: What is a river?", [], "What is snow?\nWhat is a river?\n"),
    "demo": ("kept byte for byte", [], ""),
}


def test_all_examples_are_tried() -> None:
    shared = {"local_models", "openai_server"}
    assert {path.stem for path in EXAMPLES.glob("*.py")} - shared == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_it_runs(name: str) -> None:
    printed, arguments, typed = CASES[name]
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments]
    run = subprocess.run(command, input=typed, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert printed in run.stdout
