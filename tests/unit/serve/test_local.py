"""The local model in place of an upstream, with answers that a test writes."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from aligner_middleware.errors import MissingExtraError
from aligner_middleware.serve.local import LocalTransport
from aligner_middleware.serve.local_model import Asked, Usage, _until
from aligner_middleware.serve.problems import Problem
from tests.unit.serve.serving import ASKED, POLITE, RUDE, serving, text_of

asked: list[Asked] = []


def generate(request: Asked, stop: threading.Event) -> Iterator[str | Usage]:
    asked.append(request)
    if request.messages[-1]["content"] == "long":
        raise Problem(400, "too long", code="context_length_exceeded")
    yield from RUDE.partition("idiot")
    yield Usage(5, 7, "stop")


def local(request: httpx2.Request) -> Any:
    return LocalTransport(generate).handle_async_request(request)


async def test_it_answers_and_streams_with_usage_through_the_service() -> None:
    async with serving(local, upstream=None) as service:
        whole = (await service.ask()).json()
        events = await service.stream(ASKED | {"stream_options": {"include_usage": True}})
    assert whole["choices"][0]["message"]["content"] == POLITE
    assert whole["usage"] == {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}
    assert text_of(events) == POLITE
    assert events[-2]["usage"]["total_tokens"] == 12


async def test_it_reads_parts_roles_and_bounds() -> None:
    body = {
        "messages": [
            {"role": "developer", "content": "d"},
            {"role": "user", "content": [{"type": "text", "text": "q"}]},
        ],
        "max_tokens": 10**6,
        "temperature": 0.5,
        "stop": "x",
    }
    async with serving(local, upstream=None) as service:
        assert (await service.ask(body)).status_code == 200
    assert asked[-1] == Asked([{"role": "system", "content": "d"}, {"role": "user", "content": "q"}], 1024, 0.5, ("x",))


@pytest.mark.parametrize("bad", [{"n": 2}, {"temperature": "hot"}, {"temperature": 3}, {"max_tokens": -1}])
async def test_a_value_that_does_not_fit_is_400(bad: dict[str, Any]) -> None:
    async with serving(local, upstream=None) as service:
        response = await service.ask(ASKED | bad)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == next(iter(bad))


async def test_an_error_while_it_writes_has_openais_shape() -> None:
    body = {"messages": [{"role": "user", "content": "long"}]}
    async with serving(local, upstream=None) as service:
        whole = await service.ask(body)
        events = await service.stream(body)
    assert whole.status_code == 400
    assert whole.json()["error"]["code"] == events[-1]["error"]["code"] == "context_length_exceeded"


async def test_it_lists_its_model() -> None:
    async with serving(local, upstream=None) as service:
        (model,) = (await service.client.get("/v1/models")).json()["data"]
        one = await service.client.get(f"/v1/models/{model['id']}")
        other = await service.client.get("/v1/models/other")
    assert one.json() == model
    assert other.status_code == 404


@pytest.mark.parametrize(
    ("pieces", "stops", "said", "found"),
    [
        (["ab", "cd"], (), "abcd", False),
        (["ab", "cd"], ("bc",), "a", True),
        (["abc", "d"], ("dx",), "abcd", False),
        (["x"], ("x",), "", True),
    ],
)
def test_an_answer_ends_before_a_stop_text(pieces: list[str], stops: tuple[str, ...], said: str, found: bool) -> None:
    given, text = _until(iter(pieces), stops), ""
    while True:
        try:
            text += next(given)
        except StopIteration as end:
            assert (text, end.value) == (said, found)
            return


def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"\[build\]"):
        LocalTransport()
