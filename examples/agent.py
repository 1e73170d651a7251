"""An agent with a tool: its final answer is corrected, its tool calls are not, and no stream shows the raw answer."""

from collections.abc import Iterator
from typing import Any

from langchain.agents import create_agent
from langchain.agents.middleware import InputAgentState
from langchain_core.messages import HumanMessage
from langchain_core.tools import tool
from local_models import rude, show
from rich.console import Console

from aligner_middleware import AlignerMiddleware, AlignerRunnable


@tool
def opening_hours(place: str) -> str:
    """Look up when a place is open."""
    return "The library opens at nine and closes at six."


def main() -> None:
    """Ask the agent, and watch its messages as they are streamed."""
    console = Console()
    aligner, llm = rude(console)
    question = "When does the library close?"
    ask: InputAgentState = {"messages": [HumanMessage(question)]}

    without = create_agent(llm, [opening_hours]).invoke(ask)
    console.print("without an aligner:", without["messages"][-1].text, "\n")

    align = AlignerRunnable(aligner, keep_original=True)
    agent = create_agent(llm, [opening_hours], middleware=[AlignerMiddleware(align)])
    state = agent.invoke(ask)
    for message in state["messages"]:
        console.print(f"{message.type:>6}:", message.text or message.tool_calls)
    console.print()
    show(console, question, state["messages"][-1])
    stream: Iterator[Any] = agent.stream(ask, stream_mode=["messages", "custom"])
    for mode, part in stream:
        console.print(mode, repr(part[0].text) if mode == "messages" else part)


if __name__ == "__main__":
    main()
