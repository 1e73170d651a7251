"""`create_agent(model, tools, middleware=[AlignerMiddleware()])`: corrects the final answers of an agent.

It puts an `AlignedChatModel` around the model of each call, so that nothing of the raw answer is streamed, traced or
stored: the answer is corrected inside of the model's own run, and keeps its message id.
"""

from __future__ import annotations

import warnings
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

from langchain_core.messages import AIMessage, BaseMessage

from aligner_middleware.aligner import Aligner
from aligner_middleware.errors import MissingExtraError
from aligner_middleware.langchain.answers import Answer, find_answer
from aligner_middleware.langchain.chat_model import gives_structure
from aligner_middleware.langchain.events import EVENT
from aligner_middleware.langchain.messages import question_or_error
from aligner_middleware.langchain.metadata import aligner_metadata, is_about
from aligner_middleware.langchain.options import check_names, option_names
from aligner_middleware.langchain.outcome import unwrap
from aligner_middleware.langchain.piecewise import QuestionOrError
from aligner_middleware.langchain.runnable import AlignerRunnable
from aligner_middleware.langchain.wrap import wrap_chat_models

try:
    from langchain.agents.middleware import AgentMiddleware, ModelRequest, ModelResponse
    from langchain.agents.structured_output import ToolStrategy
except ImportError as exc:
    raise MissingExtraError("AlignerMiddleware", "agents") from exc


class AlignerMiddleware(AgentMiddleware[Any, Any, Any]):
    """Correct the final answers of an agent.

    The question is the last human message of the agent's state. Tool calls and structured responses are not touched.
    Tokens are streamed as they are corrected; in the agent's state, and so in its checkpoints, the corrected answer
    stands under the id of the model's message. List it last: a middleware after it that puts another model in, such as
    `ModelFallbackMiddleware`, would stream that model's raw tokens. Its answers are corrected all the same, and a
    warning says so.

    Args:
        aligner: An `AlignerRunnable`, whose options are taken; or, as that takes it, an `Aligner`, or the name of one.
        intermediate: Whether text beside tool calls is corrected too.
        tool_results: Whether what tools have answered since the question goes along with it.
        raw_streaming: Whether the model's raw tokens are streamed as they come, and the answer is corrected only when it
            is whole: faster to read, and seen before it is corrected.
        **options: As `AlignerRunnable` takes them: `on_error`, `timeout`, `keep_original` (which keeps the original in the
            stored message's `response_metadata["aligner"]`), …; `question` is a function from the state's messages.

    Raises:
        TypeError: If options are given with an `AlignerRunnable`, which has its own; or if there is no option of a name.
        InputError: As `AlignerRunnable` does.
    """

    def __init__(
        self,
        aligner: AlignerRunnable | Aligner | str = "default",
        *,
        intermediate: bool = False,
        tool_results: bool = False,
        raw_streaming: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        own = {"intermediate", "tool_results", "raw_streaming"}
        check_names("AlignerMiddleware", options, option_names() | own)
        if isinstance(aligner, AlignerRunnable) and options:
            raise TypeError(f"{sorted(options)} can be given to the AlignerRunnable, not beside it")
        self.align = aligner if isinstance(aligner, AlignerRunnable) else AlignerRunnable(aligner, **options)
        self.intermediate = intermediate
        self.tool_results = tool_results
        self.raw_streaming = raw_streaming
        self.tools = []

    @property
    def name(self) -> str:
        """Its name in the agent, which tells several aligners apart."""
        return f"AlignerMiddleware[{self.align.aligner.name}]"

    def wrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], ModelResponse[Any]]
    ) -> ModelResponse[Any]:
        """Call the model with an aligner around it."""
        if _gives_json(request):
            return handler(request)
        question = self._question(request)
        response = handler(self._around(request, question))
        for index, answer in self._unseen(request, response).items():
            (outcome,) = self.align.align_pairs([(question, answer.text)])
            response = _with_message(response, index, answer.replace(unwrap(outcome)))
        self._write_events(request, response)
        return response

    async def awrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]]
    ) -> ModelResponse[Any]:
        """Call the model with an aligner around it, and leave the event loop free."""
        if _gives_json(request):
            return await handler(request)
        question = await self.align.aquestion(self._question, request)
        response = await handler(self._around(request, question))
        for index, answer in self._unseen(request, response).items():
            outcome = await self.align.aalign_pair(question, answer.text)
            response = _with_message(response, index, answer.replace(unwrap(outcome)))
        self._write_events(request, response)
        return response

    def _question(self, request: ModelRequest[Any]) -> QuestionOrError:
        """Find the question of this call."""
        if isinstance(self.align.question, str):
            return self.align.question
        messages = request.state["messages"]
        if self.align.question is not None:
            return self.align.ask(self.align.question, messages)
        return question_or_error(messages, dialogue=self.align.dialogue, tool_results=self.tool_results)

    def _around(self, request: ModelRequest[Any], question: QuestionOrError) -> ModelRequest[Any]:
        if self.raw_streaming:
            return request
        align = self.align.model_copy(
            update={"question": question if isinstance(question, str) else _raising(question)}
        )
        # A model that has an aligner already keeps that one.
        model: Any = wrap_chat_models(request.model, align, again=False, final_only=not self.intermediate)
        return request.override(model=model)

    def _unseen(self, request: ModelRequest[Any], response: ModelResponse[Any]) -> dict[int, Answer]:
        """Find the answers that no aligner has seen: those of raw streaming, and of models put in after this one.

        One that an aligner has seen in shadow mode is still to be corrected, and one that was changed since.
        """
        shadow = self.align.mode == "shadow"
        answers: dict[int, Answer] = {}
        if gives_structure(request.model, request.model_settings):
            return answers
        for index, message in enumerate(response.result):
            if not isinstance(message, AIMessage) or (message.tool_calls and not self.intermediate):
                continue
            answer = find_answer(message)
            seen = is_about(answer.metadata, answer.text) and (shadow or answer.metadata.get("mode") != "shadow")
            if answer.text.strip() and not seen:
                answers[index] = answer
        if not self.raw_streaming and not shadow and not all(answer.metadata for answer in answers.values()):
            warnings.warn(_LEAK, RuntimeWarning, stacklevel=2)
        return answers

    def _write_events(self, request: ModelRequest[Any], response: ModelResponse[Any]) -> None:
        """Write the metadata of each answer to the stream mode `custom`."""
        if request.runtime is None:
            return
        for message in response.result:
            if metadata := aligner_metadata(message):
                request.runtime.stream_writer({EVENT: {"message_id": message.id, **metadata}})


_LEAK = (
    "an answer reached AlignerMiddleware from a model that another middleware put in after it (such as "
    "ModelFallbackMiddleware): it was corrected, but its raw tokens may have been streamed. List AlignerMiddleware last: "
    "middleware=[…, AlignerMiddleware()]"
)


def _gives_json(request: ModelRequest[Any]) -> bool:
    """Say whether the answer's text is a structured response; by `ToolStrategy` that is a tool call instead."""
    return request.response_format is not None and not isinstance(request.response_format, ToolStrategy)


def _raising(error: Exception) -> Callable[[Any], str]:
    def question(messages: Any) -> str:
        raise error

    return question


def _with_message(response: ModelResponse[Any], index: int, message: BaseMessage) -> ModelResponse[Any]:
    return replace(response, result=[*response.result[:index], message, *response.result[index + 1 :]])
