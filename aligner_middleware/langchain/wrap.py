"""`AlignerRunnable.wrap(llm)`: puts an aligner into a chat model, or into each chat model inside of a runnable."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, overload

from aligner_middleware.langchain.alignment import Alignment
from aligner_middleware.langchain.options import AlignmentOptions

if TYPE_CHECKING:
    from langchain_core.language_models import BaseChatModel, LanguageModelInput
    from langchain_core.messages import AIMessage
    from langchain_core.runnables import Runnable

    from aligner_middleware.aligner import Aligner
    from aligner_middleware.langchain.chat_model import AlignedChatModel


class Wrap(Protocol):
    """A chat model gives a chat model; one with arguments bound, retries or fallbacks, the same around one."""

    @overload
    def __call__(self, llm: BaseChatModel, aligner: Aligner | str = ..., **options: Any) -> AlignedChatModel: ...

    @overload
    def __call__(
        self, llm: Runnable[LanguageModelInput, AIMessage], aligner: Aligner | str = ..., **options: Any
    ) -> Runnable[LanguageModelInput, AIMessage]: ...


class WrapMethod:
    """The method `wrap` of a class, which makes an instance of its arguments, and of an instance, which has its own."""

    def __get__(self, instance: Alignment | None, owner: Callable[..., Alignment]) -> Wrap:
        def wrap(llm: Any, aligner: Aligner | str = "default", **options: Any) -> Any:
            """Put an aligner into a chat model: every answer that it gives is corrected.

            Args:
                llm: A chat model; or one with arguments bound, retries, fallbacks or configurable fields, each of whose
                    models is wrapped.
                aligner: As `AlignerRunnable` takes it.
                **options: As `AlignerRunnable` takes them.

            Returns:
                An `AlignedChatModel`, wherever a `BaseChatModel` is required; for a bound model the same around one.

            Raises:
                TypeError: If it is no chat model; or if options are given to the `wrap` of an instance, which has its own.
            """
            if instance is None:
                return wrap_chat_models(llm, owner(aligner, **options))
            if aligner != "default" or options:
                raise TypeError(
                    "this AlignerRunnable has its aligner and options already: give them to AlignerRunnable(…)"
                )
            return wrap_chat_models(llm, instance)

        return wrap


def wrap_chat_models(llm: Any, alignment: Alignment, *, again: bool = True, **fields: Any) -> Any:
    """Put an aligner into a chat model, or into each model of one with arguments bound, retries, fallbacks or choices.

    Args:
        llm: The model.
        alignment: The aligner and its options.
        again: Whether a model that corrects already gets another aligner around it.
        **fields: Further fields of the `AlignedChatModel`.

    Raises:
        TypeError: If it is none of these.
    """
    from aligner_middleware.langchain.nested import (
        map_chat_models,  # late: a chain that wraps no model needs none of it
    )

    options = {name: getattr(alignment, name) for name in AlignmentOptions.model_fields}
    return map_chat_models(llm, partial(_wrap_model, again=again, fields=options | fields))


def _wrap_model(llm: BaseChatModel, *, again: bool, fields: dict[str, Any]) -> BaseChatModel:
    from aligner_middleware.langchain.chat_model import AlignedChatModel

    if isinstance(llm, AlignedChatModel) and llm.mode == "correct" and not again:
        return llm
    return AlignedChatModel(llm=llm, **fields)
