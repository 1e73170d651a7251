"""LiteLLM's Generic Guardrail API: the answers of a LiteLLM proxy are corrected on their way to its clients.

LiteLLM sends an answer without its question (1.110.2 does so for chat completions, in streams and not). It sends the question
before, with mode `pre_call`, and both with the id of the call, so questions are remembered until their answers come. In a
stream LiteLLM does not say which round is the last one, and gives up what is held back only there: so all text is held back.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from langchain_core.messages import HumanMessage
from pydantic import BaseModel, Field, ValidationError

from aligner_middleware.errors import MissingQuestionError
from aligner_middleware.langchain.messages import question_or_error
from aligner_middleware.serve.access import TheClient, TheService
from aligner_middleware.serve.correct import OptionsBody, with_options
from aligner_middleware.serve.problems import Problem
from aligner_middleware.serve.service import Client, Service

PATH = "/beta/litellm_basic_guardrail_api"

_CALLS, _CHARACTERS = 10_000, 32 * 2**20  # questions that are remembered, the oldest ones go
_ADVICE = "LiteLLM sent no question for this answer: set the guardrail's mode to [pre_call, post_call]"
_ONE_PROCESS = (
    "LiteLLM sends a question and its answer in two requests, which have to meet the same process, and this service has "
    "several: set workers to 1"
)

logger = logging.getLogger("aligner_middleware.serve")

Question = str | MissingQuestionError


class GuardrailBody(BaseModel):
    """LiteLLM's request, as far as it is used; LiteLLM may send more."""

    input_type: Literal["request", "response"]
    texts: list[Annotated[str, Field(max_length=200_000)]] | None = Field(None, max_length=1024)
    structured_messages: list[dict[str, Any]] | None = Field(
        None, description="The conversation, as OpenAI's messages; LiteLLM sends it with requests."
    )
    litellm_call_id: str | None = Field(None, max_length=256, description="The same for a request and its response.")
    request_data: dict[str, Any] | None = Field(None, description="Whose request it is.")
    additional_provider_specific_params: dict[str, Any] | None = Field(
        None,
        description="Of the guardrail's configuration: `strength`, `instruction` and `mode`, where the policy allows them.",
    )


class GuardrailReply(BaseModel):
    """The reply to LiteLLM."""

    action: Literal["NONE", "BLOCKED", "GUARDRAIL_INTERVENED"]
    texts: list[str] = Field(description="The texts to show, in the order of the request's.")
    blocked_reason: str | None = Field(None, description="Why the answer may not be shown.")
    stream_holdback_chars: list[int] | None = Field(
        None, description="Characters of each text that a stream may not show before its end: all."
    )


@dataclass
class Call:
    """A call of a chat model.

    Attributes:
        question: Its question, or why it is not known.
        decided: Texts that were decided last, and what became of them: LiteLLM may send the end of a stream twice.
    """

    question: Question
    decided: dict[str, str] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Characters that are remembered of the question."""
        return len(self.question) if isinstance(self.question, str) else 0


class Calls:
    """The latest calls, by client and id; the oldest ones are forgotten."""

    def __init__(self) -> None:
        self._calls: OrderedDict[tuple[str, ...], Call] = OrderedDict()
        self._size = 0

    def __len__(self) -> int:
        return len(self._calls)

    def add(self, key: tuple[str, ...], call: Call) -> None:
        """Remember a call."""
        before = self._calls.pop(key, None)
        self._size += call.size - (before.size if before else 0)
        self._calls[key] = call
        while self._calls and (len(self._calls) > _CALLS or self._size > _CHARACTERS):
            _, oldest = self._calls.popitem(last=False)
            self._size -= oldest.size

    def find(self, key: tuple[str, ...] | None) -> Call:
        """Give a call; a new one without a question where it is not known."""
        known = self._calls.get(key) if key else None
        return known or Call(MissingQuestionError(_ADVICE))


def new_router() -> APIRouter:
    """Make the route, with a memory of its own."""
    router = APIRouter(tags=["litellm"])
    calls = Calls()

    @router.post(PATH, response_model_exclude_none=True)
    async def guardrail(body: GuardrailBody, service: TheService, client: TheClient) -> GuardrailReply:
        """Take part in a LiteLLM proxy as its guardrail."""
        if service.settings.workers > 1:
            raise Problem(501, _ONE_PROCESS, kind="server_error", code="needs_one_worker")
        key = _key_of(client, body)
        texts = body.texts or []
        if body.input_type == "request":
            if key and body.structured_messages:
                calls.add(key, Call(question_of_rows(body.structured_messages)))
            return GuardrailReply(action="NONE", texts=texts)
        call = Call(question_of_rows(body.structured_messages)) if body.structured_messages else calls.find(key)
        if isinstance(call.question, MissingQuestionError):
            logger.warning("%s (call %r)", call.question.cause, body.litellm_call_id)
        return await _align(service, _with_parameters(client, body), call, texts)

    return router


def question_of_rows(rows: list[dict[str, Any]]) -> Question:
    """Find the question in OpenAI's messages: the text of the last one of the user."""
    contents = [row.get("content") for row in rows if row.get("role") == "user"]
    # A row without content is a question without text; other rows are no questions.
    messages = [HumanMessage(_blocks(content)) for content in contents]
    return question_or_error(messages)


def _blocks(content: Any) -> str | list[str | dict[str, Any]]:
    if isinstance(content, str):
        return content
    return [part for part in content if isinstance(part, (str, dict))] if isinstance(content, list) else ""


def _key_of(client: Client, body: GuardrailBody) -> tuple[str, ...] | None:
    # Clients of LiteLLM may choose the id of a call, so it counts together with their key.
    if not body.litellm_call_id:
        return None
    whose = (body.request_data or {}).get("user_api_key_hash")
    return client.name, str(whose or ""), body.litellm_call_id


def _with_parameters(client: Client, body: GuardrailBody) -> Client:
    """Give the client with the options of the guardrail's configuration.

    Raises:
        Problem: 400, if there are others; 403, if the policy allows none.
    """
    try:
        options = OptionsBody.model_validate(body.additional_provider_specific_params or {})
    except ValidationError as exc:
        message = f"additional_provider_specific_params: {exc.errors()[0]['msg']}"
        logger.warning("LiteLLM's guardrail is refused: %s", message)
        raise Problem(400, message, code="invalid_value", param="additional_provider_specific_params") from None
    return with_options(client, options)


async def _align(service: Service, client: Client, call: Call, texts: list[str]) -> GuardrailReply:
    """Align the texts of one response.

    Each is an answer of its own (`n` of the request), or a text between other parts of one.
    """

    async def one(text: str) -> str | Problem:
        if text in call.decided:
            return call.decided[text]
        try:
            return (await service.align(client, PATH, call.question, text)).text
        except Exception as exc:
            return Problem.of(exc)

    decided = await asyncio.gather(*map(one, texts))
    shown = [text for text in decided if isinstance(text, str)]
    if len(shown) < len(decided):
        problem = next(problem for problem in decided if isinstance(problem, Problem))
        reason = f"The answer could not be checked: {problem}"
        return GuardrailReply(action="BLOCKED", texts=[""] * len(texts), blocked_reason=reason)
    call.decided = dict(zip(texts, shown, strict=True))
    action: Literal["NONE", "GUARDRAIL_INTERVENED"] = "NONE" if shown == texts else "GUARDRAIL_INTERVENED"
    return GuardrailReply(action=action, texts=shown, stream_holdback_chars=[len(text) for text in shown])
