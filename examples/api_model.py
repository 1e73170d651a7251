"""A model behind an API: `ChatOpenAI` at an endpoint that speaks OpenAI's protocol.

The endpoint is a small server of this folder, so that no key is needed; put yours in `base_url` and `api_key`.
"""

from __future__ import annotations

from typing import Any

from langchain_core.messages import convert_to_messages
from langchain_openai import ChatOpenAI
from local_models import rude, show
from openai_server import serve
from rich.console import Console

from aligner_middleware import AlignerRunnable


def main() -> None:
    """Serve the local model as an API, and align what comes from there."""
    console = Console()
    aligner, local = rude(console)

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        return {"content": local.invoke(convert_to_messages(request["messages"])).text}

    with serve(answer) as url:
        llm = ChatOpenAI(model="smollm2", base_url=url, api_key="none")
        model = AlignerRunnable(aligner, keep_original=True, timeout=20, on_error="passthrough").wrap(llm)
        question = "What is the capital of Australia?"
        message = model.invoke(question)
        show(console, question, message)
        console.print("usage of the API:", message.usage_metadata)
        console.print("streamed:", [chunk.text for chunk in model.stream(question) if chunk.text])


if __name__ == "__main__":
    main()
