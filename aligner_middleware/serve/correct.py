"""`/v1/correct` and `/v1/correct/batch`: questions and answers in, corrections out; whole, or as lines of JSON."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Header
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from aligner_middleware.data.triples import LONGEST_INSTRUCTION
from aligner_middleware.errors import InputError, did_you_mean
from aligner_middleware.langchain.options import Mode, as_input_error
from aligner_middleware.langchain.outcome import Aligned
from aligner_middleware.serve.access import TheClient, TheService
from aligner_middleware.serve.problems import Problem
from aligner_middleware.serve.service import Client, Service
from aligner_middleware.strength import Strength

router = APIRouter(tags=["correct"])

NDJSON = "application/x-ndjson"
MAX_ITEMS = 256
_MAX_TEXT = 200_000  # characters
_AT_ONCE = 16  # items of one batch, so that a batch does not hold up everybody else


class _Body(BaseModel):
    """A part of a request, of which no field is unknown."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _has_no_others(cls, value: Any) -> Any:
        known = list(cls.model_fields)
        for name in value if isinstance(value, Mapping) else ():
            if name not in known:
                hint = did_you_mean(name, known) or f"; there are {', '.join(known)}"
                # Braces in a name of the client's must not be filled in.
                raise PydanticCustomError("unknown_field", "{text}", {"text": f"unknown field {name!r}{hint}"})
        return value


class PairBody(_Body):
    """A question and its answer."""

    question: str = Field(max_length=_MAX_TEXT, description="The user's question.")
    answer: str = Field(max_length=_MAX_TEXT, description="The answer to correct.")


class OptionsBody(_Body):
    """Options that a request may give, where its client's policy allows any."""

    strength: Strength | None = Field(
        None,
        description="low, medium, high, or the score above which an answer is corrected; by default that of the client's "
        "policy, and refused with status 403 where the policy says `overrides: false`.",
    )
    instruction: str | None = Field(
        None,
        max_length=LONGEST_INSTRUCTION,
        description="How to correct, for an aligner that was trained with instructions: an empty text for none; by default "
        "that of the client's policy, and refused with status 403 where the policy says `overrides: false`.",
    )
    mode: Mode | None = Field(
        None,
        description="`shadow` decides and reports, and changes nothing; by default that of the client's policy, and refused "
        "with status 403 where the policy says `overrides: false`.",
    )


class CorrectBody(PairBody, OptionsBody):
    """The request of `/v1/correct`."""

    stream: bool = Field(
        False,
        description='Whether the text comes in lines of JSON, {"text": …}, as soon as nothing can take it back; the last '
        "line is the whole reply, or has the field `error`.",
    )


class BatchBody(OptionsBody):
    """The request of `/v1/correct/batch`."""

    items: list[PairBody] = Field(min_length=1, max_length=MAX_ITEMS, description="Pairs of question and answer.")


class CorrectedBody(BaseModel):
    """What became of an answer. Its fields are those of `response_metadata["aligner"]`; see docs/langchain.md."""

    corrected: str = Field(description="The text to show: the answer itself, where nothing was corrected.")
    changed: bool = Field(description="Whether the text differs from the answer.")
    aligned: bool = Field(description="Whether the aligner decided; if not, `reason` says why.")
    verdict: str | None = Field(None, description="keep, edit or rewrite.")
    score: float | None = Field(None, description="The probability, 0 to 1, that the answer should not be kept.")
    doubts: list[str] = Field([], description="The safeguards that objected to the correction.")
    finish_reason: str | None = Field(None, description="stop, length or loop.")
    usage: dict[str, Any] | None = Field(None, description="Tokens, passes and seconds.")
    instruction: str | None = Field(None, description="How it was corrected, where that was said.")
    model: str = Field(description="Name of the aligner.")
    device: str | None = Field(None, description="What it runs on.")
    mode: str = Field("correct", description="correct or shadow.")
    would_change: bool | None = Field(None, description="In shadow mode: whether the answer would be changed.")
    proposed: str | None = Field(None, description="In shadow mode: the aligner's text, where it differs.")
    reason: str | None = Field(None, description="Why the answer was not aligned.")

    @classmethod
    def of(cls, aligned: Aligned) -> CorrectedBody:
        """Make it of an aligned answer."""
        known = {name: value for name, value in aligned.metadata.items() if name in cls.model_fields}
        return cls(corrected=aligned.text, **known)


class ItemBody(BaseModel):
    """The result of one item of a batch: `result`, or `error` of the shape of OpenAI's."""

    index: int
    result: CorrectedBody | None = None
    error: dict[str, Any] | None = None


class BatchResultBody(BaseModel):
    """The reply of `/v1/correct/batch`."""

    results: list[ItemBody] = Field(description="In the order of the items.")


@router.post("/v1/correct", response_model=CorrectedBody)
async def correct(body: CorrectBody, service: TheService, client: TheClient) -> CorrectedBody | StreamingResponse:
    """Correct one answer; with `stream` as lines of JSON."""
    client = with_options(client, body)
    if not body.stream:
        return CorrectedBody.of(await service.align(client, "/v1/correct", body.question, body.answer))
    events = _streamed(service, client, body)
    # The first event is awaited, so that a correction that fails before any text has its own status.
    first = await anext(events)
    return StreamingResponse(_lines(first, events), media_type=NDJSON)


@router.post("/v1/correct/batch", response_model=BatchResultBody)
async def correct_batch(
    body: BatchBody, service: TheService, client: TheClient, accept: Annotated[str, Header()] = ""
) -> BatchResultBody | StreamingResponse:
    """Correct several answers, each with its own error where it fails.

    With `Accept: application/x-ndjson` each result is a line of JSON, sent as soon as it is known; `index` says whose it is.
    """
    client = with_options(client, body)
    results = as_decided(service, client, body.items)
    if NDJSON in accept:
        return StreamingResponse(
            (_line(item.model_dump(exclude_none=True)) async for item in results), media_type=NDJSON
        )
    return BatchResultBody(results=sorted([item async for item in results], key=lambda item: item.index))


def with_options(client: Client, options: OptionsBody) -> Client:
    """Give the client with the options that its request has.

    Raises:
        Problem: 403, if its policy allows none; 400, if the strength is out of range, or the aligner takes no instruction.
    """
    given = options.model_dump(include=set(OptionsBody.model_fields), exclude_none=True)
    if not given:
        return client
    if not client.policy.overrides:
        name = next(iter(given))
        message = f"the policy of {client.name!r} has overrides: false: leave out {name}, or change the policy"
        raise Problem(403, message, kind="permission_error", code="override_not_allowed", param=name)
    try:
        return client.with_policy(**given)
    except ValidationError as exc:
        raise Problem(400, str(as_input_error(exc)), code="invalid_value", param=next(iter(given))) from None
    except InputError as exc:
        raise Problem(400, str(exc), code="invalid_value") from None


async def _streamed(service: Service, client: Client, body: CorrectBody) -> AsyncGenerator[dict[str, Any], None]:
    """Give the text in pieces, and the whole reply.

    Raises:
        Problem: If the correction fails.
    """
    stream = service.stream(client, "/v1/correct", body.question, body.answer)
    async with aclosing(stream):
        async for piece in stream:
            yield CorrectedBody.of(piece).model_dump() if isinstance(piece, Aligned) else {"text": piece}


async def _lines(first: dict[str, Any], events: AsyncGenerator[dict[str, Any], None]) -> AsyncGenerator[str, None]:
    try:
        yield _line(first)
        async for event in events:
            yield _line(event)
    except Exception as exc:  # the status is sent; the last line has the error
        yield _line(Problem.of(exc).body)
    finally:
        await events.aclose()


async def as_decided(service: Service, client: Client, pairs: list[PairBody]) -> AsyncGenerator[ItemBody, None]:
    """Give the results of a batch in the order in which they are decided."""
    places = asyncio.Semaphore(_AT_ONCE)

    async def one(index: int, pair: PairBody) -> ItemBody:
        async with places:
            try:
                aligned = await service.align(client, "/v1/correct/batch", pair.question, pair.answer)
            except Exception as exc:
                return ItemBody(index=index, error=Problem.of(exc).body["error"])
        return ItemBody(index=index, result=CorrectedBody.of(aligned))

    tasks = [asyncio.create_task(one(index, pair)) for index, pair in enumerate(pairs)]
    try:
        for done in asyncio.as_completed(tasks):
            yield await done
    finally:  # the client may be gone
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _line(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"
