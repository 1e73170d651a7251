"""Chat models for tests: upstream models that say what they are told to, in words, with usage and tool calls."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from langchain_core.callbacks import CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.messages.ai import UsageMetadata
from langchain_core.messages.tool import tool_call_chunk
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable

USAGE = UsageMetadata(input_tokens=5, output_tokens=3, total_tokens=8)


class Scripted(BaseChatModel):
    """Says `reply(messages)`, whole or word by word, `n` times."""

    reply: Callable[[list[BaseMessage]], AIMessage]
    model_name: str = "scripted"
    n: int = 1
    usage: UsageMetadata = USAGE

    @property
    def _llm_type(self) -> str:
        return "scripted"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return {"model_name": self.model_name}

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        said = [self.reply(messages) for _ in range(self.n)]
        metadata = {
            "model_name": self.model_name,
            "stop": stop,
            **{key: kwargs[key] for key in kwargs if key == "seed"},
        }
        found = [one.model_copy(update={"usage_metadata": self.usage, "response_metadata": metadata}) for one in said]
        return ChatResult(generations=[ChatGeneration(message=one) for one in found], llm_output={"calls": 1})

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        said = self.reply(messages)
        for part in re.findall(r"\S+\s*", said.content) if isinstance(said.content, str) else said.content:
            chunk = ChatGenerationChunk(message=AIMessageChunk(content=[part] if isinstance(part, dict) else part))
            if run_manager:
                run_manager.on_llm_new_token(chunk.text, chunk=chunk)
            yield chunk
        for at, call in enumerate(said.tool_calls):
            parts = tool_call_chunk(
                name=call["name"], args=str(call["args"]).replace("'", '"'), id=call["id"], index=at
            )
            yield ChatGenerationChunk(message=AIMessageChunk(content="", tool_call_chunks=[parts]))
        yield ChatGenerationChunk(
            message=AIMessageChunk(content="", usage_metadata=self.usage, chunk_position="last"),
            generation_info={"finish_reason": "stop", "model_name": self.model_name},
        )

    def bind_tools(self, tools: Sequence[Any], **kwargs: Any) -> Runnable[Any, AIMessage]:
        return self.bind(tools=list(tools), **kwargs)


def saying(text: str) -> Scripted:
    """A model that always says this."""
    return Scripted(reply=lambda messages: AIMessage(text))


def answering() -> Scripted:
    """A model that answers `bad(question)`."""
    return Scripted(reply=lambda messages: AIMessage(f"bad({messages[-1].text})"))
