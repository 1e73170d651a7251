"""`aligner info` on the real default aligner."""

import json

from typer.testing import CliRunner

from aligner_middleware import Aligner
from aligner_middleware.cli.app import app


def test_it_shows_the_folder_and_where_it_runs(aligner: Aligner) -> None:
    shown = CliRunner().invoke(app, ["info"], catch_exceptions=False)
    assert shown.exit_code == 0
    for text in ("default", "int8", aligner.device, "agrees with PyTorch"):
        assert text in shown.output


def test_json_has_all_of_the_artifact(aligner: Aligner) -> None:
    told = json.loads(CliRunner().invoke(app, ["info", "--json"], catch_exceptions=False).stdout)
    assert (told["precision"], told["device"]) == ("int8", aligner.device)
    assert told["parity"]["same_argmax"] > 0.9
    assert set(told["files"]) == {"model.onnx", "tokenizer.json"}
