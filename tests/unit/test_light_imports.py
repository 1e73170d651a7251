"""Settings and metrics load in a fresh process without what trains, builds and serves."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "onnx", "onnxruntime", "transformers")


@pytest.mark.parametrize(
    "module",
    [
        "aligner_middleware.training.config",
        "aligner_middleware.evaluation",
        "aligner_middleware.evaluation.policy_metrics",
        "aligner_middleware.checkpoints.base",
        "aligner_middleware.vllm",
    ],
)
def test_a_light_module_loads_nothing_heavy(module: str) -> None:
    program = f"import sys, {module}\nprint([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "[]\n", done.stderr


def test_every_public_name_of_evaluation_is_there() -> None:
    from aligner_middleware import evaluation

    for name in evaluation.__all__:
        assert getattr(evaluation, name).__name__ == name
    assert dir(evaluation) == sorted(evaluation.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Compared'"):
        evaluation.__getattr__("Compared")
