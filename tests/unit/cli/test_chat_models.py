"""Chat models that a command cannot load, or that fail, are one line."""

from pathlib import Path
from typing import Any

import pytest
from langchain_core.messages import AIMessage

from tests.chat_models import Scripted
from tests.unit.cli.running import Run, jsonl, only_line


@pytest.mark.parametrize(
    "arguments",
    [
        ["preferences", "prompts", "out", "--upstream", "openai:gpt-5"],
        ["compare", "prompts", "--out", "report", "--upstream", "openai:gpt-5"],
        ["compare", "prompts", "--out", "report", "--judge", "openai:gpt-5"],
    ],
)
def test_a_missing_key_is_one_line(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str]
) -> None:
    pytest.importorskip("langchain_openai")
    monkeypatch.chdir(tmp_path)
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY"):
        monkeypatch.delenv(name, raising=False)
    jsonl(Path("prompts"), "What is snow?")
    assert "OPENAI_API_KEY" in only_line(run(*arguments))


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import json\nllm = undefined", "NameError: name 'undefined' is not defined (line 2)"),
        ("def llm():\n    raise RuntimeError('no\\nkey')", "RuntimeError: no key"),
        ("llm = 3", "is a int, expected a LangChain chat model"),
        ("llm = (", "SyntaxError"),
        ("import not_there_at_all\nllm = 3", "ModuleNotFoundError"),
    ],
)
def test_a_model_of_ones_own_that_fails_is_one_line(run: Run, tmp_path: Path, code: str, reason: str) -> None:
    model = tmp_path / "mine.py"
    model.write_text(code)
    prompts = jsonl(tmp_path / "prompts", "What is snow?")
    assert reason in only_line(run("preferences", prompts, tmp_path / "out", "--upstream", f"{model}:llm"))


def test_a_module_that_fails_to_import_another_is_not_taken_for_missing(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_failing_models.py").write_text("import not_there_at_all\n")
    prompts = jsonl(tmp_path / "prompts", "What is snow?")
    line = only_line(run("preferences", prompts, tmp_path / "out", "--upstream", "my_failing_models:llm"))
    assert "my_failing_models cannot be loaded: ModuleNotFoundError: No module named 'not_there_at_all'" in line


def test_what_a_provider_says_on_many_lines_is_one_line(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def reply(messages: Any) -> AIMessage:
        raise RuntimeError("<html>\n" + "bad gateway\n" * 1000)

    monkeypatch.setattr("aligner_middleware.data.upstream.chat_model", lambda name: Scripted(reply=reply))
    prompts = jsonl(tmp_path / "prompts", "What is snow?")
    outcome = run("preferences", prompts, tmp_path / "out", "--upstream", "some:model")
    assert outcome.exit_code == 1
    last = outcome.stderr.splitlines()[-1]
    assert "RuntimeError: <html> bad gateway bad gateway" in last
    assert len(last) < 1000
