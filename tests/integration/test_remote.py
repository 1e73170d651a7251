"""A real vLLM server, which serves the default aligner in float32, beside the engine here in float32."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from remote import compare

from aligner_middleware import Aligner
from aligner_middleware.artifact import CALIBRATION_FILE, TOKENIZER_FILE
from aligner_middleware.checkpoints.checkpoint import CHECKPOINT_FILES, open_checkpoint
from aligner_middleware.errors import RemoteError
from aligner_middleware.locations import DEFAULT_FOLDER

OWN = Path(__file__).parents[2] / ".venv-vllm" / "bin" / "python"  # made by `make remote-test`
PYTHON = os.environ.get("ALIGNER_VLLM") or (str(OWN) if OWN.exists() else None)
START = 900  # seconds that a server may take on a busy machine
ROWS = int(os.environ.get("ALIGNER_REMOTE_ROWS", "200"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.remote,
    pytest.mark.skipif(PYTHON is None, reason="no vLLM: `make remote-test` installs it, ALIGNER_VLLM names its Python"),
]


class VLLMServer:
    """A process that listens on a port of its own; it may be killed and started again."""

    def __init__(self, checkpoint: Path, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self._log = log
        module = [
            "-m",
            "vllm.entrypoints.openai.api_server",
            "--model",
            str(checkpoint),
            "--served-model-name",
            "aligner",
        ]
        limits = ["--max-model-len", "2048", "--max-num-seqs", "16", "--max-num-batched-tokens", "2048"]
        own = ["--host", "127.0.0.1", "--port", str(self.port), "--dtype", "float32", "--enforce-eager"]
        self._command = [PYTHON or sys.executable, *module, *limits, *own]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        quiet = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
        environment = os.environ | quiet | {"TORCHDYNAMO_DISABLE": "1"}
        environment.pop("PYTHONPATH", None)
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def wait(self) -> None:
        """Wait until it answers; a server that cannot start here is none of ours to test."""
        end = time.monotonic() + START
        while time.monotonic() < end:
            try:
                if httpx.get(self.url.removesuffix("v1") + "health", timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(1)
            if self._process is None or self._process.poll() is not None:
                break
        lines = self._log.read_text(errors="replace").strip().splitlines()
        pytest.skip(f"vLLM does not start here: {lines[-1][:300] if lines else 'it says nothing'}")

    def kill(self) -> None:
        """End it and its workers at once."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default aligner, merged, as a folder that vLLM loads."""
    folder = tmp_path_factory.mktemp("checkpoint")
    source = open_checkpoint("default")
    source.load().save_pretrained(folder)
    for name in {*CHECKPOINT_FILES, TOKENIZER_FILE} - {"config.json"}:
        if (source.folder / name).is_file():
            shutil.copy(source.folder / name, folder / name)
    for name in ("training.json", CALIBRATION_FILE):
        shutil.copy(DEFAULT_FOLDER / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLLMServer]:
    one = VLLMServer(checkpoint, tmp_path_factory.mktemp("log") / "vllm.log")
    one.start()
    try:
        one.wait()
        yield one
    finally:
        one.kill()


@pytest.fixture(scope="module")
def remote(server: VLLMServer) -> Iterator[Aligner]:
    with Aligner.connect(server.url, patience=START, silence=600) as aligner:
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


def test_64_at_once_get_what_each_gets_alone(local: Aligner, remote: Aligner, pairs: list[tuple[str, str]]) -> None:
    many = [*pairs[:8]] * 8
    here = {pair: local.correct(*pair) for pair in many[:8]}
    for pair, there in zip(many, remote.correct_batch(many), strict=True):
        assert there.verdict == here[pair].verdict
        assert there.score == pytest.approx(here[pair].score, abs=1e-3)


def test_another_model_than_the_aligners_is_refused(server: VLLMServer) -> None:
    with pytest.raises(RemoteError, match="does not serve the model 'gpt', but 'aligner'"):
        Aligner.connect(server.url, model="gpt")


def test_a_server_that_is_killed_and_started_again_in_the_middle_loses_nothing(
    server: VLLMServer, local: Aligner, remote: Aligner, pairs: list[tuple[str, str]]
) -> None:
    changed = [pair for pair in pairs if local.correct(*pair).changed][:6]
    assert changed

    def restart() -> None:
        server.kill()
        server.start()

    again = threading.Timer(2.0, restart)
    again.start()
    done = remote.correct_batch(changed)
    again.join()
    server.wait()
    for pair, there in zip(changed, done, strict=True):
        assert (there.verdict, there.changed) == (local.correct(*pair).verdict, True)
