"""Preference data, and the journal that a killed job goes on from."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from langchain_core.messages import AIMessage

from aligner_middleware import ConfigError, DataError, InputError, JobError
from aligner_middleware.data.journal import Journal
from aligner_middleware.data.prompts import Prompt, read_prompts
from aligner_middleware.data.upstream import chat_model
from aligner_middleware.rlhf.preferences import make_preferences
from tests.chat_models import Scripted, answering
from tests.fakes import InstantAligner

ALIGNER = InstantAligner(lambda question, answer: answer.replace("bad", "good") if "keep" not in question else answer)
PROMPTS = [Prompt(question=f"q{number}") for number in range(20)]


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_models_answer_is_rejected_and_its_correction_chosen(tmp_path: Path) -> None:
    made = make_preferences(PROMPTS, tmp_path / "out.jsonl", ALIGNER, answering())
    assert (made.pairs, made.kept, made.failed) == (20, 0, {})
    first = rows(tmp_path / "out.jsonl")[0]
    assert first["prompt"] == [{"role": "user", "content": "q0"}]
    assert first["chosen"] == [{"role": "assistant", "content": "good(q0)"}]
    assert first["rejected"] == [{"role": "assistant", "content": "bad(q0)"}]
    provenance = first["provenance"]
    assert (provenance["upstream"], provenance["aligner"]["name"]) == ("scripted", "instant")
    assert len(provenance["sha256"]) == 64
    assert provenance["at"].startswith("20")
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".jsonl"] == ["out.jsonl"]
    assert not (tmp_path / ".out.jsonl.journal").exists()


def test_given_answers_text_rows_and_what_was_kept(tmp_path: Path) -> None:
    prompts = [
        Prompt(question="q", answer="bad"),
        Prompt(question="keep", answer="fine"),
        Prompt(question="q", answer="bad "),
    ]
    made = make_preferences(prompts, tmp_path / "out.jsonl", ALIGNER, form="text", sft=tmp_path / "sft.jsonl")
    assert (made.pairs, made.kept, made.repeated) == (2, 1, 0)
    first, _ = rows(tmp_path / "out.jsonl")
    assert (first["prompt"], first["chosen"], first["rejected"]) == ("q", "good", "bad")
    (kept,) = rows(tmp_path / "sft.jsonl")
    assert (kept["prompt"], kept["completion"]) == ("keep", "fine")


def test_prompts_that_fail_are_named_and_asked_again_and_nothing_is_lost(tmp_path: Path) -> None:
    asked: list[str] = []
    broken = {"q3"}

    def reply(messages: Any) -> AIMessage:
        asked.append(messages[-1].text)
        if messages[-1].text in broken:
            raise ConnectionError("down")
        return AIMessage(f"bad({messages[-1].text})")

    out, model = tmp_path / "out.jsonl", Scripted(reply=reply)
    made = make_preferences(PROMPTS, out, ALIGNER, model, attempts=2)
    assert made.pairs == 19
    assert ["q3" in reason and "ConnectionError" in reason for reason in made.failed.values()] == [True]
    assert asked.count("q3") == 2
    broken.clear()
    asked.clear()
    assert make_preferences(PROMPTS, out, ALIGNER, model).pairs == 20
    assert asked == ["q3"]
    assert [row["prompt"][0]["content"] for row in rows(out)] == [prompt.question for prompt in PROMPTS]


def test_without_a_model_to_ask_a_prompt_fails_clearly(tmp_path: Path) -> None:
    made = make_preferences([Prompt(question="q")], tmp_path / "out.jsonl", ALIGNER)
    assert "--upstream" in next(iter(made.failed.values()))


KILLED = """
import sys, time
from pathlib import Path
from langchain_core.messages import AIMessage
from aligner_middleware.rlhf.preferences import make_preferences
from tests.chat_models import Scripted
from tests.unit.rlhf.test_preferences import ALIGNER, PROMPTS

def reply(messages):
    time.sleep(0.05)
    return AIMessage(f"bad({messages[-1].text})")

make_preferences(PROMPTS, Path(sys.argv[1]), ALIGNER, Scripted(reply=reply), concurrency=1)
"""


def test_a_job_that_is_killed_goes_on_with_nothing_lost_or_doubled(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    journal = tmp_path / ".out.jsonl.journal"
    command = [sys.executable, "-c", KILLED, str(out)]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[3])
    deadline = time.monotonic() + 60
    while (not journal.exists() or journal.read_bytes().count(b"\n") < 6) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not out.exists()
    done = journal.read_bytes().count(b"\n") - 1
    assert 0 < done < len(PROMPTS)
    with journal.open("ab") as file:
        file.write(b'{"key": "torn')  # what a kill in the middle of a write leaves
    asked: list[str] = []

    def reply(messages: Any) -> AIMessage:
        asked.append(messages[-1].text)
        return AIMessage(f"bad({messages[-1].text})")

    assert make_preferences(PROMPTS, out, ALIGNER, Scripted(reply=reply), concurrency=1).pairs == len(PROMPTS)
    assert len(asked) == len(PROMPTS) - done
    assert [row["prompt"][0]["content"] for row in rows(out)] == [prompt.question for prompt in PROMPTS]


def test_another_jobs_journal_is_not_taken_up_and_one_job_runs_once(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    with Journal(path, {"model": "a"}) as journal:
        journal.add("1", "done")
        with pytest.raises(JobError, match="another process"), Journal(path, {"model": "a"}):
            pass
    with Journal(path, {"model": "a"}) as journal:
        assert journal.done == {"1": "done"}
    with pytest.raises(ConfigError, match=r"other settings \(model\)"), Journal(path, {"model": "b"}):
        pass


def test_a_full_disk_keeps_what_was_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "journal"
    with Journal(path, {}) as journal:
        journal.add("1", "one")

        def full(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(JobError, match="No space left"):
                journal.add("2", "two")
        journal.add("3", "three")
    with Journal(path, {}) as journal:
        assert journal.done == {"1": "one", "3": "three"}


def test_prompts_are_read_from_the_forms_that_people_have(tmp_path: Path) -> None:
    path = tmp_path / "prompts"
    path.write_text(
        "What is snow?\n\n"
        '"And {hail}?"\n'
        '{"question": "a", "answer": "b", "category": "c", "correction": "d"}\n'
        '{"prompt": "p", "response": "r"}\n'
        '{"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]}\n'
        "What is snow?\n"
    )
    assert [(p.question, p.answer, p.category) for p in read_prompts(path)] == [
        ("What is snow?", None, ""),
        ("And {hail}?", None, ""),
        ("a", "b", "c"),
        ("p", "r", ""),
        ("u", None, ""),
    ]
    path.write_text("fine\n{broken\n")
    with pytest.raises(DataError, match="prompts:2"):
        read_prompts(path)
    path.write_text("\n")
    with pytest.raises(JobError, match="empty"):
        read_prompts(path)


def test_a_chat_model_is_found_by_file_and_module(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("from tests.chat_models import answering\nllm = answering()\ntext = 'x'\n")
    assert chat_model(f"{file}:llm").invoke("q").text == "bad(q)"
    assert chat_model("tests.chat_models:answering").invoke("q").text == "bad(q)"
    for name, reason in (
        (f"{file}:nothing", "no 'nothing'"),
        ("nowhere.py:llm", "not a file"),
        ("no-such-provider:x", "cannot be loaded"),
    ):
        with pytest.raises(InputError, match=reason):
            chat_model(name)
