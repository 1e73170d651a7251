"""A real vLLM server on the CPU here, for tests that are marked `remote`; `make remote-test` installs it and runs them."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest

from aligner_middleware.data.files import is_file

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("VLLM_PYTHON", ROOT / ".venv-vllm" / "bin" / "python"))
MODEL = "aligner"  # the name by which requests ask for it
_START = 900  # seconds; on two busy cores vLLM's imports alone take a minute
_CONTEXT = 2048
_SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TORCHDYNAMO_DISABLE": "1",  # else the first request with log probabilities compiles for a minute
    "PYTHONPATH": str(ROOT),  # for our proposer, which vLLM imports by its name
}


@dataclass(frozen=True)
class VllmServer:
    """A server that answers.

    Attributes:
        url: Of its OpenAI API, with `/v1`.
        log: What it has printed.
    """

    url: str
    log: Path

    def complete(self, prompt: list[int], **options: Any) -> dict[str, Any]:
        """Ask for a greedy completion of token ids, and give its only choice, with `token_ids`."""
        body = {"model": MODEL, "prompt": prompt, "temperature": 0, "return_token_ids": True} | options
        request = urllib.request.Request(
            f"{self.url}/completions", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=300) as response:
            choice: dict[str, Any] = json.load(response)["choices"][0]
        return choice

    def metric(self, name: str) -> float:
        """Read one of its counters, such as `spec_decode_num_accepted_tokens_total`; 0 before it first counts."""
        with urllib.request.urlopen(f"{self.url.removesuffix('/v1')}/metrics", timeout=60) as response:
            text = response.read().decode()
        return sum(float(value) for value in re.findall(rf"(?m)^vllm:{name}\{{[^}}]*\}} (\S+)$", text))


@contextmanager
def serving(model: Path, log: Path, *options: str) -> Iterator[VllmServer]:
    """Serve a folder as long as the context lasts; the test is skipped, with the reason, where vLLM cannot.

    Args:
        model: A folder in the form of Hugging Face.
        log: File for what it prints.
        options: Further options of `vllm serve`.
    """
    if not is_file(PYTHON):
        pytest.skip(f"no vLLM at {PYTHON}: make remote-test installs one, or set VLLM_PYTHON")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Not `vllm serve`: the command looks for a package of that name, and the wheel for CPUs has another one.
    command = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--served-model-name", MODEL, "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--enforce-eager", "--max-model-len", str(_CONTEXT), "--max-num-batched-tokens", str(_CONTEXT)]
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*command, "--max-num-seqs", "16", *options],
            env=os.environ | _SETTINGS,
            cwd=log.parent,  # Python looks for packages there first
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait(process, f"http://127.0.0.1:{port}/health", log)
        yield VllmServer(f"http://127.0.0.1:{port}/v1", log)
    finally:
        _end(process)


def _wait(process: subprocess.Popen[bytes], health: str, log: Path) -> None:
    deadline = time.monotonic() + _START
    while time.monotonic() < deadline:
        if process.poll() is not None:
            lines = log.read_text(errors="replace").splitlines()
            reason = next((line for line in reversed(lines) if "Error" in line), (lines or ["it printed nothing"])[-1])
            pytest.skip(f"vLLM does not start here: {reason.strip()[-300:]}")
        try:
            with urllib.request.urlopen(health, timeout=5):
                return
        except (URLError, OSError):
            time.sleep(1)
    pytest.skip(f"vLLM did not start within {_START} seconds")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the server with its workers, which are its process group."""
    for number, patience in ((signal.SIGTERM, 60), (signal.SIGKILL, 10)):
        try:
            os.killpg(process.pid, number)
            process.wait(patience)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
