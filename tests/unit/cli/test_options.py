"""Options and commands: those generated from settings, those that were renamed, and misspellings."""

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from pydantic import BaseModel

from aligner_middleware.cli.app import app
from aligner_middleware.evaluation.stop_rules import StopRules
from aligner_middleware.training.config import PolicyConfig, Stage, TrainConfig
from tests.unit.cli.running import Run, jsonl, pair


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["corect"], "correct"),
        (["correct", "--answr", "a"], "--answer"),
        (["correct", "--precision", "imt8"], "int8"),
        (["correct", "--strength", "hihg"], "high"),
        (["correct", "--mode", "shadwo"], "shadow"),
        (["correct", "--on-doubt", "pasthrough"], "passthrough"),
        (["preferences", "prompts", "out", "--form", "mesages"], "messages"),
        (["train", "rows", "out", "--method", "loar"], "lora"),
        (["train", "rows", "out", "--edits", "opperations"], "operations"),
    ],
)
def test_what_is_misspelt_gets_the_nearest_name(run: Run, arguments: list[str], meant: str) -> None:
    outcome = run(*arguments)
    assert outcome.exit_code == 2
    said = " ".join(outcome.stderr.replace("│", " ").split())
    assert re.search(rf"(did you mean|possible options:) {meant}", said.lower().replace("'", ""))


# --- options that are generated from settings


def options_of(command: str) -> dict[str, Any]:
    commands: Any = typer.main.get_command(app)
    return {option: one for one in commands.commands[command].params for option in one.opts}


@pytest.mark.parametrize(
    ("command", "model"),
    [("train", TrainConfig), ("train", Stage), ("rounds", PolicyConfig), ("rounds", StopRules)],
)
def test_every_setting_is_an_option_with_its_description(command: str, model: type[BaseModel]) -> None:
    options = options_of(command)
    names = {"base": "policy"} if model is PolicyConfig else {}
    for name, field in model.model_fields.items():
        if field.annotation is not Stage:
            option = options["--" + names.get(name, name).replace("_", "-")]
            assert field.description
            assert option.help.startswith(field.description)


@pytest.fixture
def config_of(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., TrainConfig]:
    """Gives the settings that `aligner train` trains with."""
    configs: list[TrainConfig] = []

    def train(rows: Any, out: Any, config: TrainConfig, **options: Any) -> Any:
        configs.append(config)
        return SimpleNamespace(rows=1, rows_left_out=0, losses={})

    monkeypatch.setattr("aligner_middleware.training.train", train)
    rows = jsonl(tmp_path / "rows.jsonl", pair() | {"correction": "c"})

    def config(*arguments: Any) -> TrainConfig:
        outcome = run("train", rows, tmp_path / "out", *arguments)
        assert outcome.exit_code == 0, outcome.output
        return configs.pop()

    return config


def test_a_command_without_options_has_the_defaults_of_the_settings(config_of: Callable[..., TrainConfig]) -> None:
    assert config_of() == TrainConfig()


def test_options_set_the_settings_and_those_of_the_stages(config_of: Callable[..., TrainConfig]) -> None:
    config = config_of(
        *("--warm-up-epochs", 0, "--epochs", 2, "--identity-share", 0.1, "--learning-rate", 1e-4),
        *("--schedule", "linear", "--weight-decay", 0.1, "--no-verdict", "--bfloat16", "--checkpointing"),
    )
    assert config == TrainConfig(
        warm_up=Stage(epochs=0, identity_share=1.0, learning_rate=1e-4, schedule="linear"),
        correction=Stage(epochs=2, identity_share=0.1, learning_rate=1e-4, schedule="linear"),
        weight_decay=0.1,
        verdict=False,
        bfloat16=True,
        checkpointing=True,
    )


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("train", ["--warm-up-epochs", "-1"]),
        ("train", ["--learning-rate", "0"]),
        ("train", ["--lora-dropout", "1"]),
        ("rounds", ["--top-p", "2"]),
        ("rounds", ["--max-kl", "0"]),
        ("rounds", ["--length", "1"]),
    ],
)
def test_a_value_out_of_bounds_is_an_error_that_names_its_option(run: Run, command: str, arguments: list[str]) -> None:
    outcome = run(command, "rows", "out", *arguments)
    assert outcome.exit_code == 2
    assert arguments[0] in outcome.stderr


# --- commands that have another name now


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["ability", "gsm8k", "--limit", "3", "--json"], "aligner benchmark"),
        (["ability", "--help"], "aligner benchmark"),
        (["evaluate", "prompts", "--upstream", "openai:gpt-5", "--concurrency", "4"], "aligner compare"),
        (["evaluate", "prompts", "--judge", "openai:gpt-5", "--out", "report"], "aligner compare"),
        (["evaluate", "prompts", "--pairwise"], "aligner compare"),
    ],
)
def test_a_former_command_names_the_present_one_in_one_line(run: Run, arguments: list[str], name: str) -> None:
    outcome = run(*arguments)
    assert outcome.exit_code == 2
    (line,) = outcome.stderr.splitlines()
    assert name in line
    assert outcome.stdout == ""
