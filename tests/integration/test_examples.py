"""Every example runs on the local models, without a key, and prints what it did."""

import io
import logging
import runpy
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import local_models
import pytest

logging.disable(logging.NOTSET)  # the examples are silent, the other tests are not

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
}


@pytest.fixture(scope="module", autouse=True)
def _models_loaded_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local_models, "_chat_model", cache(local_models._chat_model))
        yield


def test_all_examples_are_tried() -> None:
    shared = {"local_models", "openai_server"}
    assert {path.stem for path in EXAMPLES.glob("*.py")} - shared == {*CASES, "demo"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "train_your_own")) for name in CASES]
)
def test_it_runs(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    printed, arguments, typed = CASES[name]
    path = str(EXAMPLES / f"{name}.py")
    monkeypatch.setattr(sys, "argv", [path, *arguments])
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    runpy.run_path(path, run_name="__main__")
    assert printed in capsys.readouterr().out


def test_the_demo_runs_in_a_process_of_its_own() -> None:
    run = subprocess.run([sys.executable, str(EXAMPLES / "demo.py")], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert "kept byte for byte" in run.stdout
