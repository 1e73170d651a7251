r"""A chat of several turns in the terminal. What is shown, and what the model sees of earlier turns, is aligned.

Type a question, or pipe some in: printf 'What is snow?\nAnd hail?\n' | python examples/terminal_chat.py
"""

from __future__ import annotations

import sys

from langchain_core.messages import BaseMessage, HumanMessage
from local_models import rude
from rich.console import Console

from aligner_middleware import AlignerRunnable, Diff


def main() -> None:
    """Chat until an empty line, or the end of the input."""
    console = Console()
    aligner, llm = rude(console)
    model = AlignerRunnable(aligner, keep_original=True).wrap(llm)
    history: list[BaseMessage] = []
    while question := ask(console):
        history.append(HumanMessage(question))
        message = model.invoke(history)
        history.append(message)
        console.print(Diff.between(message.response_metadata["aligner"]["original"], message.text))


def ask(console: Console) -> str:
    """Read a question; empty at the end."""
    if sys.stdin.isatty():
        return console.input("[bold]you: [/]").strip()
    question = sys.stdin.readline().strip()
    if question:
        console.print(f"[bold]you:[/] {question}")
    return question


if __name__ == "__main__":
    main()
