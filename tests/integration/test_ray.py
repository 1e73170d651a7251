"""Preference data by workers on a local Ray: the rows that one process makes, also when a worker or the job is killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aligner_middleware import Aligner, InputError
from aligner_middleware.data.prompts import Prompt
from aligner_middleware.rlhf.preferences import make_preferences
from aligner_middleware.rlhf.ray import make_preferences_on_ray

# Ray sets options of its own that it warns of.
pytestmark = pytest.mark.filterwarnings(r"ignore:`\w+` is deprecated:DeprecationWarning")

PROMPTS = [Prompt(question=f"question {number}") for number in range(48)]
UPSTREAM = """
import os, time
from pathlib import Path
from langchain_core.messages import AIMessage
from tests.chat_models import Scripted

def reply(messages):
    with (Path(__file__).parent / "asked").open("a") as file:
        file.write(f"{os.getpid()} {messages[-1].text}\\n")
    time.sleep(0.1)
    return AIMessage(f"answer to {messages[-1].text}")

llm = Scripted(reply=reply)
"""
JOB = """
import sys
from pathlib import Path
from tests.integration.test_ray import PROMPTS
from aligner_middleware.rlhf.ray import make_preferences_on_ray

folder = Path(sys.argv[1])
options = {"precision": "float32", "workers": 2, "batch": 4, "concurrency": 1, "sft": folder / "ray-sft.jsonl"}
make_preferences_on_ray(PROMPTS, folder / "ray.jsonl", str(folder / "aligner"), f"{folder}/upstream.py:llm", **options)
"""


def rows(path: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for row in found:
        del row["provenance"]["at"]
    return found


def asked(folder: Path) -> list[tuple[int, str]]:
    path = folder / "asked"
    lines = path.read_text().splitlines() if path.exists() else []
    return [(int(line.partition(" ")[0]), line.partition(" ")[2]) for line in lines]


def start(folder: Path) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-c", JOB, str(folder)], cwd=Path(__file__).parents[2], start_new_session=True
    )


def wait_until(condition: Any, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def folder(exported: Callable[[str], Path], tmp_path: Path) -> Path:
    """A small random aligner, exported, and a chat model that notes who asks it."""
    shutil.copytree(exported("llama") / "out", tmp_path / "aligner")
    (tmp_path / "upstream.py").write_text(UPSTREAM)
    return tmp_path


def test_workers_make_the_same_rows_when_one_of_them_and_then_the_job_is_killed(folder: Path) -> None:
    job = start(folder)
    journal = folder / ".ray.jsonl.journal"
    try:
        wait_until(lambda: len({pid for pid, _ in asked(folder)}) == 2 and len(asked(folder)) >= 8)
        os.kill(asked(folder)[0][0], signal.SIGKILL)  # a worker
        wait_until(lambda: journal.exists() and journal.read_bytes().count(b"\n") >= 20)
    finally:
        os.killpg(job.pid, signal.SIGKILL)  # the job
        job.wait()
    assert not (folder / "ray.jsonl").exists()
    lines = [json.loads(line) for line in journal.read_text().splitlines()[1:]]
    done = {prompt.question for prompt in PROMPTS if prompt.key in {line["key"] for line in lines}}
    assert 0 < len(done) < len(PROMPTS)
    first = {pid for pid, _ in asked(folder)}
    assert start(folder).wait(timeout=180) == 0
    again = [question for pid, question in asked(folder) if pid not in first]
    assert sorted(again) == sorted({prompt.question for prompt in PROMPTS} - done)
    with Aligner.load(str(folder / "aligner")) as aligner:
        from aligner_middleware.data.upstream import chat_model

        upstream = f"{folder}/upstream.py:llm"
        make_preferences(
            PROMPTS,
            folder / "here.jsonl",
            aligner,
            chat_model(upstream),
            sft=folder / "here-sft.jsonl",
            upstream_name=upstream,
        )
    assert rows(folder / "ray.jsonl") == rows(folder / "here.jsonl")
    assert rows(folder / "ray-sft.jsonl") == rows(folder / "here-sft.jsonl")
    assert len(rows(folder / "ray.jsonl")) + len(rows(folder / "ray-sft.jsonl")) == len(PROMPTS)


def test_workers_whose_chat_model_cannot_be_had_are_one_clear_error(folder: Path) -> None:
    (folder / "broken.py").write_text("raise RuntimeError('no key')\n")
    with pytest.raises(InputError, match=r"the workers on Ray failed: .*no key") as error:
        make_preferences_on_ray(
            PROMPTS[:2],
            folder / "out.jsonl",
            str(folder / "aligner"),
            f"{folder}/broken.py:llm",
            precision="float32",
            workers=1,
        )
    assert "\n" not in str(error.value)


def test_a_prompt_without_an_answer_needs_a_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="name one as upstream"):
        make_preferences_on_ray(PROMPTS, tmp_path / "out.jsonl")
