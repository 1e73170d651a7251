"""An aligner here, and the same one behind a small server."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from aligner_middleware import Aligner
from tests.fakes import FakeAligner, judging_aligner
from tests.model_server import Kind, ModelServer, Running, running
from tests.unit.remote.test_equal import folder_of, soften


@pytest.fixture(scope="module")
def local() -> Iterator[FakeAligner]:
    with judging_aligner(soften) as aligner:
        yield aligner


@pytest.fixture(scope="module")
def folder(local: FakeAligner, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(local, tmp_path_factory.mktemp("aligner"))


@pytest.fixture
def kind() -> Kind:
    """The server's software; a file for another one gives that."""
    return "vllm"


@pytest.fixture
def running_server(local: FakeAligner, kind: Kind) -> Iterator[Running]:
    with running(ModelServer(local.fake_model, local._codec.tokenizer, kind)) as one:
        yield one


@pytest.fixture
def server(running_server: Running) -> ModelServer:
    return running_server.server


@pytest.fixture
def remote(running_server: Running, folder: Path) -> Iterator[Aligner]:
    with Aligner.connect(running_server.url, folder, patience=5) as aligner:
        yield aligner
