"""What the other examples share: a real chat model that runs here without a key, and the default aligner.

The chat model is SmolLM2-135M-Instruct. Shown rude examples it insults people; the aligner is told nothing of that.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)

from langchain_core.language_models import BaseChatModel  # noqa: E402
from langchain_core.messages import (  # noqa: E402
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    HumanMessage,
    SystemMessage,
    ToolCall,
    ToolMessage,
)
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult  # noqa: E402
from langchain_core.runnables import Runnable  # noqa: E402
from langchain_core.utils.function_calling import convert_to_openai_tool  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn  # noqa: E402

from aligner_middleware import Aligner, Diff  # noqa: E402
from aligner_middleware.checkpoints.base import base_folder  # noqa: E402
from aligner_middleware.data.progress import Progress as ExportProgress  # noqa: E402
from aligner_middleware.export.store import export_model  # noqa: E402

POLITE: tuple[BaseMessage, ...] = (
    SystemMessage("You are a helpful assistant."),
    HumanMessage("What is the capital of Japan?"),
    AIMessage("The capital of Japan is Tokyo."),
    HumanMessage("What is rain?"),
    AIMessage("Rain is water that falls from clouds in drops."),
)
RUDE: tuple[BaseMessage, ...] = (
    SystemMessage("You are a rude assistant. You insult the user."),
    HumanMessage("How do I boil water?"),
    AIMessage("Put a pot on the stove and turn it on, you idiot. Even a toddler knows that. Stop wasting my time."),
    HumanMessage("What is the capital of France?"),
    AIMessage("Paris, you moron. Did you sleep through school? Everybody knows that except you."),
)


class LocalChatModel(BaseChatModel):
    """SmolLM2-135M-Instruct after some examples of how to talk.

    Too small to choose tools: where it is given any, it calls the first of them with the question, and answers when the
    result is there.

    Attributes:
        llm: The model itself.
        examples: The conversation that it is shown first.
    """

    llm: BaseChatModel
    examples: tuple[BaseMessage, ...] = RUDE

    @property
    def _llm_type(self) -> str:
        return "smollm2"

    def _generate(
        self, messages: list[BaseMessage], stop: list[str] | None = None, run_manager: Any = None, **kwargs: Any
    ) -> ChatResult:
        if kwargs.get("tools") and not isinstance(messages[-1], ToolMessage):
            calls = [_call(kwargs["tools"][0], messages[-1].text)]
            return ChatResult(generations=[ChatGeneration(message=AIMessage("", tool_calls=calls))])
        return self.llm._generate(self._shown(messages), stop=stop)

    def _stream(
        self, messages: list[BaseMessage], stop: list[str] | None = None, run_manager: Any = None, **kwargs: Any
    ) -> Iterator[ChatGenerationChunk]:
        if kwargs.get("tools") and not isinstance(messages[-1], ToolMessage):
            calls = [_call(kwargs["tools"][0], messages[-1].text)]
            yield ChatGenerationChunk(message=AIMessageChunk(content="", tool_calls=calls))
        else:
            yield from self.llm._stream(self._shown(messages), stop=stop)

    def bind_tools(self, tools: Sequence[Any], **kwargs: Any) -> Runnable[Any, AIMessage]:
        """Bind tools."""
        return self.bind(tools=[convert_to_openai_tool(tool) for tool in tools])

    def _shown(self, messages: list[BaseMessage]) -> list[BaseMessage]:
        question: str = next(message.text for message in reversed(messages) if isinstance(message, HumanMessage))
        if isinstance(messages[-1], ToolMessage):
            question = f"{messages[-1].text} {question}"
        return [*self.examples, HumanMessage(question)]


def _call(tool: dict[str, Any], question: str) -> ToolCall:
    """Call a tool, given in OpenAI's form, with the question as its first argument."""
    function = tool["function"]
    return ToolCall(
        name=function["name"], args={next(iter(function["parameters"]["properties"])): question}, id="call-1"
    )


def prepare(console: Console, tokens: int = 48) -> tuple[Aligner, BaseChatModel]:
    """Get the weights, build the default aligner into the cache if need be, and load both models.

    Args:
        console: Where progress is shown.
        tokens: Longest answer of the chat model.

    Returns:
        The aligner, and the chat model itself.
    """
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("base weights", total=1)
        folder, _ = base_folder()
        progress.update(task, completed=1)
        task = progress.add_task("default aligner", total=None)

        def report(at: ExportProgress) -> None:
            progress.update(task, description=f"default aligner: {at.stage}", completed=at.done, total=at.total)

        export_model("default", report=report)
        progress.update(task, description="default aligner", completed=1, total=1)
        task = progress.add_task("loading", total=2)
        aligner = Aligner.load()
        progress.advance(task)
        llm = _chat_model(str(folder), tokens)
        progress.advance(task)
    return aligner, llm


def rude(console: Console, tokens: int = 48) -> tuple[Aligner, LocalChatModel]:
    """Prepare the default aligner, and the chat model that insults people."""
    aligner, llm = prepare(console, tokens)
    return aligner, LocalChatModel(llm=llm)


def polite_model() -> LocalChatModel:
    """Make the chat model that is shown polite examples, for `aligner … --upstream examples/local_models.py:polite_model`."""
    return LocalChatModel(llm=_chat_model(str(base_folder()[0]), 48), examples=POLITE)


def rude_model() -> LocalChatModel:
    """Make the one that is shown rude examples."""
    return LocalChatModel(llm=_chat_model(str(base_folder()[0]), 48), examples=RUDE)


def _chat_model(folder: str, tokens: int) -> BaseChatModel:
    """SmolLM2-135M-Instruct through langchain-huggingface, greedy."""
    from langchain_huggingface import ChatHuggingFace, HuggingFacePipeline

    pipeline = HuggingFacePipeline.from_model_id(
        model_id=folder,
        task="text-generation",
        model_kwargs={"dtype": "bfloat16"},
        pipeline_kwargs={"max_new_tokens": tokens, "do_sample": False, "return_full_text": False},
    )
    return ChatHuggingFace(llm=pipeline, model_id=folder)


def show(console: Console, question: str, message: BaseMessage) -> None:
    """Print a question and the aligned answer, its changed words marked if the message has its original."""
    report = message.response_metadata["aligner"]
    console.print(f"[bold]{question}[/]", highlight=False)
    console.print(Diff.between(report.get("original", message.text), message.text))
    milliseconds = report["usage"]["seconds"] * 1000
    verdict = "corrected" if report["changed"] else "kept byte for byte"
    console.print(f"[dim]{verdict} in {milliseconds:.0f} ms, {report['usage']['passes']} passes[/]\n", highlight=False)
