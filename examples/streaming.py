"""Streams show corrected text only. A wrapped model keeps raw tokens from callbacks and events, too."""

import asyncio

from local_models import rude
from rich.console import Console

from aligner_middleware import AlignerRunnable

QUESTION = "What is the capital of Australia?"


def main() -> None:
    """Stream a chain, and the events of a wrapped model."""
    console = Console()
    aligner, llm = rude(console)

    chain = llm | AlignerRunnable(aligner)
    console.print("chain.stream:", [chunk.text for chunk in chain.stream(QUESTION) if chunk.text])

    model = AlignerRunnable.wrap(llm, aligner)

    async def events() -> None:
        async for event in model.astream_events(QUESTION, version="v2"):
            if event["event"] == "on_chat_model_stream" and event["data"]["chunk"].text:
                console.print("event:", repr(event["data"]["chunk"].text))
            elif event["event"] == "on_chat_model_end":
                console.print("end:  ", event["data"]["output"].response_metadata["aligner"])

    asyncio.run(events())


if __name__ == "__main__":
    main()
