"""`AlignerRunnable.wrap(llm)`: a chat model whose every answer is corrected before anybody sees it.

It calls the inner model's own `_generate` and `_stream`, not `invoke`: one call is one run, usage counts once, and no
callback, event or stream gets a raw token. In all else it behaves as the inner model.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Mapping
from functools import partial
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import RunnableWithFallbacks
from langchain_core.runnables.base import RunnableBindingBase

from aligner_middleware.closing import aclosing
from aligner_middleware.langchain.alignment import Alignment
from aligner_middleware.langchain.answers import Answer, find_answer
from aligner_middleware.langchain.events import adispatch_event, dispatch_event
from aligner_middleware.langchain.messages import question_or_error
from aligner_middleware.langchain.outcome import Aligned, unwrap
from aligner_middleware.langchain.piecewise import QuestionOrError
from aligner_middleware.langchain.proxy_model import ChatModelProxy
from aligner_middleware.langchain.streaming import (
    ChunkBuffer,
    aaligned_chunks,
    aligned_chunks,
    untouched_end,
    without_end,
)
from aligner_middleware.langchain.structured import asks_for_structure

# Options that a cached answer depends on.
_CACHE_KEY = (
    "by_sentence",
    "dialogue",
    "fallback",
    "final_only",
    "max_answer_tokens",
    "mode",
    "on_doubt",
    "on_error",
    "on_long_answer",
    "on_missing_question",
    "strength",
)


class AlignedChatModel(ChatModelProxy, Alignment):
    """A chat model around another, whose answers it corrects. `AlignerRunnable.wrap` makes one.

    Bound arguments and configured fields reach the inner model; attributes that the wrapper lacks are the inner model's
    (`model_name`, …), and options that it lacks are set on the inner model. Answers in a requested JSON format, and those
    of `with_structured_output`, are not rewritten.

    Attributes:
        llm: The inner model.
        final_only: Whether text beside tool calls is left as it is.
    """

    final_only: bool = False

    def __repr__(self) -> str:
        name = getattr(self.llm, "model_name", None) or getattr(self.llm, "model", None)
        inner = f"{type(self.llm).__name__}({name!r})" if name else type(self.llm).__name__
        return f"AlignedChatModel({inner}, {self.described()})"

    __str__ = __repr__

    # --- generating -------------------------------------------------------------------------------------

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        result = self.llm._generate(messages, stop=stop, **kwargs)
        answers = self._answers(result, kwargs)
        question = self._question(messages) if answers else ""
        outcomes = self.align_pairs([(question, answer.text) for answer in answers.values()])
        aligned = dict(zip(answers, map(unwrap, outcomes), strict=True))
        for index in aligned:
            dispatch_event(run_manager, aligned[index].metadata)
        return _with_aligned(result, answers, aligned)

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        result = await self.llm._agenerate(messages, stop=stop, **kwargs)
        answers = self._answers(result, kwargs)
        question = await self.aquestion(self._question, messages) if answers else ""
        outcomes = await asyncio.gather(*(self.aalign_pair(question, answer.text) for answer in answers.values()))
        aligned = dict(zip(answers, map(unwrap, outcomes), strict=True))
        for index in aligned:
            await adispatch_event(run_manager, aligned[index].metadata)
        return _with_aligned(result, answers, aligned)

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        question = self._question(messages)
        buffer = ChunkBuffer(self, lambda chunk: None if gives_structure(self.llm, kwargs) else question)
        try:
            for chunk in self.llm._stream(messages, stop=stop, **kwargs):
                buffer.add(_message_of(chunk))
                if self.mode == "shadow":
                    yield _without_end(chunk)
                for message in buffer.release():
                    yield ChatGenerationChunk(message=message)
            value = buffer.value
            answer = self._answer(value, kwargs)
            if answer is None:
                for message in untouched_end(self, value, buffer.ahead):
                    yield ChatGenerationChunk(message=message)
                return
            dispatch = partial(dispatch_event, run_manager)
            for message in aligned_chunks(self, answer, question, buffer.ahead, dispatch):
                yield ChatGenerationChunk(message=message)
        finally:
            buffer.close()

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        question = await self.aquestion(self._question, messages)
        buffer = ChunkBuffer(self, lambda chunk: None if gives_structure(self.llm, kwargs) else question)
        try:
            async with aclosing(self.llm._astream(messages, stop=stop, **kwargs)) as chunks:
                async for chunk in chunks:
                    buffer.add(_message_of(chunk))
                    if self.mode == "shadow":
                        yield _without_end(chunk)
                    for message in await buffer.arelease():
                        yield ChatGenerationChunk(message=message)
            value = buffer.value
            answer = self._answer(value, kwargs)
            if answer is None:
                for message in untouched_end(self, value, buffer.ahead):
                    yield ChatGenerationChunk(message=message)
                return
            dispatch = partial(adispatch_event, run_manager)
            async with aclosing(aaligned_chunks(self, answer, question, buffer.ahead, dispatch)) as aligned:
                async for message in aligned:
                    yield ChatGenerationChunk(message=message)
        finally:
            buffer.close()

    def _question(self, messages: list[BaseMessage]) -> QuestionOrError:
        if isinstance(self.question, str):
            return self.question
        return (
            self.ask(self.question, messages) if self.question else question_or_error(messages, dialogue=self.dialogue)
        )

    def _answers(self, result: ChatResult, kwargs: dict[str, Any]) -> dict[int, Answer]:
        """Find the answers to correct among the generations, by their indices."""
        answers = {
            index: self._answer(generation.message, kwargs) for index, generation in enumerate(result.generations)
        }
        return {index: answer for index, answer in answers.items() if answer is not None}

    def _answer(self, message: BaseMessage | None, kwargs: dict[str, Any]) -> Answer | None:
        """Find the answer to correct in a message; `None` where there is none, or it is not to be corrected."""
        if not isinstance(message, AIMessage) or gives_structure(self.llm, kwargs):
            return None
        if self.final_only and (message.tool_calls or message.invalid_tool_calls):
            return None
        answer = find_answer(message)
        return answer if answer.text.strip() and not self.has_aligned(answer.text, answer.metadata) else None

    @classmethod
    def is_lc_serializable(cls) -> bool:
        """It is dumped with the inner model and the source of its aligner; functions are not dumped."""
        return True

    @property
    def lc_attributes(self) -> dict[str, Any]:
        """Dump an aligner as the argument of its `Aligner.load`."""
        return {"aligner": self.aligner.source or self.aligner.name}

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return {**self.llm._identifying_params, "aligner": self.aligner.identity}

    def _get_llm_string(self, stop: list[str] | None = None, **kwargs: Any) -> str:
        """Give the cache key: aligned answers are cached, so aligner and options are part of it."""
        options = {name: getattr(self, name) for name in _CACHE_KEY}
        options |= {} if self.instruction is None else {"instruction": self.instruction}
        key = json.dumps({**self.aligner.identity, **options}, sort_keys=True)
        return f"{self.llm._get_llm_string(stop=stop, **kwargs)}---aligner:{key}"


def gives_structure(llm: Any, arguments: Mapping[str, Any]) -> bool:
    """Say whether a model is asked for a structured answer: by its own settings, by bound arguments, or by a call's."""
    if isinstance(llm, RunnableBindingBase):
        return gives_structure(llm.bound, {**llm.kwargs, **arguments})
    if isinstance(llm, RunnableWithFallbacks):
        return any(gives_structure(model, arguments) for model in (llm.runnable, *llm.fallbacks))
    if isinstance(llm, AlignedChatModel):
        return gives_structure(llm.llm, arguments)
    return isinstance(llm, BaseChatModel) and asks_for_structure(vars(llm), arguments)


def _message_of(chunk: ChatGenerationChunk) -> BaseMessage:
    """Give the message of a chunk, with the `generation_info` in its metadata."""
    metadata = {**(chunk.generation_info or {}), **chunk.message.response_metadata}
    return chunk.message.model_copy(update={"response_metadata": metadata})


def _without_end(chunk: ChatGenerationChunk) -> ChatGenerationChunk:
    return chunk.model_copy(update={"message": without_end(chunk.message)})


def _with_aligned(result: ChatResult, answers: dict[int, Answer], aligned: dict[int, Aligned]) -> ChatResult:
    """Put aligned answers in the places of the generations that they came from."""
    generations = list(result.generations)
    for index, answer in answers.items():
        info = generations[index].generation_info
        if info and aligned[index].metadata["changed"]:  # log-probabilities are of the old text's tokens
            info = {key: value for key, value in info.items() if key != "logprobs"}
        generations[index] = ChatGeneration(message=answer.replace(aligned[index]), generation_info=info)
    return result.model_copy(update={"generations": generations})
