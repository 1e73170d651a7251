"""LangGraph: the aligner as a node, which replaces the last message under its id, or inside of one."""

from collections.abc import Iterator
from typing import Any

from langchain_core.messages import HumanMessage
from langgraph.graph import START, MessagesState, StateGraph
from local_models import rude, show
from rich.console import Console

from aligner_middleware import AlignerRunnable


def main() -> None:
    """Answer by a graph of two nodes, and by one with a wrapped model in its only node."""
    console = Console()
    aligner, llm = rude(console)
    align = AlignerRunnable(aligner, keep_original=True)
    question = "What is the capital of Australia?"
    ask: MessagesState = {"messages": [HumanMessage(question)]}

    builder = StateGraph(MessagesState)
    builder.add_node("answer", lambda state: {"messages": [llm.invoke(state["messages"])]})
    builder.add_node("align", align)
    builder.add_edge(START, "answer")
    builder.add_edge("answer", "align")
    state = builder.compile().invoke(ask)
    console.print(len(state["messages"]), "messages in the state")
    show(console, question, state["messages"][-1])

    model = align.wrap(llm)  # where tokens are streamed to people: nothing raw leaves the node
    builder = StateGraph(MessagesState)
    builder.add_node("answer", lambda state: {"messages": [model.invoke(state["messages"])]})
    builder.add_edge(START, "answer")
    stream: Iterator[Any] = builder.compile().stream(ask, stream_mode="messages")
    for chunk, metadata in stream:
        console.print(metadata["langgraph_node"], repr(chunk.text))


if __name__ == "__main__":
    main()
