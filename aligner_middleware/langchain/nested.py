"""Chat models inside of other runnables: with arguments bound, fallbacks, or chosen by each call's config."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.runnables import ConfigurableFieldSpec, Runnable, RunnableConfig, RunnableWithFallbacks
from langchain_core.runnables.base import RunnableBindingBase
from langchain_core.runnables.configurable import DynamicRunnable

from aligner_middleware.closing import aclosing


def map_chat_models(llm: Any, wrap: Callable[[BaseChatModel], BaseChatModel]) -> Any:
    """Replace each chat model inside of a runnable by `wrap` of it.

    Args:
        llm: A chat model, or a runnable around one or several.
        wrap: Makes a chat model of a chat model.

    Raises:
        TypeError: If there is no chat model that can be replaced.
    """
    if isinstance(llm, BaseChatModel):
        return wrap(llm)
    if isinstance(llm, RunnableBindingBase):
        return llm.model_copy(update={"bound": map_chat_models(llm.bound, wrap)})
    if isinstance(llm, RunnableWithFallbacks):
        fallbacks = [map_chat_models(fallback, wrap) for fallback in llm.fallbacks]
        return llm.model_copy(update={"runnable": map_chat_models(llm.runnable, wrap), "fallbacks": fallbacks})
    # `init_chat_model` returns an object without a public class, and without a public name for the model it chooses.
    if isinstance(llm, (DynamicRunnable, _ChosenPerCall)) or callable(getattr(type(llm), "_model", None)):
        return _ChosenPerCall(llm, wrap)
    raise TypeError(
        f"an aligner goes into a chat model (a BaseChatModel), not a {type(llm).__name__}; to the right of anything else it "
        "stands in a chain, llm | AlignerRunnable(), and AlignerMiddleware(raw_streaming=True) corrects what any model said"
    )


class _ChosenPerCall(Runnable[LanguageModelInput, Any]):
    """A model that each call's config chooses (`configurable_fields`, `init_chat_model`); the chosen one is wrapped."""

    def __init__(self, llm: Any, wrap: Callable[[BaseChatModel], BaseChatModel]) -> None:
        self._llm = llm
        self._wrap = wrap

    @property
    def config_specs(self) -> list[ConfigurableFieldSpec]:
        """The fields that a config may set."""
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
        return map_chat_models(model, self._wrap), config

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
        async with aclosing(model.astream(input, config, **kwargs)) as chunks:
            async for chunk in chunks:
                yield chunk

    def bind_tools(self, tools: Sequence[Any], **kwargs: Any) -> Runnable[LanguageModelInput, Any]:
        """Bind tools as the inner model does."""
        bound: Runnable[LanguageModelInput, Any] = map_chat_models(self._llm.bind_tools(tools, **kwargs), self._wrap)
        return bound

    def with_structured_output(self, schema: Any, **kwargs: Any) -> Runnable[LanguageModelInput, Any]:
        """Give the inner model's structured output, which is not rewritten."""
        structured: Runnable[LanguageModelInput, Any] = self._llm.with_structured_output(schema, **kwargs)
        return structured
