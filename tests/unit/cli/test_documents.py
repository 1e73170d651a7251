"""The commands in README and docs are understood, and docs/cli.md is up to date."""

import shlex
from typing import Any

import pytest
import typer

from aligner_middleware.cli.app import app
from aligner_middleware.cli.reference import reference
from tests.unit.cli.running import ROOT


def commands_of_the_docs() -> list[str]:
    found = []
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for block in path.read_text(encoding="utf-8").split("```sh\n")[1:]:
            text = block.partition("```")[0].replace("\\\n", " ")
            found += [line for line in text.splitlines() if line.startswith("aligner ")]
    return found


@pytest.mark.parametrize("command", commands_of_the_docs())
def test_every_command_of_the_docs_is_one_that_is_understood(command: str) -> None:
    _, name, *arguments = shlex.split(command.partition(" > ")[0], comments=True)
    group: Any = typer.main.get_command(app)
    context = group.make_context("aligner", [name])
    group.get_command(context, name).make_context(name, arguments, parent=context)


def test_the_reference_of_commands_is_up_to_date() -> None:
    stored = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert stored == reference(), "run: python -m aligner_middleware.cli.reference > docs/cli.md"
