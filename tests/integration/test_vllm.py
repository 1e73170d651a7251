"""The exported checkpoint and our proposer in a stock vLLM server on this CPU: `make remote-test`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from aligner_middleware import Aligner
from aligner_middleware.artifact import CheckpointArtifact
from aligner_middleware.checkpoints.base import base_folder
from aligner_middleware.export.store import export_checkpoint
from aligner_middleware.text.template import PromptTemplate, encode_prompt
from tests.integration.vllm_server import VllmServer, serving

pytestmark = [pytest.mark.slow, pytest.mark.remote]
PROPOSER = '{"method": "custom_class", "model": "aligner_middleware.vllm.AnswerProposer", "num_speculative_tokens": 64}'
REPEAT = PromptTemplate(
    name="repeat",
    text="<|im_start|>user\nRepeat the text below, word for word. {question}\n\n{answer}<|im_end|>\n"
    "<|im_start|>assistant\n",
    special_tokens=("<|im_start|>", "<|im_end|>"),
    bos=False,
    end_token="<|im_end|>",
)
TEXTS = [
    "Boil the eggs for eight minutes. Put them into cold water then, and peel them under the tap.",
    "The library opens at nine. On Sundays it is closed. Bring your card.",
    "Water the plants in the evening, when the sun is low, and not at noon.",
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default aligner, merged."""
    folder = tmp_path_factory.mktemp("vllm") / "default"
    export_checkpoint("default", folder)
    return folder


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[VllmServer]:
    with serving(checkpoint, checkpoint.parent / "vllm.log") as running:
        yield running


def test_vllm_decides_and_corrects_as_pytorch_does_here(
    server: VllmServer, checkpoint: Path, held_out: list[dict[str, str]]
) -> None:
    artifact = CheckpointArtifact.load(checkpoint)
    tokenizer = artifact.tokenizer(checkpoint)
    assert artifact.verdict_ids is not None
    with Aligner.load(checkpoint, engine="torch") as reference:
        for row in held_out[:: len(held_out) // 6][:6]:
            prompt = encode_prompt(tokenizer, artifact.template, row["question"], row["answer"])
            verdicts = {"logprobs": 0, "logprob_token_ids": list(artifact.verdict_ids)}
            found = server.complete(prompt, max_tokens=1, return_tokens_as_token_ids=True, **verdicts)
            logs = found["logprobs"]["top_logprobs"][0]
            keep, *others = (logs[f"token_id:{token}"] for token in artifact.verdict_ids)
            expected = reference.correct(row["question"], row["answer"])
            assert artifact.calibration is not None
            log_odds = float(np.logaddexp(*others) - keep)
            score = 1 / (1 + np.exp(-(artifact.calibration.scale * log_odds + artifact.calibration.bias)))
            assert score == pytest.approx(expected.score, abs=0.01)


def test_the_answers_tokens_are_drafted_and_change_no_greedy_text(tmp_path: Path) -> None:
    base, _ = base_folder()
    export_checkpoint(str(base), tmp_path / "repeating", template=REPEAT)
    artifact = CheckpointArtifact.load(tmp_path / "repeating")
    tokenizer = artifact.tokenizer(tmp_path / "repeating")
    prompts = [encode_prompt(tokenizer, REPEAT, "Add nothing.", text) for text in TEXTS]
    network: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "repeating", dtype=torch.float32)
    expected = [
        network.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=60)[
            0, len(prompt) :
        ].tolist()
        for prompt in prompts
    ]
    with serving(tmp_path / "repeating", tmp_path / "vllm.log", "--speculative-config", PROPOSER) as server:
        assert [server.complete(prompt, max_tokens=60)["token_ids"] for prompt in prompts] == expected
        assert server.metric("spec_decode_num_accepted_tokens_total") > 0.5 * sum(map(len, expected))
