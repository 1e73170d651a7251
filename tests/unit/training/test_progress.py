"""Training: its settings load nothing heavy, and it reports its steps in the form of every job."""

import subprocess
import sys

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from aligner_middleware.data.progress import Progress
from aligner_middleware.training.trainer import Reporter

ARGUMENTS, CONTROL = TrainingArguments(report_to=[], use_cpu=True), TrainerControl()


def test_settings_are_read_without_torch_or_onnx() -> None:
    code = (
        "import sys; from aligner_middleware.training import PolicyConfig, Stage, TrainConfig; TrainConfig();"
        "print([name for name in ('torch', 'transformers', 'onnx', 'onnxruntime', 'peft') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == "[]", result.stderr


def test_every_public_name_of_training_is_there() -> None:
    from aligner_middleware import training

    for name in training.__all__:
        assert getattr(training, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'Progress'"):
        _ = training.Progress


@pytest.mark.parametrize(
    ("seconds", "details"),
    [(0.1, ["loss 0.500", "loss 0.250"]), (10, ["loss 0.500", "loss 0.250, 30 tokens/s"])],
)
def test_a_step_is_reported_with_its_loss_and_after_a_second_its_speed(
    seconds: float, details: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter([100.0, 100.0 + seconds])
    monkeypatch.setattr("time.monotonic", lambda: next(times))
    reports: list[Progress] = []
    reporter = Reporter("correction", reports.append)
    for step in (1, 2):
        state = TrainerState(global_step=step, max_steps=4, num_input_tokens_seen=300 * step)
        reporter.on_log(ARGUMENTS, state, CONTROL, logs={"loss": 1 / 2**step})
    assert reports == [Progress("correction", step, 4, detail) for step, detail in enumerate(details, 1)]


def test_a_resumed_stage_is_reported_first_with_the_steps_left() -> None:
    reports: list[Progress] = []
    reporter = Reporter("warm_up", reports.append)
    reporter.on_train_begin(ARGUMENTS, TrainerState(global_step=60, max_steps=600), CONTROL)
    assert reports == [Progress("warm_up", 60, 600, "resumes after step 60, 540 steps left")]


def test_other_processes_and_fresh_stages_report_no_start() -> None:
    reports: list[Progress] = []
    reporter = Reporter("warm_up", reports.append)
    reporter.on_train_begin(ARGUMENTS, TrainerState(global_step=0, max_steps=600), CONTROL)
    reporter.on_train_begin(
        ARGUMENTS, TrainerState(global_step=60, max_steps=600, is_world_process_zero=False), CONTROL
    )
    assert reports == []
