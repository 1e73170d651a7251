"""`aligner correct --url` and `aligner serve --aligner-url`: an aligner that a server runs."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from aligner_middleware.errors import RemoteError
from aligner_middleware.serve.problems import Problem
from aligner_middleware.serve.service import load_aligner
from aligner_middleware.serve.settings import ServeSettings
from tests.chat_server import ChatServer
from tests.fakes import judging_aligner
from tests.model_server import ModelServer, Running, running
from tests.unit.cli.running import Run, only_line
from tests.unit.remote.test_equal import folder_of, soften


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, Path]]:
    with judging_aligner(soften) as local, running(ModelServer(local.fake_model, local._codec.tokenizer)) as one:
        yield one, folder_of(local, tmp_path_factory.mktemp("aligner"))


def test_an_answer_is_corrected_on_the_server(run: Run, served: tuple[Running, Path]) -> None:
    one, folder = served
    outcome = run("correct", "-q", "q", "-a", "You idiot.", "--url", one.url, "--model", folder, "--json")
    assert outcome.exit_code == 0, outcome.output
    assert json.loads(outcome.stdout)["corrected"] == "You friend."
    assert one.server.requests


def test_an_address_without_a_server_is_one_line(run: Run, served: tuple[Running, Path]) -> None:
    options = ("--url", "http://127.0.0.1:9/v1", "--model", served[1])
    assert "127.0.0.1:9/v1/models cannot be reached" in only_line(run("correct", "-q", "q", "-a", "a", *options))


def test_a_server_runs_the_weights_that_it_has(run: Run, served: tuple[Running, Path]) -> None:
    outcome = run("correct", "-q", "q", "-a", "a", "--url", served[0].url, "--precision", "int8")
    assert outcome.exit_code == 2
    assert "--precision" in outcome.stderr


def test_the_service_connects_too_and_hides_the_address_from_its_clients(served: tuple[Running, Path]) -> None:
    one, folder = served
    with load_aligner(ServeSettings(aligner_url=(one.url,), model=str(folder))) as aligner:
        assert aligner.device == f"vLLM 0.99 at {one.url}"
    problem = Problem.of(RemoteError(f"{one.url} cannot be reached"))
    assert problem.status == 502
    assert one.url not in str(problem.body)


def test_a_chat_model_is_an_aligner_by_its_prompt(run: Run) -> None:
    server = ChatServer(soften)
    server.names = ["one", "other"]
    with running(server) as one:
        options = ("--url", one.url, "--model", "prompted")
        asked = ("correct", "-q", "q", "-a", "You idiot.", *options)
        assert "name one by model=, or by --url-model" in only_line(run(*asked))
        outcome = run(*asked, "--url-model", "other")
        assert (outcome.exit_code, outcome.stdout) == (0, "You friend.\n"), outcome.output
        assert {body["model"] for body in server.requests} == {"other"}
        settings = ServeSettings(aligner_url=(one.url,), aligner_url_model="one", model="prompted")
        with load_aligner(settings) as aligner:
            assert aligner.correct("q", "You idiot.").corrected == "You friend."


def test_a_model_of_a_server_needs_its_address(run: Run) -> None:
    outcome = run("correct", "-q", "q", "-a", "a", "--url-model", "other")
    assert outcome.exit_code == 2
    assert "--url-model" in outcome.stderr
