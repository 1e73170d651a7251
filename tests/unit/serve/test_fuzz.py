"""Every route under requests that its schema allows, that it forbids, and that break it: no bad input makes a 5xx."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
import schemathesis
import uvicorn
from fastapi import FastAPI
from fastapi.routing import APIRoute
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode

from aligner_middleware.serve import page
from aligner_middleware.serve.app import create_app
from aligner_middleware.serve.connections import CONNECTION
from aligner_middleware.serve.settings import PolicySettings, ServeSettings
from tests.unit.serve.serving import DONE, RUDE, Upstream, completion, polite_aligner, spoken, streamed
from tests.unit.serve.test_responses import response

CHAT = "/v1/chat/completions"
LIMITS: Any = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
FEW = settings(max_examples=60, phases=[Phase.explicit, Phase.generate], **LIMITS)
MANY = settings(max_examples=300, phases=[Phase.explicit, Phase.generate], **LIMITS)


def upstream(request: httpx2.Request) -> httpx2.Response:
    if request.method == "GET":
        return httpx2.Response(200, json={"object": "list", "data": []})
    if request.url.path.endswith("/responses"):
        return response(RUDE)
    stream = json.loads(request.content).get("stream")
    return streamed([*spoken(RUDE), DONE]) if stream else completion(RUDE)


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> FastAPI:
    audit = tmp_path_factory.mktemp("audit") / "audit.sqlite"
    given = ServeSettings(upstream="http://u/v1", audit=audit, policy=PolicySettings(keep_texts=True), max_body=2**20)
    return create_app(given, polite_aligner(), Upstream(upstream))


@pytest.fixture(scope="module")
def client(app: FastAPI) -> Iterator[httpx2.Client]:
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", http=CONNECTION, ws="none"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    with httpx2.Client(base_url=url, timeout=60) as client:
        yield client
    server.should_exit = True
    thread.join(20)


def check(status: int, text: str) -> None:
    """An answer that is not 2xx has OpenAI's shape, and is not the service's fault."""
    if 200 <= status < 300:
        return
    assert status < 500, text
    error = json.loads(text)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and isinstance(error["message"], str)


# --- what the description of the routes allows and forbids


@pytest.fixture(scope="module")
def described(app: FastAPI, client: httpx2.Client) -> Any:
    return schemathesis.openapi.from_dict(whole_schema(app))


def whole_schema(app: FastAPI) -> dict[str, Any]:
    """The description of all routes, those of the page among them."""
    shown = FastAPI()
    for route in page.router.routes:
        if isinstance(route, APIRoute) and route.path != "/page/events":  # it never ends
            shown.add_api_route(route.path, route.endpoint, methods=[*(route.methods or ())])
    schema, more = app.openapi(), shown.openapi()
    schema["paths"] |= more["paths"]
    schema["components"]["schemas"] |= more["components"]["schemas"]
    return schema


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(GenerationMode))
def test_requests_by_and_against_the_description_get_an_answer_or_an_error_of_openais_shape(
    described: Any, client: httpx2.Client, mode: GenerationMode
) -> None:
    tried = 0
    for result in described.get_all_operations():
        operation = result.ok()
        if mode is GenerationMode.NEGATIVE and operation.method == "get":  # nothing in it can be wrong
            continue

        @FEW
        @given(case=operation.as_strategy(generation_mode=mode))
        def holds(case: Any) -> None:
            nonlocal tried
            tried += 1
            reply = case.call(base_url=str(client.base_url), timeout=60)
            check(reply.status_code, reply.text)

        holds()
    assert tried > 300


# --- bodies of OpenAI's API, whose schema says little: fields that are right, wrong, or anything

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.just(10**400),
    lambda some: st.lists(some, max_size=3) | st.dictionaries(st.text(max_size=8), some, max_size=3),
    max_leaves=6,
)
ROLES = st.sampled_from(["system", "developer", "user", "assistant", "tool", "function"])
TEXTS = st.sampled_from(["Who am I?", "", " ", "\ud800", "\0", "{", "a" * 5_000])


def objects(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """An object with some of its fields, of which some are anything."""
    loose = {name: st.one_of(right, right, right, ANYTHING) for name, right in fields.items()}
    return st.fixed_dictionaries({}, optional=loose)


PARTS = st.lists(
    st.one_of(
        objects(type=st.sampled_from(["text", "input_text", "output_text", "image_url", "refusal"]), text=TEXTS),
        objects(type=st.just("image_url"), image_url=st.fixed_dictionaries({"url": TEXTS})),
        TEXTS,
    ),
    max_size=3,
)
MESSAGES = st.lists(
    objects(
        role=ROLES,
        content=st.one_of(TEXTS, st.none(), PARTS),
        name=TEXTS,
        tool_call_id=TEXTS,
        tool_calls=st.lists(
            objects(id=TEXTS, type=st.just("function"), function=objects(name=TEXTS, arguments=TEXTS)), max_size=2
        ),
    ),
    max_size=4,
)
SHARED = {
    "model": TEXTS,
    "stream": st.booleans(),
    "stream_options": objects(include_usage=st.booleans()),
    "tools": st.lists(objects(type=st.just("function"), function=objects(name=TEXTS)), max_size=2),
    "n": st.integers(0, 3),
    "response_format": objects(type=st.sampled_from(["text", "json_object", "json_schema"])),
    "text": objects(format=objects(type=st.sampled_from(["text", "json_schema"]))),
    "aligner": ANYTHING,
}


@pytest.mark.slow
@pytest.mark.parametrize("path", [CHAT, "/v1/responses"])
def test_bodies_of_openais_api_that_are_partly_wrong_get_an_answer_or_an_error_of_its_shape(
    client: httpx2.Client, path: str
) -> None:
    statuses = set()

    @MANY
    @given(body=objects(messages=MESSAGES, input=st.one_of(MESSAGES, TEXTS), **SHARED))
    def holds(body: Any) -> None:
        reply = client.post(path, content=json.dumps(body).encode(), headers={"content-type": "application/json"})
        check(reply.status_code, reply.text)
        assert "idiot" not in reply.text or "reason" in reply.text  # raw only where it says why
        statuses.add(reply.status_code)

    holds()
    assert {200, 400} <= statuses


USER = {"role": "user", "content": "Who am I?"}


def chat(*messages: Any, **fields: Any) -> bytes:
    return json.dumps({"model": "m", "messages": list(messages), **fields}).encode()


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (chat(USER), 200),
        (chat(*[USER, {"role": "assistant", "content": None}] * 1_000), 200),
        (chat(USER, {"role": "assistant", "content": None, "tool_calls": [{}]}, {"role": "tool", "content": "x"}), 200),
        (chat(USER, {"role": "tool"}, {"role": "function", "content": {}}), 200),
        (chat(USER | {"content": None}), 200),
        (chat(USER | {"content": "a " * 300_000}), 422),
        (chat(USER | {"content": "a" * 2**20}), 413),
        (b'"' + b"x" * 10_000_000, 413),
        (chat(USER, unknown={"a": [None]}), 200),
        (chat(USER | {"role": "wizard"}), 400),
        (chat(USER | {"role": ["user"]}), 400),
        (chat(USER | {"content": 5}), 400),
        (chat(None), 400),
        (chat(), 400),
        (b"", 400),
        (b"{", 400),
        (b"null", 400),
        (b"[" * 100_000, 400),
        (b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400),
        (b'{"messages": [{"role": "user", "content": "q"}], "x": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001, 400),
        (b'{"messages": NaN}', 400),
        (b'{"n": ' + b"9" * 5_000 + b"}", 400),
        (chat(USER).decode().encode("utf-16"), 200),
        (chat(USER | {"content": "\ud800"}), 422),
        (b"\xef\xbb\xbf" + chat(USER), 200),
        (b"\xff", 400),
    ],
    ids=lambda value: str(value[:40] if isinstance(value, bytes) else value),
)  # fmt: skip
def test_bodies_at_their_limits(client: httpx2.Client, content: bytes, status: int) -> None:
    headers = {"content-type": "application/json"}
    reply = client.post(CHAT, content=content, headers=headers)
    check(reply.status_code, reply.text)
    assert reply.status_code == status, reply.text
    streamed = client.post(CHAT, content=content.replace(b'{"model"', b'{"stream": true, "model"'), headers=headers)
    assert streamed.status_code == (200 if status == 422 else status)  # which is told in an event
    assert ('"error"' in streamed.text) == (status != 200)


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (f"PUT {CHAT}", 405),
        (f"GET {CHAT}", 405),
        (f"GET {CHAT}/", 404),
        ("GET /v1/models/" + "|" * 30_000, 400),
        ("GET /v1/models?" + "|" * 30_000, 400),
        ("GET /v1/models?a=%ff%00&&=", 200),
        ("GET /v1/models/%00%0d%0a", 200),
        ("GET /v1/models/\xe9", 400),
        ("GET /v1/models HTTP/1.1\nopenai-organization: \xe9\xff\nauthorization: \xe9", 200),
        ("GET /page/log?search=%00%ff%25_", 200),
        ("GET /page/log?search=" + "a" * 201, 400),
        ("POST /page/mark HTTP/1.1\ncontent-type: text/plain\ncontent-length: 2\n\n{}", 400),
        ("POST /v1/correct HTTP/1.1\ncontent-type: multipart/form-data\ncontent-length: 2\n\n{}", 400),
        ("POST /v1/correct HTTP/1.1\ncontent-length: -1", 400),
        ("POST /v1/correct HTTP/1.1\ncontent-length: 99999999999999999999", 413),
        ("POST /v1/correct HTTP/1.1\ncontent-length: 1\ncontent-length: 2", 400),
        ("POST /v1/correct HTTP/1.1\ntransfer-encoding: gzip", 400),
        ("GET / HTTP/9", 400),
        ("\0", 400),
    ],
    ids=lambda value: repr(value)[:40],
)  # fmt: skip
def test_heads_at_their_limits(client: httpx2.Client, head: str, status: int) -> None:
    first, _, rest = head.partition("\n")
    first += "" if " HTTP/" in first else " HTTP/1.1"
    sent = "\r\n".join([first, "host: a", "connection: close", *rest.split("\n\n")[0].split("\n")]).rstrip("\r\n")
    with socket.create_connection((client.base_url.host, client.base_url.port or 0), timeout=60) as connection:
        connection.sendall(f"{sent}\r\n\r\n{rest.partition(chr(10) * 2)[2]}".encode("latin-1"))
        answer = b""
        while part := connection.recv(65_536):
            answer += part
            if status == 413 and answer.endswith(b"}"):  # it waits for the body no longer
                break
    said = int(answer.split()[1])
    body = answer.partition(b"\r\n\r\n")[2]
    assert said == status, answer
    check(said, body.decode())
