"""A chat model that behaves as another one in all but the answers it gives.

Bound arguments, configured fields, attributes, tokens, tracing parameters and the way it streams are the inner model's. A
derived class gives the answers: `_generate`, `_stream` and their asynchronous forms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

# All of these are imported at runtime: LangChain evaluates the type hints of a model's methods.
from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.language_models.base import LangSmithParams
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.runnables import Runnable
from langchain_core.tools import BaseTool
from pydantic import model_validator

from aligner_middleware.langchain.nested import map_chat_models
from aligner_middleware.langchain.options import check_names

# Settings of the model and of its runs, which the wrapper takes from the inner model.
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


class ChatModelProxy(BaseChatModel):
    """A chat model around another.

    Attributes that the proxy lacks are the inner model's (`model_name`, …), and options that it lacks are set on the inner
    model.

    Attributes:
        llm: The inner model.
    """

    llm: BaseChatModel

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
            present = {name: value for name, value in vars(llm).items() if name in type(llm).model_fields}
            llm = type(llm)(**present | given)
        own = {name: value for name, value in values.items() if name in cls.model_fields} | {"llm": llm}
        return {name: getattr(llm, name) for name in _INHERITED if hasattr(llm, name)} | own

    def __getattr__(self, name: str) -> Any:
        """Give an attribute that only the inner model has."""
        if name.startswith("_") or "llm" not in self.__dict__:
            return super().__getattr__(name)  # type: ignore[misc]
        return getattr(self.llm, name)

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
        bound: Runnable[LanguageModelInput, AIMessage] = map_chat_models(
            self.llm.bind_tools(tools, **kwargs), self._around
        )
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

    def _around(self, llm: BaseChatModel) -> Self:
        return self.model_copy(update={"llm": llm})

    @property
    def _llm_type(self) -> str:
        return self.llm._llm_type

    def _get_invocation_params(self, stop: list[str] | None = None, **kwargs: Any) -> dict[str, Any]:
        return self.llm._get_invocation_params(stop=stop, **kwargs)

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        return self.llm._get_ls_params(stop=stop, **kwargs)

    def _combine_llm_outputs(self, llm_outputs: list[dict[str, Any] | None]) -> dict[str, Any]:
        return self.llm._combine_llm_outputs(llm_outputs)

    def _should_stream(self, *, async_api: bool, **kwargs: Any) -> bool:
        return self._inner_streams(async_api) and super()._should_stream(async_api=async_api, **kwargs)

    def _should_use_protocol_streaming(self, *, async_api: bool, **kwargs: Any) -> bool:
        return self._inner_streams(async_api) and super()._should_use_protocol_streaming(async_api=async_api, **kwargs)

    def _inner_streams(self, async_api: bool) -> bool:
        inner = type(self.llm)
        return inner._stream != BaseChatModel._stream or (async_api and inner._astream != BaseChatModel._astream)
