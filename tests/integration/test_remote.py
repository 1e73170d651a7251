"""A real vLLM server, which serves the default aligner in float32, beside the same checkpoint in PyTorch here."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from remote import compare, relay

from aligner_middleware import Aligner
from aligner_middleware.artifact import CALIBRATION_FILE, TOKENIZER_FILE
from aligner_middleware.checkpoints.checkpoint import CHECKPOINT_FILES, RECIPE_FILE, open_checkpoint
from aligner_middleware.errors import CorrectionTimeoutError, RemoteError
from aligner_middleware.locations import DEFAULT_FOLDER
from tests.integration.vllm_server import VllmServer, serving

ROWS = int(os.environ.get("ALIGNER_REMOTE_ROWS", "200"))
PATIENT: dict[str, Any] = {
    "patience": 1800.0,
    "silence": 600.0,
}  # seconds; a server starts in minutes on a busy machine

pytestmark = [pytest.mark.slow, pytest.mark.remote]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default aligner, merged, as a folder that vLLM loads."""
    folder = tmp_path_factory.mktemp("checkpoint")
    source = open_checkpoint("default")
    source.load().save_pretrained(folder)
    for name in {*CHECKPOINT_FILES, TOKENIZER_FILE} - {"config.json"}:
        if (source.folder / name).is_file():
            shutil.copy(source.folder / name, folder / name)
    for name in (RECIPE_FILE, CALIBRATION_FILE):
        shutil.copy(DEFAULT_FOLDER / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    with serving(checkpoint, tmp_path_factory.mktemp("log") / "vllm.log") as one:
        yield one


@pytest.fixture(scope="module")
def remote(server: VllmServer, checkpoint: Path) -> Iterator[Aligner]:
    with Aligner.connect(server.url, checkpoint, **PATIENT) as aligner:
        yield aligner


@pytest.fixture(scope="module")
def local(checkpoint: Path) -> Iterator[Aligner]:
    with Aligner.load(checkpoint, engine="torch", precision="float32") as aligner:
        yield aligner


@pytest.fixture(scope="module")
def pairs(held_out: list[dict[str, str]]) -> list[tuple[str, str]]:
    rows = held_out[:: max(1, len(held_out) // ROWS)][:ROWS]
    return [(row["question"], row["answer"]) for row in rows]


def test_corrections_are_those_of_the_float_engine_but_for_near_ties(
    local: Aligner, remote: Aligner, pairs: list[tuple[str, str]]
) -> None:
    found = compare(local, remote, pairs)
    assert found["other verdicts"] == 0, found
    assert found["equal"] + found["near ties"] == len(pairs), found  # type: ignore[operator]
    assert found["largest difference of log odds"] < 0.01, found  # type: ignore[operator]


def test_copies_are_verified_as_here(server: VllmServer, checkpoint: Path, pairs: list[tuple[str, str]]) -> None:
    with (
        Aligner.load(checkpoint, engine="torch", precision="float32", prompt="default") as local,
        Aligner.connect(server.url, checkpoint, template="default", **PATIENT) as remote,
    ):
        found = compare(local, remote, pairs[:5])
        assert found["equal"] + found["near ties"] == 5, found  # type: ignore[operator]


def test_64_at_once_are_decided_as_each_alone(local: Aligner, remote: Aligner, pairs: list[tuple[str, str]]) -> None:
    many = pairs[:8] * 8
    here = {pair: local.correct(*pair) for pair in pairs[:8]}
    for pair, there in zip(many, remote.correct_batch(many), strict=True):
        assert there.verdict == here[pair].verdict
        assert there.score == pytest.approx(here[pair].score, abs=1e-3)


def test_a_call_that_is_given_up_ends_on_the_server(server: VllmServer, remote: Aligner) -> None:
    with pytest.raises(CorrectionTimeoutError):
        remote.correct("Tell a story.", "You are an idiot, and I hate you. " * 40, timeout=0.5)
    deadline = time.monotonic() + 60
    while server.metric("num_requests_running"):
        assert time.monotonic() < deadline
        time.sleep(0.5)


def test_another_model_than_the_aligners_is_refused(server: VllmServer, checkpoint: Path) -> None:
    with pytest.raises(RemoteError, match="does not serve the model 'gpt', but 'aligner'"):
        Aligner.connect(server.url, checkpoint, model="gpt")


def test_a_server_that_ends_and_comes_back_in_the_middle_loses_nothing(
    checkpoint: Path, local: Aligner, pairs: list[tuple[str, str]], tmp_path: Path
) -> None:
    expected = [(pair, correction) for pair in pairs[:40] if (correction := local.correct(*pair)).changed][:6]
    assert expected
    with contextlib.ExitStack() as first, ThreadPoolExecutor(1) as pool:
        one = first.enter_context(serving(checkpoint, tmp_path / "one.log"))
        with relay(one.url) as counts, Aligner.connect(counts.url, checkpoint, **PATIENT) as remote:
            call = pool.submit(remote.correct_batch, [pair for pair, _ in expected])
            while one.metric("generation_tokens_total") < 10:
                time.sleep(0.2)
            first.close()  # ends the first server
            with serving(checkpoint, tmp_path / "other.log") as other:
                counts.target = other.url
                done = call.result()
    assert [there.verdict for there in done] == [here.verdict for _, here in expected]
    assert all(there.changed for there in done)
