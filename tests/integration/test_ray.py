"""Jobs by workers on a local Ray: the rows that one process makes, also when a worker or the job is killed."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from aligner_middleware import Aligner, InputError
from aligner_middleware.bulk.correct import Options, correct_all, correcting, in_this_process
from aligner_middleware.bulk.ray import RayWorkers, Work
from aligner_middleware.cli.app import app
from aligner_middleware.data.prompts import Prompt
from aligner_middleware.rlhf.preferences import make_preferences
from aligner_middleware.rlhf.ray import make_preferences_on_ray

# Ray sets options of its own that it warns of.
pytestmark = pytest.mark.filterwarnings(r"ignore:`\w+` is deprecated:DeprecationWarning")

PROMPTS = [Prompt(question=f"question {number}") for number in range(48)]
PAIRS = [(f"question {number}", f"answer {number}") for number in range(48)]
KEEPING = Options(on_doubt="keep")
CORRECTING = """
import sys
from pathlib import Path
from tests.integration.test_ray import KEEPING, PAIRS, noting
from aligner_middleware.bulk.correct import correct_all
from aligner_middleware.bulk.ray import RayWorkers
from functools import partial

folder = Path(sys.argv[1])
correct_all(PAIRS, folder / "corrected.jsonl", RayWorkers(partial(noting, folder), 2, 4).run, {}, KEEPING)
"""
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
from functools import partial
from pathlib import Path
from tests.integration.test_ray import PROMPTS
from aligner_middleware import Aligner
from aligner_middleware.rlhf.ray import make_preferences_on_ray

folder = Path(sys.argv[1])
load = partial(Aligner.load, str(folder / "aligner"), precision="float32")
options = {"workers": 2, "batch": 4, "concurrency": 1, "sft": folder / "ray-sft.jsonl"}
make_preferences_on_ray(PROMPTS, folder / "ray.jsonl", load, f"{folder}/upstream.py:llm", **options)
"""


def rows(path: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for row in found:
        del row["provenance"]["at"]
    return found


def corrections(path: Path) -> list[tuple[str, str, str]]:
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [(row["question"], row["original"], row["corrected"]) for row in found]


def asked(folder: Path) -> list[tuple[int, str]]:
    path = folder / "asked"
    lines = path.read_text().splitlines() if path.exists() else []
    return [(int(line.partition(" ")[0]), line.partition(" ")[2]) for line in lines]


def start(*arguments: object) -> "subprocess.Popen[bytes]":
    command = [sys.executable, *map(str, arguments)]
    # On a busy machine, workers as polite as Ray's get no time at all; and where memory is short, Ray ends them.
    env = os.environ | {"RAY_worker_niceness": "0", "RAY_memory_monitor_refresh_ms": "0"}
    return subprocess.Popen(command, cwd=Path(__file__).parents[2], env=env, start_new_session=True)


def lines_of(journal: Path) -> int:
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


def recipe(folder: Path) -> Callable[[], Aligner]:
    return partial(Aligner.load, str(folder / "aligner"), max_new_tokens=8)


def noting(folder: Path) -> Work:
    """A worker that notes what it corrects, after it did, and takes its time."""
    work = correcting(recipe(folder), KEEPING)

    def slowly(pairs: Any) -> Any:
        results = work(pairs)
        with (folder / "asked").open("a") as file:
            file.write("".join(f"{os.getpid()} {question}\n" for question, _ in pairs))
        time.sleep(0.3)
        return results

    return slowly


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
    job = start("-c", JOB, folder)
    journal = folder / ".ray.jsonl.journal"
    try:
        wait_until(lambda: len({pid for pid, _ in asked(folder)}) == 2 and len(asked(folder)) >= 8)
        os.kill(asked(folder)[0][0], signal.SIGKILL)  # a worker
        wait_until(lambda: lines_of(journal) >= 20)
    finally:
        os.killpg(job.pid, signal.SIGKILL)  # the job
        job.wait()
    assert not (folder / "ray.jsonl").exists()
    lines = [json.loads(line) for line in journal.read_text().splitlines()[1:]]
    done = {prompt.question for prompt in PROMPTS if prompt.key in {line["key"] for line in lines}}
    assert 0 < len(done) < len(PROMPTS)
    first = {pid for pid, _ in asked(folder)}
    assert start("-c", JOB, folder).wait(timeout=180) == 0
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
            partial(Aligner.load, str(folder / "aligner")),
            f"{folder}/broken.py:llm",
            workers=1,
        )
    assert "\n" not in str(error.value)


def test_a_prompt_without_an_answer_needs_a_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="name one as upstream"):
        make_preferences_on_ray(PROMPTS, tmp_path / "out.jsonl")


def test_the_workers_correct_each_answer_once_when_the_job_and_then_a_worker_is_killed(folder: Path) -> None:
    journal = folder / ".corrected.jsonl.journal"
    job = start("-c", CORRECTING, folder)
    try:
        wait_until(lambda: lines_of(journal) > len(PAIRS) / 4)
    finally:
        os.killpg(job.pid, signal.SIGKILL)
        job.wait()
    assert not (folder / "corrected.jsonl").exists()
    done = lines_of(journal) - 1
    assert done < len(PAIRS)
    first = {pid for pid, _ in asked(folder)}
    job = start("-c", CORRECTING, folder)
    try:
        wait_until(lambda: {pid for pid, _ in asked(folder)} - first)
        killed = next(pid for pid, _ in asked(folder) if pid not in first)
        os.kill(killed, signal.SIGKILL)
        assert job.wait(timeout=300) == 0
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
            job.wait()
    again = [question for pid, question in asked(folder) if pid not in first | {killed}]
    assert len(set(again)) == len(again) <= len(PAIRS) - done
    with recipe(folder)() as aligner:
        correct_all(PAIRS, folder / "here.jsonl", in_this_process(aligner, KEEPING), aligner.identity, KEEPING)
    found = corrections(folder / "corrected.jsonl")
    assert found == corrections(folder / "here.jsonl")
    assert [(question, answer) for question, answer, _ in found] == PAIRS
    assert any(answer != corrected for _, answer, corrected in found)


def test_the_command_gives_workers_all_that_they_need(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows_file, used = folder / "rows.jsonl", list[RayWorkers]()
    rows_file.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in PAIRS[:3]))

    def run(self: RayWorkers, items: dict[str, Any]) -> Any:
        used.append(self)
        work = pickle.loads(pickle.dumps(self.prepare))()
        yield dict(zip(items, work(json.loads(json.dumps(list(items.values())))), strict=True))

    monkeypatch.setattr(RayWorkers, "run", run)
    command = ["correct", str(rows_file), "--model", str(folder / "aligner"), "--out"]
    on_ray = ["--ray-workers", "3", "--ray-address", "auto"]
    for more in ([str(folder / "ray.jsonl"), *on_ray], [str(folder / "here.jsonl")]):
        outcome = CliRunner().invoke(app, [*command, *more])
        assert outcome.exit_code == 0, outcome.output
    assert [(workers.count, workers.address) for workers in used] == [(3, "auto")]
    assert corrections(folder / "ray.jsonl") == corrections(folder / "here.jsonl")
