"""Instructions in the service: of a request, and of a key's policy."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from fastapi.testclient import TestClient

from aligner_middleware import Aligner, InputError
from aligner_middleware.serve.app import create_app
from aligner_middleware.serve.keys import new_key
from aligner_middleware.serve.service import load_aligner
from aligner_middleware.serve.settings import KeySettings, PolicySettings, ServeSettings
from tests.fakes import (
    fake_aligner,
    instructed_aligner,
)

FORMAL = "formal"
ANSWER = "hey, it rains"


def told(instruction: str, question: str, answer: str) -> str:
    """Correct `hey` by the instruction, and not at all without one."""
    return answer.replace("hey", {"": "hey", FORMAL: "Dear all"}.get(instruction, instruction))


PAIR = {"question": "q", "answer": ANSWER}
DEAR = "Dear all, it rains"


@contextmanager
def served(own: Aligner | None = None, **settings: Any) -> Iterator[TestClient]:
    with (
        own or instructed_aligner(told) as aligner,
        TestClient(create_app(ServeSettings(**settings), aligner)) as client,
    ):
        yield client


def test_a_request_gives_an_instruction() -> None:
    with served() as client:
        reply = client.post("/v1/correct", json=PAIR | {"instruction": FORMAL}).json()
        assert (reply["corrected"], reply["instruction"]) == (DEAR, FORMAL)
        assert client.post("/v1/correct", json=PAIR).json()["corrected"] == ANSWER
        batch = client.post("/v1/correct/batch", json={"items": [PAIR], "instruction": FORMAL}).json()
        assert batch["results"][0]["result"]["corrected"] == DEAR
        lines = client.post("/v1/correct", json=PAIR | {"instruction": FORMAL, "stream": True}).text.splitlines()
        assert json.loads(lines[-1])["corrected"] == DEAR


def test_a_key_has_an_instruction_in_its_policy() -> None:
    key, digest = new_key()
    other, other_digest = new_key()
    keys = (
        KeySettings(name="press", sha256=digest, instruction=FORMAL, overrides=False),
        KeySettings(name="other", sha256=other_digest),
    )

    def ask(key: str, **fields: Any) -> Any:
        return client.post("/v1/correct", json=PAIR | fields, headers={"Authorization": f"Bearer {key}"})

    with served(keys=keys) as client:
        assert (ask(key).json()["corrected"], ask(other).json()["corrected"]) == (DEAR, ANSWER)
        refused = ask(key, instruction="kind")
        assert (refused.status_code, refused.json()["error"]["param"]) == (403, "instruction")
    with served(policy=PolicySettings(instruction=FORMAL)) as client:
        assert client.post("/v1/correct", json=PAIR | {"instruction": ""}).json()["corrected"] == ANSWER


def test_the_service_refuses_an_instruction_that_its_aligner_was_not_trained_with() -> None:
    with served(fake_aligner(lambda q, a: a)) as client:
        reply = client.post("/v1/correct", json=PAIR | {"instruction": FORMAL})
        assert reply.status_code == 400
        assert "not trained with instructions" in reply.json()["error"]["message"]


def test_the_service_does_not_start_with_a_policy_that_its_aligner_cannot_follow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Aligner, "load", lambda *args, **options: fake_aligner(lambda q, a: a))
    key = KeySettings(name="press", sha256=new_key()[1], instruction=FORMAL)
    for settings in (ServeSettings(policy=PolicySettings(instruction=FORMAL)), ServeSettings(keys=(key,))):
        with pytest.raises(InputError, match=r"the policy of '(anonymous|press)': .*not trained with instructions"):
            load_aligner(settings)
