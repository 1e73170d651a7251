"""SGLang's own ways: a context that it does not give whole, requests that it gives up, events that hold several tokens."""

from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
from fastapi import Request
from fastapi.responses import JSONResponse, Response

from aligner_middleware import Aligner
from aligner_middleware.errors import RemoteError
from tests.fakes import fake_aligner
from tests.model_server import Kind, ModelServer, Running, running, sglang_abort
from tests.unit.remote.test_equal import ANSWER, folder_of, soften

EXPECTED = soften("q", ANSWER)


@pytest.fixture
def kind() -> Kind:
    return "sglang"


def gives_up(message: str, status: int | None, *, streams: bool) -> Callable[[Request], Response | None]:
    """Answer the next request, or the second, which is the first stream, as SGLang does where it gives one up."""
    number = count()

    def answer(request: Request) -> Response | None:
        if request.url.path != "/generate" or next(number) != streams:
            return None
        event = sglang_abort(message, status)
        return Response(event, media_type="text/event-stream") if streams else Response(event.removeprefix(b"data: "))

    return answer


def test_the_longest_answer_is_one_that_the_server_takes(tmp_path: Path) -> None:
    with fake_aligner(soften) as copies:
        server = ModelServer(copies.fake_model, copies._codec.tokenizer, "sglang")
        server.max_model_len = 300
        with running(server) as one, Aligner.connect(one.url, folder_of(copies, tmp_path)) as aligner:
            answer = "x" * aligner.longest_answer("q")
            assert not aligner.correct("q", answer).changed
    assert max(len(body["input_ids"]) for body in server.requests) >= server.longest_prompt - 2


@pytest.mark.parametrize("path", ["/server_info", "/get_server_info"])
def test_old_and_new_servers_tell_their_version(path: str, running_server: Running, folder: Path) -> None:
    def tells(request: Request) -> Response | None:
        if request.url.path == path:
            return JSONResponse({"version": "0.1.2"})
        return Response(status_code=404) if request.url.path.endswith("info") else None

    running_server.server.answers = [tells, tells]
    with Aligner.connect(running_server.url, folder) as aligner:
        assert "SGLang 0.1.2 at" in repr(aligner)


def test_a_refusal_within_a_stream_is_an_error_at_once(server: ModelServer, remote: Aligner) -> None:
    server.answers = [gives_up("Input length exceeds the maximum.", 400, streams=True)]
    with pytest.raises(RemoteError, match=r"refuses the request .status 400.: Input length exceeds") as caught:
        remote.correct("q", ANSWER)
    assert caught.value.status == 400 and not caught.value.temporary


@pytest.mark.parametrize("streams", [False, True])
def test_a_request_that_it_gives_up_is_made_again(streams: bool, server: ModelServer, remote: Aligner) -> None:
    server.answers = [gives_up("Aborted", None, streams=streams)]
    assert remote.correct("q", ANSWER).corrected == EXPECTED
    assert not server.answers


def test_events_hold_four_tokens_each(server: ModelServer, remote: Aligner) -> None:
    server.break_after = [5, 0, 7]
    assert remote.correct("q", ANSWER).corrected == EXPECTED
    streams = [body for body in server.requests if body.get("stream")]
    lengths = [len(body["input_ids"]) - len(streams[0]["input_ids"]) for body in streams]
    assert lengths == [0, 5, 5, 10]  # as many as whole events brought, the first of which has one
