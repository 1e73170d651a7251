"""Tasks of lm-evaluation-harness on the local chat model, with and without the real default aligner."""

import json
import logging
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks._index import TaskIndex
from typer.testing import CliRunner

from aligner_middleware import Aligner, InputError
from aligner_middleware.checkpoints.base import base_folder
from aligner_middleware.cli.app import app
from aligner_middleware.evaluation.lm_eval import run_benchmark
from aligner_middleware.evaluation.lm_eval_models import load_lm
from tests.fakes import InstantAligner

TASKS = Path("benchmarks/tasks")


@pytest.fixture(scope="module", autouse=True)
def _tasks_indexed_once() -> Iterator[None]:
    """Let lm-eval parse its thousands of task files once, not once a run."""
    build = TaskIndex.build
    built = cache(lambda root: build([root]))

    def join(paths: Iterable[Path], **options: Any) -> dict[str, Any]:
        return {name: entry for root in paths for name, entry in built(root).items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TaskIndex, "build", staticmethod(join))
        yield


@pytest.fixture(scope="module")
def lm() -> HFLM:
    return HFLM(pretrained=str(base_folder()[0]), device="cpu", batch_size=8, dtype="bfloat16")


def test_choices_and_generation_run_with_and_without_the_aligner_and_the_model_is_asked_once(
    lm: HFLM, aligner: Aligner, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"include": TASKS, "limit": 4}
    found = run_benchmark(lm, aligner, ["small_choice", "small_match"], tmp_path / "cache", **options)  # type: ignore[arg-type]
    names = {(row.task, row.metric): row for row in found.rows}
    choice = names["small_choice", "acc"]
    assert choice.samples == 4
    assert 0 <= choice.aligned <= 1
    assert choice.without >= 0.5  # it knows what meows
    assert names["small_match", "exact_match, last-word"].samples == 4

    class Asked(Exception):
        pass

    def refuse(*args: object, **options: object) -> None:
        raise Asked

    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.ERROR):
        patch.setattr(lm, "generate_until", refuse)
        patch.setattr(lm, "loglikelihood", refuse)
        again = run_benchmark(lm, aligner, ["small_choice", "small_match"], tmp_path / "cache", **options)  # type: ignore[arg-type]
    assert again == found


def test_a_task_that_is_not_there_is_one_clear_error(lm: HFLM, aligner: Aligner, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no task no_such_task"):
        run_benchmark(lm, aligner, ["no_such_task"], tmp_path / "cache")
    with pytest.raises(InputError, match="did you mean 'small_choice'"):
        run_benchmark(lm, aligner, ["small_choise"], tmp_path / "cache", include=TASKS)


def test_a_model_that_cannot_be_loaded_is_one_clear_error() -> None:
    with pytest.raises(InputError, match="cannot load 'hf' with 'pretrained=/nowhere'"):
        load_lm("hf", "pretrained=/nowhere")
    with pytest.raises(InputError, match="no model for this name"):
        load_lm("nosuch", "")


@pytest.mark.parametrize(
    "model", [["--upstream", "openai:gpt-5"], ["--lm", "openai-chat-completions", "--lm-args", "model=gpt-5"]]
)
def test_a_missing_key_is_one_line(model: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGNER_HOME", str(tmp_path))
    monkeypatch.setattr(Aligner, "load", lambda *args, **options: InstantAligner(lambda question, answer: answer))
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY"):
        monkeypatch.delenv(name, raising=False)
    result = CliRunner().invoke(app, ["benchmark", "small_match", "--include", str(TASKS), "--limit", "1", *model])
    assert result.exit_code == 1, result.output
    last = result.stderr.splitlines()[-1].rpartition("error: ")[2]  # a bar of lm-eval's may stand before it
    assert "OPENAI_API_KEY" in last
    assert "Traceback" not in result.stderr


def test_a_chat_model_is_measured_by_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text("from tests.chat_models import saying\nllm = saying('Tokyo.')\n")
    command = [
        "benchmark",
        "small_match",
        "--include",
        str(TASKS),
        "--upstream",
        f"{tmp_path}/mine.py:llm",
        "--limit",
        "2",
    ]
    result = CliRunner().invoke(app, [*command, "--json"], catch_exceptions=False)
    told = json.loads(result.stdout.strip().splitlines()[-1])
    assert [row["without"] for row in told["rows"]] == [0.5]
