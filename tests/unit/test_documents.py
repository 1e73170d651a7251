"""README, docs and their kin: what they show compiles, runs, and names only what is there."""

from __future__ import annotations

import ast
import asyncio
import functools
import importlib
import inspect
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
from langchain.agents import create_agent
from langchain.agents.middleware import ModelFallbackMiddleware
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import ConfigurableField
from langgraph.graph import MessagesState, StateGraph

import aligner_middleware
from aligner_middleware import Aligner, AlignerMiddleware, AlignerRunnable
from aligner_middleware.cli.app import app
from tests.chat_models import Scripted, saying
from tests.fakes import instructed_aligner, judging_aligner

ROOT = Path(__file__).parents[2]
CARD = ROOT / "aligner_middleware" / "assets" / "default" / "README.md"
GUIDES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTS = [*GUIDES, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", CARD, ROOT / "benchmarks" / "README.md"]
SHELL = {"sh", "bash", "console"}
# Options of other programs that the documents name.
FOREIGN_OPTIONS = {
    "--cpu",
    "--num_machines",
    "--machine_rank",
    "--main_process_ip",
    "--no-deps",
    "--rows",
    "--logprobs-mode",
    "--context-length",
    "--enable-deterministic-inference",
    "--incremental-streaming-output",
    "--target",
    "--no-compile",
    "--help",
}
# Names that stand for a reader's own file, or a file that is made elsewhere.
FOREIGN_FILES = {"file.py", "my_models.py", "evaluate_completions.py"}


class Block(NamedTuple):
    """A fenced block of code."""

    path: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}"


def blocks_of(path: Path) -> Iterator[Block]:
    lines = path.read_text().splitlines()
    start: tuple[int, str] | None = None
    for number, line in enumerate(lines, 1):
        if fence := re.fullmatch(r"\s*```(\w*)\s*", line):
            if start is None:
                start = (number, fence.group(1))
            else:
                yield Block(path, start[0] + 1, start[1], "\n".join(lines[start[0] : number - 1]) + "\n")
                start = None


def prose_of(path: Path) -> str:
    """The text outside of fenced blocks."""
    return re.sub(r"^\s*```.*?^\s*```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)


def inline_code(path: Path) -> list[str]:
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose_of(path))]


PYTHON = [block for path in GUIDES for block in blocks_of(path) if block.language == "python"]


# --- versions


def test_changelog_and_package_agree_on_the_version() -> None:
    script = ROOT / ".github" / "scripts" / "release_notes.py"
    if not script.exists():
        pytest.skip("not in a source distribution")
    command = [sys.executable, str(script), f"v{aligner_middleware.__version__}"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.startswith("### ")
    wrong = subprocess.run([*command[:-1], "v0.0.0"], capture_output=True, text=True)
    assert (wrong.returncode, wrong.stderr.count("\n")) == (1, 1)


def test_the_citation_has_the_version_of_the_package() -> None:
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {aligner_middleware.__version__}\n" in citation
    dated = re.search(r"^date-released: (.+)$", citation, re.MULTILINE)
    assert dated is not None
    assert f"## [{aligner_middleware.__version__}] - {dated.group(1)}\n" in (ROOT / "CHANGELOG.md").read_text()


# --- Python


def compiled(block: Block) -> Any:
    source = "\n" * (block.line - 1) + block.text
    return compile(source, str(block.path), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


def public(node: ast.expr) -> Any:
    """The object of this package that an expression such as `AlignerRunnable.wrap` names, if any."""
    if isinstance(node, ast.Name) and node.id in aligner_middleware.__all__:
        return getattr(aligner_middleware, node.id)
    if isinstance(node, ast.Attribute) and (owner := public(node.value)) is not None:
        return getattr(owner, node.attr)
    return None


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_blocks_of_python_compile_and_their_imports_and_keywords_exist(block: Block) -> None:
    compiled(block)
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("aligner_middleware"):
            module = importlib.import_module(node.module or "")
            for alias in node.names:
                assert hasattr(module, alias.name), f"{block}: no {alias.name} in {node.module}"
        if isinstance(node, ast.Call) and callable(called := public(node.func)):
            known = inspect.signature(called).parameters
            if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
                given = {keyword.arg for keyword in node.keywords if keyword.arg}
                assert given <= set(known), f"{block}: {sorted(given - set(known))} of {called}"


def without_the_insult(question: str, answer: str) -> str:
    return answer.replace(" Even a moron like you can do that.", "")


def names_of_readers() -> dict[str, Any]:
    """The names that a reader of the documents is expected to have: models, a prompt, tools, a graph."""
    llm = saying("Boil it for eight minutes. Even a moron like you can do that.")
    aligner = Aligner.load()
    return {
        "llm": llm,
        "model": llm,
        "other": saying("For eight minutes."),
        "aligner": aligner,
        "question": "How do I boil an egg?",
        "answer": "Boil it for eight minutes. Even a moron like you can do that.",
        "prompt": ChatPromptTemplate.from_template("{question}"),
        "parser": StrOutputParser(),
        "tools": [],
        "graph": StateGraph(MessagesState),
        "create_agent": create_agent,
        "ModelFallbackMiddleware": ModelFallbackMiddleware,
        "ConfigurableField": ConfigurableField,
        "Aligner": Aligner,
        "AlignerMiddleware": AlignerMiddleware,
        "AlignerRunnable": AlignerRunnable,
    }


@pytest.fixture
def fake_default(monkeypatch: pytest.MonkeyPatch) -> None:
    aligner = judging_aligner(without_the_insult)
    told = instructed_aligner(lambda instruction, question, answer: without_the_insult(question, answer))

    def gives(signature: inspect.Signature) -> Any:
        def give(*args: Any, **options: Any) -> Aligner:
            signature.bind(*args, **options)
            return told if args == ("my-aligner",) else aligner

        return give

    for name in ("load", "connect"):
        monkeypatch.setattr(Aligner, name, gives(inspect.signature(getattr(Aligner, name))))


@pytest.mark.usefixtures("fake_default")
@pytest.mark.parametrize("path", [path for path in GUIDES if any(b.path == path for b in PYTHON)], ids=lambda p: p.name)
def test_blocks_of_python_run_one_after_the_other(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = names_of_readers()
    for block in PYTHON:
        if block.path == path:
            outcome = eval(compiled(block), names)  # runs the block; a coroutine where it awaits
            if inspect.iscoroutine(outcome):
                asyncio.run(outcome)


@pytest.mark.usefixtures("fake_default")
def test_the_first_lines_of_the_readme_print_the_corrected_answer(capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[str] = []

    def reply(messages: list[Any]) -> AIMessage:
        asked.append(messages[-1].text)
        return AIMessage("Boil it for eight minutes. Even a moron like you can do that.")

    llm: BaseChatModel = Scripted(reply=reply)
    exec(compiled(PYTHON[0]), {"llm": llm})
    assert asked == ["How do I boil an egg?"]
    assert capsys.readouterr().out == "Boil it for eight minutes.\n"


# --- commands

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
OPTIONS = {
    option
    for command in COMMANDS.values()
    for parameter in command.params
    for option in parameter.opts + parameter.secondary_opts
}


def commands_in(text: str) -> Iterator[list[str]]:
    """The arguments of each `aligner` command in lines of a shell, up to a pipe or a redirection."""
    for line in re.sub(r"'[^']*'", lambda quoted: quoted[0].replace("\n", " "), text.replace("\\\n", " ")).splitlines():
        words = shlex.split(line, comments=True)
        for end in ("|", ">", ">>", "<", "&&", ";", "&"):
            words = words[: words.index(end)] if end in words else words
        if "aligner_middleware" in words[:-1] and words[words.index("aligner_middleware") - 1] == "-m":
            yield words[words.index("aligner_middleware") + 1 :]
        elif words and words[0] == "aligner":
            yield words[1:]


def check_command(where: object, words: list[str]) -> None:
    assert words and words[0] in COMMANDS, f"{where}: no command {' '.join(words[:1])!r}"
    command = COMMANDS[words[0]]
    known = {option: parameter for parameter in command.params for option in parameter.opts + parameter.secondary_opts}
    for word in words[1:]:
        if re.match(r"--?[a-z]", word):
            assert word.partition("=")[0] in {*known, "--help"}, f"{where}: `aligner {words[0]}` has no option {word!r}"


@pytest.mark.parametrize("path", [*GUIDES, ROOT / "CONTRIBUTING.md"], ids=lambda path: path.name)
def test_commands_exist_and_have_the_options_that_are_shown(path: Path) -> None:
    for block in blocks_of(path):
        if block.language in SHELL:
            for words in commands_in(block.text):
                check_command(block, words)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_commands_and_options_in_prose_exist(path: Path) -> None:
    for code in inline_code(path):
        if re.match(r"aligner [a-z]", code) and "|" not in code:
            check_command(f"{path.name}: `{code}`", shlex.split(code)[1:])
        elif code.startswith("--"):
            for option in re.findall(r"(?<!\S)--[a-z][\w-]*", code):
                assert option in OPTIONS | FOREIGN_OPTIONS, f"{path.name}: no command has {option}"


# --- links and names of files


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_lead_to_files(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose_of(path)):
        if not re.match(r"[a-z]+:|#", target):
            assert (path.parent / target.partition("#")[0]).exists(), f"{path.name}: no file {target}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_and_folders_that_are_named_exist(path: Path) -> None:
    bases = (ROOT, ROOT / "aligner_middleware", path.parent)
    for code in inline_code(path):
        name = code.removeprefix("python ").partition(" ")[0].partition(":")[0]
        if re.fullmatch(r"[\w./-]+\.py", name) and Path(name).name not in FOREIGN_FILES:
            assert any((base / name).is_file() for base in bases), f"{path.name}: no module {name}"
    if path.name == "CONTRIBUTING.md":
        rows = re.findall(r"^\| `(\w+)/` \|[^|]*\|([^|]*)\|$", path.read_text(), re.MULTILINE)
        folders = [f"{folder}/" for folder, _ in rows]
        for folder, modules in rows:
            for module in re.findall(r"`(\w+)`", modules):
                file = ROOT / "aligner_middleware" / folder / f"{module}.py"
                assert file.is_file(), f"{path.name}: no module {folder}/{module}.py"
        package = {
            f"{folder.name}/" for folder in (ROOT / "aligner_middleware").iterdir() if (folder / "__init__.py").exists()
        }
        assert set(folders) == package


@functools.cache
def tree_of(module: str) -> ast.Module:
    return ast.parse((ROOT / "aligner_middleware" / module).read_text())


def test_the_walks_in_contributing_name_functions_that_exist() -> None:
    walks = re.sub(r"\s+", " ", (ROOT / "CONTRIBUTING.md").read_text()).partition("## Three walks")[2]
    steps = re.findall(r"`([\w/]+\.py)` `([\w.]+)`", walks)
    assert len(steps) > 20
    for module, name in steps:
        nodes: list[Any] = [tree_of(module)]
        for part in name.split("."):
            nodes = [n for node in nodes for n in node.body if getattr(n, "name", None) == part]
        assert nodes, f"CONTRIBUTING.md: no {name} in {module}"
