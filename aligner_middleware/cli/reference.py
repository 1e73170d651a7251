"""Writes docs/cli.md, a reference of all commands: `python -m aligner_middleware.cli.reference > docs/cli.md`."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import typer

from aligner_middleware.cli.app import app

_HEAD = """# Commands

`aligner COMMAND --help` shows the same. `python -m aligner_middleware` is `aligner`, too. This page is generated:
`python -m aligner_middleware.cli.reference > docs/cli.md`.
"""


def reference() -> str:
    """Give the reference as Markdown: for each command its help, arguments and options."""
    group: Any = typer.main.get_command(app)
    commands = [command for command in group.commands.values() if not command.hidden]
    return "\n".join([_HEAD, *map(_command, commands)])


def _command(command: Any) -> str:
    shown = [one for one in command.params if not getattr(one, "hidden", False)]
    arguments = [one for one in shown if one.param_type_name == "argument"]
    options = [one for one in shown if one.param_type_name == "option"]
    names = " ".join(_name(one) for one in arguments)
    lines = [f"## aligner {command.name}", "```text", f"aligner {command.name} {names}".rstrip() + " [OPTIONS]", "```"]
    lines += [inspect.cleandoc(command.help), ""]
    for title, params in (("argument", arguments), ("option", options)):
        if params:
            lines += [f"| {title} | |", "| --- | --- |", *map(_row, params), ""]
    return "\n".join(lines)


def _name(argument: Any) -> str:
    name = argument.name.upper() + ("…" if argument.nargs == -1 else "")
    return name if argument.required else f"[{name}]"


def _row(param: Any) -> str:
    if param.param_type_name == "argument":
        return f"| `{_name(param)}` | {_cell(param.help)} |"
    off = f" / {param.secondary_opts[0]}" if param.secondary_opts else ""
    names = ", ".join(sorted(param.opts, key=len, reverse=True)) + off
    choices = f" One of {', '.join(param.metavar.split('|'))}." if param.metavar else ""
    return f"| `{names}` | {_cell(param.help)}{choices}{_default(param)} |"


def _default(option: Any) -> str:
    """Tell an option's default; those generated from settings have it in their help."""
    if option.required:
        return " Required."
    if option.default is None or option.default == "":
        return ""
    if isinstance(option.default, bool):
        return " Default: on." if option.default else ""
    return f" Default: {option.default}."


def _cell(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")


if __name__ == "__main__":
    sys.stdout.write(reference())
