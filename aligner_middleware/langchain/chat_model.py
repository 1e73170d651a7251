"""`AlignerRunnable.wrap(llm)`: a chat model whose every answer is corrected before anybody sees it.

It calls the inner model's own `_generate` and `_stream`, not `invoke`: so one call is one run, usage counts once, and no
callback, event or stream is told a raw token. In all else it is the inner model.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.language_models.base import LangSmithParams
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import ConfigurableFieldSpec, Runnable, RunnableConfig, RunnableWithFallbacks
from langchain_core.runnables.base import RunnableBindingBase
from langchain_core.runnables.configurable import DynamicRunnable
from langchain_core.tools import BaseTool
from pydantic import model_validator

from aligner_middleware.langchain.alignment import Aligned, Alignment, Asked, atell, check_names, or_raise, tell
from aligner_middleware.langchain.answers import Answer, locate
from aligner_middleware.langchain.messages import question_or_error
from aligner_middleware.langchain.streaming import Gathering, aaligned_chunks, aligned_chunks, closing, passing
from aligner_middleware.langchain.structured import asks_for_structure

# What the caller of a model may set on it, and what a run is shaped by: the wrapper takes it from the inner model.
_INHERITED = (
    "cache",
    "callbacks",
    "custom_get_token_ids",
    "disable_streaming",
    "metadata",
    "name",
    "output_version",
    "profile",
    "rate_limiter",
    "tags",
    "verbose",
)
# Policies that what is cached depends on.
_KEYED = (
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


class AlignedChatModel(BaseChatModel, Alignment):
    """A chat model around another, whose answers it corrects. `AlignerRunnable.wrap` makes one.

    What is bound, configured or asked of it reaches the inner model, and attributes that it lacks are the inner model's
    (`model_name`, …); options that it lacks are set on the inner model. Answers in a requested JSON format, and those of
    `with_structured_output`, are not rewritten.

    Attributes:
        llm: The inner model.
        final_only: Whether text beside tool calls is left as it is.
    """

    llm: BaseChatModel
    final_only: bool = False

    @model_validator(mode="before")
    @classmethod
    def _as_the_inner_model(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not isinstance(values.get("llm"), BaseChatModel):
            return values
        llm = values["llm"]
        settings = {name: name for name in type(llm).model_fields}
        settings |= {field.alias: name for name, field in type(llm).model_fields.items() if field.alias}
        check_names(cls.__name__, values, {*cls.model_fields, *settings})
        given = {settings[name]: value for name, value in values.items() if name not in cls.model_fields}
        if given:  # made again, as LangChain does it for `configurable_fields`
            made = {name: value for name, value in vars(llm).items() if name in type(llm).model_fields}
            llm = type(llm)(**made | given)
        own = {name: value for name, value in values.items() if name in cls.model_fields} | {"llm": llm}
        return {name: getattr(llm, name) for name in _INHERITED if hasattr(llm, name)} | own

    def __getattr__(self, name: str) -> Any:
        """Give what only the inner model has."""
        if name.startswith("_") or "llm" not in self.__dict__:
            return super().__getattr__(name)  # type: ignore[misc]
        return getattr(self.llm, name)

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
        aligned = [or_raise(one) for one in self.align_pairs([(question, answer.text) for answer in answers.values()])]
        for one in aligned:
            tell(run_manager, one)
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
        aligned = [or_raise(one) for one in outcomes]
        for one in aligned:
            await atell(run_manager, one)
        return _with_aligned(result, answers, aligned)

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        question = self._question(messages)
        gathering = Gathering(self.aligner, lambda chunk: question)
        try:
            for chunk in self.llm._stream(messages, stop=stop, **kwargs):
                gathering.add(_message_of(chunk))
                if self.mode == "shadow":
                    yield _passing(chunk)
            value = gathering.value
            answer = self._answer(value, kwargs)
            if answer is None:
                yield from self._untouched(value)
                return
            for piece in aligned_chunks(self, answer, question, gathering.ahead, partial(tell, run_manager)):
                yield ChatGenerationChunk(message=piece)
        finally:
            gathering.close()

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        question = await self.aquestion(self._question, messages)
        gathering = Gathering(self.aligner, lambda chunk: question)
        try:
            async for chunk in self.llm._astream(messages, stop=stop, **kwargs):
                gathering.add(_message_of(chunk))
                if self.mode == "shadow":
                    yield _passing(chunk)
            value = gathering.value
            answer = self._answer(value, kwargs)
            if answer is None:
                for untouched in self._untouched(value):
                    yield untouched
                return
            tell = partial(atell, run_manager)
            async for piece in aaligned_chunks(self, answer, question, gathering.ahead, tell):
                yield ChatGenerationChunk(message=piece)
        finally:
            gathering.close()

    def _question(self, messages: list[BaseMessage]) -> Asked:
        if isinstance(self.question, str):
            return self.question
        return (
            self.ask(self.question, messages) if self.question else question_or_error(messages, dialogue=self.dialogue)
        )

    def _untouched(self, value: Any) -> Iterator[ChatGenerationChunk]:
        """Give an answer that is left alone; in shadow mode its end, since its chunks were given as they came."""
        for message in (value,) if self.mode == "correct" else closing(value):
            if message is not None:
                yield ChatGenerationChunk(message=message)

    def _answers(self, result: ChatResult, kwargs: dict[str, Any]) -> dict[int, Answer]:
        """Find the answers to correct among the generations, by their places."""
        found = {at: self._answer(generation.message, kwargs) for at, generation in enumerate(result.generations)}
        return {at: answer for at, answer in found.items() if answer is not None}

    def _answer(self, message: BaseMessage | None, kwargs: dict[str, Any]) -> Answer | None:
        """Find the answer to correct in a message; `None` where there is none, or it is to be left alone."""
        if not isinstance(message, AIMessage) or gives_structure(self.llm, kwargs):
            return None
        if self.final_only and (message.tool_calls or message.invalid_tool_calls):
            return None
        answer = locate(message)
        return answer if answer.text.strip() and not self.has_aligned(answer.text, answer.report) else None

    # --- as the inner model -----------------------------------------------------------------------------

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: Any = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """Bind tools as the inner model does; its tool calls are not touched."""
        if tool_choice is not None:
            kwargs["tool_choice"] = tool_choice
        bound: Runnable[LanguageModelInput, AIMessage] = _inside(self.llm.bind_tools(tools, **kwargs), self._around)
        return bound

    def with_structured_output(self, schema: Any, **kwargs: Any) -> Runnable[LanguageModelInput, Any]:
        """Give the inner model's structured output, which is not rewritten."""
        return self.llm.with_structured_output(schema, **kwargs)

    def get_token_ids(self, text: str) -> list[int]:
        """Give the tokens of the inner model."""
        return self.llm.get_token_ids(text)

    def get_num_tokens(self, text: str) -> int:
        """Count the tokens of the inner model."""
        return self.llm.get_num_tokens(text)

    def get_num_tokens_from_messages(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> int:
        """Count the tokens of the inner model."""
        return self.llm.get_num_tokens_from_messages(messages, *args, **kwargs)

    @classmethod
    def is_lc_serializable(cls) -> bool:
        """It is dumped with the inner model, and with what its aligner is loaded from; functions are not dumped."""
        return True

    @property
    def lc_attributes(self) -> dict[str, Any]:
        """Dump an aligner as what `Aligner.load` was given."""
        return {"aligner": self.aligner.source or self.aligner.name}

    def _around(self, llm: BaseChatModel) -> AlignedChatModel:
        return self.model_copy(update={"llm": llm})

    @property
    def _llm_type(self) -> str:
        return self.llm._llm_type

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return {**self.llm._identifying_params, "aligner": self.aligner.identity}

    def _get_invocation_params(self, stop: list[str] | None = None, **kwargs: Any) -> dict[str, Any]:
        return self.llm._get_invocation_params(stop=stop, **kwargs)

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        return self.llm._get_ls_params(stop=stop, **kwargs)

    def _get_llm_string(self, stop: list[str] | None = None, **kwargs: Any) -> str:
        """Give the cache key: aligned answers are cached, so it tells aligners and policies apart too."""
        policies = {name: getattr(self, name) for name in _KEYED}
        key = json.dumps({**self.aligner.identity, **policies}, sort_keys=True)
        return f"{self.llm._get_llm_string(stop=stop, **kwargs)}---aligner:{key}"

    def _combine_llm_outputs(self, llm_outputs: list[dict[str, Any] | None]) -> dict[str, Any]:
        return self.llm._combine_llm_outputs(llm_outputs)

    def _should_stream(self, *, async_api: bool, **kwargs: Any) -> bool:
        return self._inner_streams(async_api) and super()._should_stream(async_api=async_api, **kwargs)

    def _should_use_protocol_streaming(self, *, async_api: bool, **kwargs: Any) -> bool:
        return self._inner_streams(async_api) and super()._should_use_protocol_streaming(async_api=async_api, **kwargs)

    def _inner_streams(self, async_api: bool) -> bool:
        inner = type(self.llm)
        return inner._stream != BaseChatModel._stream or (async_api and inner._astream != BaseChatModel._astream)


class _ChosenPerCall(Runnable[LanguageModelInput, Any]):
    """A model that each call's config chooses (`configurable_fields`, `init_chat_model`): what it chooses is wrapped."""

    def __init__(self, llm: Any, wrap: Callable[[BaseChatModel], BaseChatModel]) -> None:
        self._llm = llm
        self._wrap = wrap

    @property
    def config_specs(self) -> list[ConfigurableFieldSpec]:
        """What may be configured."""
        specs: list[ConfigurableFieldSpec] = self._llm.config_specs
        return specs

    def choose(self, config: RunnableConfig | None) -> tuple[Any, RunnableConfig | None]:
        """Give the wrapped model of a call, and the config that is left for it."""
        if isinstance(self._llm, DynamicRunnable):
            model, config = self._llm.prepare(config)
        elif isinstance(self._llm, _ChosenPerCall):
            model, config = self._llm.choose(config)
        else:
            model = self._llm._model(config)
        return _inside(model, self._wrap), config

    def invoke(self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """Invoke the model that the config chooses."""
        model, config = self.choose(config)
        return model.invoke(input, config, **kwargs)

    async def ainvoke(self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """Invoke the model that the config chooses."""
        model, config = self.choose(config)
        return await model.ainvoke(input, config, **kwargs)

    def stream(self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any) -> Iterator[Any]:
        """Stream from the model that the config chooses."""
        model, config = self.choose(config)
        yield from model.stream(input, config, **kwargs)

    async def astream(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any
    ) -> AsyncIterator[Any]:
        """Stream from the model that the config chooses."""
        model, config = self.choose(config)
        async for chunk in model.astream(input, config, **kwargs):
            yield chunk

    def bind_tools(self, tools: Sequence[Any], **kwargs: Any) -> Runnable[LanguageModelInput, Any]:
        """Bind tools as the inner model does."""
        bound: Runnable[LanguageModelInput, Any] = _inside(self._llm.bind_tools(tools, **kwargs), self._wrap)
        return bound

    def with_structured_output(self, schema: Any, **kwargs: Any) -> Runnable[LanguageModelInput, Any]:
        """Give the inner model's structured output, which is not rewritten."""
        structured: Runnable[LanguageModelInput, Any] = self._llm.with_structured_output(schema, **kwargs)
        return structured


def wrapped(llm: Any, alignment: Alignment, *, again: bool = True, **options: Any) -> Any:
    """Put an aligner into a chat model, or into each model of one with arguments bound, retries, fallbacks or choices.

    Args:
        llm: The model.
        alignment: The aligner, and its policies.
        again: Whether a model that corrects already gets another aligner around it.
        **options: Further fields of the `AlignedChatModel`.

    Raises:
        TypeError: If it is none of these.
    """
    policies = {name: getattr(alignment, name) for name in Alignment.model_fields}
    return _inside(llm, partial(_aligned, again=again, options=policies | options))


def _aligned(llm: BaseChatModel, *, again: bool, options: dict[str, Any]) -> BaseChatModel:
    if isinstance(llm, AlignedChatModel) and llm.mode == "correct" and not again:
        return llm
    return AlignedChatModel(llm=llm, **options)


def _inside(llm: Any, wrap: Callable[[BaseChatModel], BaseChatModel]) -> Any:
    """Put a wrapper around each model that is inside of a runnable."""
    if isinstance(llm, BaseChatModel):
        return wrap(llm)
    if isinstance(llm, RunnableBindingBase):
        return llm.model_copy(update={"bound": _inside(llm.bound, wrap)})
    if isinstance(llm, RunnableWithFallbacks):
        fallbacks = [_inside(fallback, wrap) for fallback in llm.fallbacks]
        return llm.model_copy(update={"runnable": _inside(llm.runnable, wrap), "fallbacks": fallbacks})
    # What `init_chat_model` gives has neither a public class nor a public name for what it chooses.
    if isinstance(llm, (DynamicRunnable, _ChosenPerCall)) or callable(getattr(type(llm), "_model", None)):
        return _ChosenPerCall(llm, wrap)
    raise TypeError(
        f"an aligner goes into a chat model (a BaseChatModel), not a {type(llm).__name__}; to the right of anything else it "
        "stands in a chain, llm | AlignerRunnable(), and AlignerMiddleware(raw_streaming=True) corrects what any model said"
    )


def gives_structure(llm: Any, arguments: Mapping[str, Any]) -> bool:
    """Say whether a model is asked for a structured answer, by what it is made with, what is bound to it, or arguments."""
    if isinstance(llm, RunnableBindingBase):
        return gives_structure(llm.bound, {**llm.kwargs, **arguments})
    if isinstance(llm, RunnableWithFallbacks):
        return any(gives_structure(one, arguments) for one in (llm.runnable, *llm.fallbacks))
    if isinstance(llm, AlignedChatModel):
        return gives_structure(llm.llm, arguments)
    return isinstance(llm, BaseChatModel) and asks_for_structure(vars(llm), arguments)


def _message_of(chunk: ChatGenerationChunk) -> BaseMessage:
    """Give the message of a chunk, with what its generation says of it."""
    metadata = {**(chunk.generation_info or {}), **chunk.message.response_metadata}
    return chunk.message.model_copy(update={"response_metadata": metadata})


def _passing(chunk: ChatGenerationChunk) -> ChatGenerationChunk:
    return chunk.model_copy(update={"message": passing(chunk.message)})


def _with_aligned(result: ChatResult, answers: dict[int, Answer], aligned: Sequence[Aligned]) -> ChatResult:
    generations = list(result.generations)
    for (at, answer), one in zip(answers.items(), aligned, strict=True):
        info = generations[at].generation_info
        if info and one.report["changed"]:  # its tokens are those of the old text
            info = {key: value for key, value in info.items() if key != "logprobs"}
        generations[at] = ChatGeneration(message=answer.put(one), generation_info=info)
    return result.model_copy(update={"generations": generations})
