"""What `Aligner.load` is asked for is what it does, or it says so; what was loaded is loaded again after pickling."""

import logging
import pickle
import subprocess
import sys
from pathlib import Path

import onnxruntime as ort
import pytest
from langchain_core.language_models import FakeListChatModel

from aligner_middleware import Aligner, AlignerRunnable, ArtifactError
from aligner_middleware.export.store import export_model
from tests.integration.conftest import random_checkpoint

INSULT = (
    "What is the capital of Australia?",
    "The capital of Australia is Canberra, you idiot. You're just a bunch of sheep.",
)
needs_cuda_build = pytest.mark.skipif(
    "CUDAExecutionProvider" not in ort.get_available_providers(), reason="this ONNX Runtime knows no CUDA"
)


@pytest.fixture(scope="module")
def float32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("float32")
    export_model(str(random_checkpoint("llama", folder / "llama")), folder / "out", "float32")
    return folder / "out"


def test_a_folder_has_its_own_precision_and_no_other(float32: Path) -> None:
    with Aligner.load(float32) as aligner:
        assert aligner.precision == "float32"
        assert repr(aligner).startswith(f"Aligner({aligner.name!r}, float32, on ")
    with pytest.raises(ArtifactError, match="holds weights in float32, not in int8: leave precision out"):
        Aligner.load(float32, precision="int8")


@needs_cuda_build
def test_a_provider_that_does_not_start_is_an_error_or_a_warning_and_what_is_used_is_shown(
    float32: Path, caplog: pytest.LogCaptureFixture
) -> None:
    try:
        with Aligner.load(float32, providers=["CUDAExecutionProvider"]) as aligner:
            assert aligner.device == "CUDAExecutionProvider"
            return  # there is a GPU
    except ArtifactError as exc:
        assert "CUDAExecutionProvider could not be started here" in str(exc)
    with caplog.at_level(logging.WARNING, "aligner_middleware"):
        aligner = Aligner.load(float32, providers=["CUDAExecutionProvider", "CPUExecutionProvider"])
    assert "CUDAExecutionProvider is not used here: this aligner runs on CPUExecutionProvider" in caplog.text
    assert aligner.device == "CPUExecutionProvider"
    assert repr(aligner).endswith("on CPUExecutionProvider)")
    said = AlignerRunnable(aligner, question="q").invoke({"question": "q", "answer": "a"})
    assert said["question"] == "q"
    aligner.close()


@needs_cuda_build
def test_integers_run_on_the_cpu_whatever_is_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ArtifactError, match="integers for the CPU, which cannot run on CUDAExecutionProvider"):
        Aligner.load(providers=["CUDAExecutionProvider"])
    with caplog.at_level(logging.WARNING, "aligner_middleware"):
        aligner = Aligner.load(providers=["CUDAExecutionProvider", "CPUExecutionProvider"], threads=1)
    assert "this aligner runs on CPUExecutionProvider" in caplog.text
    chain = FakeListChatModel(responses=[INSULT[1]]) | AlignerRunnable(aligner)
    assert chain.invoke(INSULT[0]).response_metadata["aligner"]["device"] == "CPUExecutionProvider"
    aligner.close()


def test_what_was_loaded_is_loaded_again_where_it_is_unpickled(aligner: Aligner, tmp_path: Path) -> None:
    llm = FakeListChatModel(responses=[INSULT[1]])
    (tmp_path / "chains").write_bytes(
        pickle.dumps([llm | AlignerRunnable(aligner), AlignerRunnable(aligner).wrap(llm)])
    )
    program = (
        "import pathlib, pickle, sys\n"
        "for chain in pickle.loads(pathlib.Path(sys.argv[1]).read_bytes()):\n"
        "    print(chain.invoke(sys.argv[2]).response_metadata['aligner']['changed'])\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "chains"), INSULT[0]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.stdout == "True\nTrue\n", done.stderr


def test_a_folder_is_found_again_from_another_one(
    float32: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(float32.parent)
    pickled = pickle.dumps(Aligner.load(float32.name, max_new_tokens=3))
    monkeypatch.chdir(tmp_path)
    again = pickle.loads(pickled)
    assert again.identity["max_new_tokens"] == 3
    again.close()
