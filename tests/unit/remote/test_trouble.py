"""What becomes of requests that fail, break off, wait, or are given up."""

import asyncio
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fastapi import Request
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from langchain_core.language_models import GenericFakeChatModel

from aligner_middleware import Aligner, AlignerRunnable
from aligner_middleware.errors import ClosedError, CorrectionTimeoutError, InputError, RemoteError
from tests.fakes import FakeAligner, FakeModel, byte_tokenizer
from tests.model_server import ModelServer, Running, running
from tests.unit.remote.test_equal import ANSWER, soften

EXPECTED = soften("q", ANSWER)


async def cancelled(remote: Aligner, answer: str, when: Callable[[], object]) -> None:
    """Begin a call, and cancel it as soon as a condition holds."""
    task = asyncio.create_task(remote.acorrect("q", answer))
    while not when():
        await asyncio.sleep(0.002)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def until(condition: Callable[[], object], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


# --- what is wrong is said ------------------------------------------------------------------------------


def page(request: Request) -> Response:
    return HTMLResponse("<!doctype html><title>Sign in</title>")


WRONG: dict[str, tuple[Callable[[ModelServer], None], dict[str, Any], str]] = {
    "html": (lambda server: server.answers.append(page), {}, "answers with a page of HTML: expected the address"),
    "key": (
        lambda server: setattr(server, "key", "right"),
        {"api_key": "wrong"},
        "refuses the key .status 401: Unauth",
    ),
    "model": (lambda server: None, {"model": "other"}, "does not serve the model 'other', but 'the-aligner'"),
    "tokenizer": (
        lambda server: setattr(
            server, "tokenizer", byte_tokenizer(["<more>", "<repo_name>", "<file_sep>", "<x>", "<y>"])
        ),
        {},
        "whose tokenizer is not that of the aligner 'test'",
    ),
    "redirection": (
        lambda server: server.answers.append(lambda _: RedirectResponse("https://elsewhere/v1")),
        {},
        "redirects to 'https://elsewhere/v1': give that address",
    ),
    "no list": (lambda server: server.answers.append(lambda _: JSONResponse({"ok": 1})), {}, "gives no list of models"),
    "no JSON": (lambda server: server.answers.append(lambda _: Response("fine")), {}, "something else than JSON"),
}


@pytest.mark.parametrize(("spoil", "options", "message"), WRONG.values(), ids=WRONG)
def test_connecting_says_what_is_wrong(
    spoil: Callable[[ModelServer], None],
    options: dict[str, Any],
    message: str,
    running_server: Running,
    folder: Path,
) -> None:
    spoil(running_server.server)
    before = set(threading.enumerate())
    with pytest.raises(RemoteError, match=message):
        Aligner.connect(running_server.url, folder, **options)
    assert "aligner" not in {thread.name for thread in set(threading.enumerate()) - before}


def test_a_wrong_path_and_an_empty_port_are_told_apart(running_server: Running, folder: Path) -> None:
    with pytest.raises(RemoteError, match=r"status 404 .Not Found.: expected the address .*/v1") as caught:
        Aligner.connect(running_server.url.removesuffix("/v1"), folder)
    assert caught.value.status == 404
    running_server.stop()
    with pytest.raises(RemoteError, match=r"cannot be reached .*: is a server running there") as caught:
        Aligner.connect(running_server.url, folder)
    assert caught.value.temporary
    running_server.start()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "localhost:8000"}, "url is 'localhost:8000', expected one that begins with http"),
        ({"url": []}, "at least one address"),
        ({"url": ["http://a/v1", "http://a/v1"]}, "none twice"),
        ({"concurrency": 0}, "concurrency is 0, expected above 0"),
        ({"silence": 0}, "silence is 0"),
        ({"patience": -1}, "patience is -1, expected at least 0"),
        ({"top_p": 0}, "top_p is 0"),
    ],
)
def test_an_option_out_of_range_is_refused(options: dict[str, Any], message: str, folder: Path) -> None:
    rest = {name: value for name, value in options.items() if name != "url"}
    with pytest.raises(InputError, match=message):
        Aligner.connect(options.get("url", "http://localhost:1/v1"), folder, **rest)


def test_a_misspelt_option_is_set_right(folder: Path) -> None:
    with pytest.raises(TypeError, match=r"Aligner\.connect got .* 'tempalte'; did you mean 'template'"):
        Aligner.connect("http://localhost:1/v1", folder, tempalte="x")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("deaf", "message"),
    [
        ({"logprobs", "logprob_token_ids"}, "has no log probabilities"),
        ({"return_token_ids"}, "text without token ids .`return_token_ids`"),
    ],
)
def test_a_server_that_lacks_something_is_told_so(
    deaf: set[str], message: str, server: ModelServer, remote: Aligner
) -> None:
    server.deaf = deaf
    with pytest.raises(RemoteError, match=message):
        remote.correct("q", ANSWER)


def test_a_server_without_explicit_log_probabilities_decides_the_same(
    server: ModelServer, remote: Aligner, local: FakeAligner
) -> None:
    inner = local.fake_model.rule

    def likely(tokens: list[int]) -> Any:  # as of a model that was trained to give verdicts
        said = inner(tokens)
        return said if isinstance(said, int) else {token: logit + 50 for token, logit in said.items()}

    server.model, server.deaf = FakeModel(likely), {"logprob_token_ids"}
    for answer in ("All is well.", ANSWER, "BAD"):
        assert remote.correct("q", answer).verdict == local.correct("q", answer).verdict


def test_what_the_server_says_of_a_request_that_fails_twice_is_handed_on(server: ModelServer, remote: Aligner) -> None:
    body = {"error": {"message": "out of \n memory", "type": "InternalServerError", "code": 500}}
    server.answers = [lambda request: JSONResponse(body, 500) if request.method == "POST" else None] * 3
    with pytest.raises(RemoteError, match=r"refuses the request .status 500.: out of memory$") as caught:
        remote.correct("q", ANSWER)
    assert (caught.value.status, caught.value.temporary, len(server.answers)) == (500, False, 1)
    server.answers.insert(0, lambda request: JSONResponse({"error": "your fault"}, 400))
    with pytest.raises(RemoteError, match=r"refuses the request .status 400.: your fault$"):
        remote.correct("q", ANSWER)
    assert remote.correct("q", ANSWER).corrected == EXPECTED  # a single status 500 does no harm
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.status) == (str(caught.value), 500)


def test_on_error_decides_of_a_server_that_is_gone(running_server: Running, folder: Path) -> None:
    with Aligner.connect(running_server.url, folder, patience=0) as aligner:
        running_server.stop()
        models = (GenericFakeChatModel(messages=iter([ANSWER])) for _ in range(2))
        chain = next(models) | AlignerRunnable(aligner, on_error="passthrough")
        message = chain.invoke("q")
        assert message.content == ANSWER
        assert "RemoteError" in message.response_metadata["aligner"]["reason"]
        with pytest.raises(RemoteError, match="cannot be reached"):
            (next(models) | AlignerRunnable(aligner)).invoke("q")
        running_server.start()


# --- what fails in passing is asked again ---------------------------------------------------------------


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_a_server_that_cannot_now_is_asked_again(status: int, server: ModelServer, remote: Aligner) -> None:
    server.answers = [lambda _: JSONResponse({"error": "busy"}, status, {"retry-after": "0.05"})] * 2
    assert remote.correct("q", ANSWER).corrected == EXPECTED
    assert not server.answers


def test_a_server_that_asks_to_wait_longer_than_anybody_would_is_an_error(server: ModelServer, remote: Aligner) -> None:
    server.answers = [lambda _: JSONResponse({"error": "come back"}, 429, {"retry-after": "3600"})]
    with pytest.raises(RemoteError, match=r"cannot serve now .status 429: come back") as caught:
        remote.correct("q", ANSWER)
    assert caught.value.retry_after == 3600


def test_a_stream_that_breaks_off_goes_on_from_its_tokens(server: ModelServer, remote: Aligner) -> None:
    server.break_after = [5, 0, 7]
    correction = remote.correct("q", ANSWER)
    assert correction.corrected == EXPECTED
    streams = [body for body in server.requests if body.get("stream")]
    lengths = [len(body["prompt"]) - len(streams[0]["prompt"]) for body in streams]
    assert lengths == [0, 5, 5, 10]  # four tokens come together, but for the first
    assert correction.usage.passes == 4  # the stream without a token was none


def test_a_server_that_starts_again_in_the_middle_loses_nothing(
    running_server: Running, server: ModelServer, folder: Path
) -> None:
    with Aligner.connect(running_server.url, folder, patience=30) as aligner, ThreadPoolExecutor(8) as pool:
        server.delay = 0.004
        calls = [pool.submit(aligner.correct, "q", f"{ANSWER} {number}.") for number in range(8)]
        until(lambda: server.running >= 4)
        running_server.stop()
        time.sleep(0.3)
        running_server.start()
        assert [call.result(60).corrected for call in calls] == [f"{EXPECTED} {number}." for number in range(8)]


def test_a_server_that_stays_away_is_an_error_after_some_patience(running_server: Running, folder: Path) -> None:
    with Aligner.connect(running_server.url, folder, patience=0.5) as aligner:
        running_server.stop()
        start = time.monotonic()
        with pytest.raises(RemoteError, match="cannot be reached"):
            aligner.correct("q", ANSWER)
        assert time.monotonic() - start < 10
        running_server.start()
        assert aligner.correct("q", ANSWER).corrected == EXPECTED


def test_a_server_that_says_nothing_is_given_up(server: ModelServer, running_server: Running, folder: Path) -> None:
    with Aligner.connect(running_server.url, folder, silence=0.2, patience=0) as aligner:
        server.delay = 30
        with pytest.raises(RemoteError, match=r"did not answer within 0\.2 seconds"):
            aligner.correct("q", ANSWER)
        until(lambda: not server.running)


# --- what nobody waits for is ended ---------------------------------------------------------------------


@pytest.mark.parametrize("answer", ["All is well.", ANSWER])
def test_a_call_that_is_given_up_ends_on_the_server(answer: str, server: ModelServer, remote: Aligner) -> None:
    server.delay = 0.5 if answer != ANSWER else 0.05

    asyncio.run(cancelled(remote, answer, lambda: server.running))
    until(lambda: not server.running)
    assert server.ended_early == 1
    with pytest.raises(CorrectionTimeoutError):
        remote.correct("q", answer, timeout=0.2)
    until(lambda: not server.running)
    assert server.ended_early == 2
    server.delay = 0
    assert remote.correct("q", answer).corrected == soften("q", answer)


def test_closing_ends_what_is_under_way(server: ModelServer, remote: Aligner) -> None:
    server.delay = 0.05
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(remote.correct, "q", ANSWER) for _ in range(4)]
        until(lambda: server.running == 4)
        remote.close()
        for call in calls:
            with pytest.raises(ClosedError, match="closed while a correction was under way"):
                call.result(20)
    until(lambda: not server.running)
    with pytest.raises(ClosedError, match="was closed"):
        remote.correct("q", ANSWER)


def test_64_at_once_get_each_their_own_and_no_more_than_are_allowed_run(
    server: ModelServer, running_server: Running, folder: Path
) -> None:
    server.delay = 0.001
    pairs = [(f"q{number}", f"Number {number}, an idiot.") for number in range(64)]
    with Aligner.connect(running_server.url, folder, concurrency=16) as aligner:
        done = asyncio.run(aligner.acorrect_batch(pairs))
    assert [one.corrected for one in done] == [f"Number {number}, an friend." for number in range(64)]
    assert 8 <= server.most <= 16


# --- the same to its users ------------------------------------------------------------------------------


def test_a_prompt_is_read_while_its_answer_is_written(server: ModelServer, remote: Aligner) -> None:
    long = "This is a sentence of many words. " * 12

    def chunks() -> Iterator[str]:
        for at in range(0, len(long), 20):
            yield long[at : at + 20]
            time.sleep(0.01)
        until(lambda: server.requests)
        yield "idiot"

    assert "".join(remote.stream("q", chunks())) == long + "friend"
    first = server.requests[0]
    assert (first["max_tokens"], len(first["prompt"])) == (
        1,
        len(server.requests[-2]["prompt"][: len(first["prompt"])]),
    )
    dropped = remote.read_ahead("q")
    dropped.feed(long)
    dropped.close()


def test_it_is_pickled_described_and_told_apart(remote: Aligner, running_server: Running) -> None:
    assert repr(remote) == f"Aligner('test', precision unknown, on vLLM 0.99 at {running_server.url})"
    assert remote.device == f"vLLM 0.99 at {running_server.url}"
    assert "the-aligner" in str(remote.identity)
    with pickle.loads(pickle.dumps(remote)) as again:
        assert again.identity == remote.identity
        assert again.correct("q", ANSWER).corrected == EXPECTED


def test_the_key_is_sent_and_may_come_from_the_environment(
    server: ModelServer, running_server: Running, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.key = "secret"
    monkeypatch.setenv("ALIGNER_API_KEY", "secret")
    with Aligner.connect(running_server.url, folder) as aligner:
        assert aligner.correct("q", ANSWER).corrected == EXPECTED
    assert "secret" not in repr(aligner)


def test_the_context_is_the_smaller_one(server: ModelServer, running_server: Running, folder: Path) -> None:
    server.max_model_len = 300
    with Aligner.connect(running_server.url, folder) as aligner:
        assert aligner.longest_answer("q") < 300
        assert aligner.correct("q", ANSWER).corrected == EXPECTED


def test_a_forked_process_and_the_end_of_python_need_no_help(running_server: Running, folder: Path) -> None:
    program = f"""
import os, sys
from aligner_middleware import Aligner
aligner = Aligner.connect({running_server.url!r}, {str(folder)!r})
assert aligner.correct("q", "an idiot").corrected == "an friend"
child = os.fork()
if not child:
    sys.exit(7 if aligner.correct("r", "an idiot").corrected == "an friend" else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert not {{"torch", "transformers", "onnxruntime"}} & set(sys.modules)
assert aligner.correct("q", "an idiot").changed
aligner.read_ahead("q").feed("An idiot, " * 50)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# --- several servers ------------------------------------------------------------------------------------


def test_an_answer_stays_with_one_server_and_load_is_shared(local: FakeAligner, folder: Path) -> None:
    servers = [ModelServer(local.fake_model, local._codec.tokenizer) for _ in range(2)]
    with (
        running(servers[0]) as one,
        running(servers[1]) as other,
        Aligner.connect([one.url, other.url], folder) as aligner,
    ):
        for number in range(6):
            assert aligner.correct("q", f"{ANSWER} {number}").changed
        for server in servers:
            assert len([body for body in server.requests if body.get("stream")]) * 2 == len(server.requests)
        for server in servers:
            server.delay = 0.005
        aligner.correct_batch([("q", f"{ANSWER} {number}") for number in range(12)])
        assert all(server.most >= 4 for server in servers)


def test_a_dead_server_is_left_out_until_it_is_back(local: FakeAligner, folder: Path) -> None:
    servers = [ModelServer(local.fake_model, local._codec.tokenizer) for _ in range(2)]
    pairs = [(f"What is {number} of all that there is?", ANSWER) for number in range(8)]
    with (
        running(servers[0]) as one,
        running(servers[1]) as other,
        Aligner.connect([one.url, other.url], folder, patience=10) as aligner,
    ):
        for server in servers:
            server.delay = 0.002
        with ThreadPoolExecutor(8) as pool:
            calls = [pool.submit(aligner.correct, *pair) for pair in pairs]
            until(lambda: servers[0].running and servers[1].running)
            one.stop()
            assert [call.result(60).corrected for call in calls] == [EXPECTED] * 8
        asked = len(servers[0].requests)
        assert aligner.correct_batch(pairs[:4])[0].corrected == EXPECTED
        assert len(servers[0].requests) == asked
        one.start()
        until(lambda: not any(server.down for server in aligner._scheduler._servers._all))  # type: ignore[attr-defined]
        aligner.correct_batch(pairs)
        assert len(servers[0].requests) > asked


def test_servers_of_which_one_is_away_can_be_connected_to_but_not_those_of_two_models(
    local: FakeAligner, folder: Path
) -> None:
    servers = [ModelServer(local.fake_model, local._codec.tokenizer) for _ in range(2)]
    with running(servers[0]) as one, running(servers[1]) as other:
        one.stop()
        with Aligner.connect([one.url, other.url], folder) as aligner:
            assert aligner.correct("q", ANSWER).corrected == EXPECTED
        one.start()
        servers[0].name = "another"
        with pytest.raises(RemoteError, match="different models, another, the-aligner: name the one by model="):
            Aligner.connect([one.url, other.url], folder)
