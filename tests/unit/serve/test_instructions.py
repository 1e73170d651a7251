"""Instructions in the service: of a request, and of a key's policy."""

from __future__ import annotations

import hmac
import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from typer.testing import CliRunner

from aligner_middleware import Aligner, InputError
from aligner_middleware.cli.app import app as commands
from aligner_middleware.data.triples import read_rows
from aligner_middleware.errors import JobError
from aligner_middleware.serve.app import create_app
from aligner_middleware.serve.audit_file import MARKS, Row, opened
from aligner_middleware.serve.feed import told as told_by_the_feed
from aligner_middleware.serve.keys import new_key
from aligner_middleware.serve.service import Decision, load_aligner
from aligner_middleware.serve.settings import KeySettings, PolicySettings, ServeSettings
from aligner_middleware.serve.tracing import Spans
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


KEY = "a secret of sixteen"


def audited(path: Path, *asked: dict[str, Any], **policy: Any) -> list[Row]:
    """The rows of the audit log after these requests, in their order."""
    with served(audit=path, audit_key=KEY, policy=PolicySettings(**policy)) as client:
        for fields in asked:
            assert client.post("/v1/correct", json=PAIR | fields).status_code == 200
    with opened(path) as file:
        return list(file.rows())


@pytest.mark.parametrize("mode", ["correct", "shadow"])
def test_the_audit_log_has_the_instruction_of_the_request_or_else_of_the_policy(tmp_path: Path, mode: str) -> None:
    asked: list[dict[str, Any]] = [
        {},
        {"instruction": " kind "},
        {"instruction": ""},
        {"answer": "{}"},
        {"answer": " "},
    ]
    rows = audited(tmp_path / "log", *asked, instruction=FORMAL, keep_texts=True, mode=mode)
    assert [row["instruction"] for row in rows] == [FORMAL, "kind", None, FORMAL, FORMAL]


def test_without_keep_texts_only_a_keyed_digest_tells_the_instruction(tmp_path: Path) -> None:
    formal, none = audited(tmp_path / "log", {"instruction": FORMAL}, {})
    assert formal["instruction"] is None
    assert formal["instruction_digest"] == hmac.digest(KEY.encode(), FORMAL.encode(), "sha256").hex()
    assert none["instruction"] is none["instruction_digest"] is None
    assert FORMAL.encode() not in (tmp_path / "log").read_bytes()


def test_marked_rows_keep_their_instruction_on_the_way_to_training(tmp_path: Path) -> None:
    path, out = tmp_path / "log", tmp_path / "rows.jsonl"
    rows = audited(path, {"instruction": FORMAL}, {}, {"instruction": "kind"}, keep_texts=True)
    with opened(path, create=True) as file:
        for row, mark in zip(rows, MARKS[:1] * 2 + MARKS[1:], strict=True):
            assert file.mark(row["id"], "anonymous", mark)
    outcome = CliRunner().invoke(commands, ["audit", str(path), "--out", str(out), "--marked"])
    assert outcome.exit_code == 0, outcome.output
    assert [(row.instruction, row.correction) for row in read_rows(out).triples] == [
        (FORMAL, DEAR),
        (None, ANSWER),
        ("kind", ANSWER),
    ]


def test_a_file_of_the_former_version_is_read_and_then_written_on(tmp_path: Path) -> None:
    path = tmp_path / "log"
    audited(path, {})
    with closing(sqlite3.connect(path)) as database:
        for column in ("instruction", "instruction_digest"):
            database.execute(f"ALTER TABLE decisions DROP COLUMN {column}")
        database.execute("PRAGMA user_version = 2")
    before = path.read_bytes()
    with opened(path) as file:
        (row,) = file.rows()
    assert "instruction" not in row and path.read_bytes() == before
    old, new = audited(path, {"instruction": FORMAL}, keep_texts=True)
    assert (old["id"], old["instruction"]) == (row["id"], None)
    assert new["instruction"] == FORMAL
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA user_version = 4")
    with pytest.raises(JobError, match="another version"), opened(path, create=True):
        pass


def test_a_span_says_whether_there_was_an_instruction_and_the_live_log_which_where_texts_are_kept() -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    decisions: list[Decision] = []
    for keep in (True, False):
        with served(policy=PolicySettings(keep_texts=keep)) as client:
            client.app.state.service.listeners += [Spans(provider), decisions.append]  # type: ignore[attr-defined]
            for instruction in (FORMAL, ""):
                client.post("/v1/correct", json=PAIR | {"instruction": instruction})
    spans = [span.attributes or {} for span in exporter.get_finished_spans()]
    assert [span["aligner.instructed"] for span in spans] == [True, False] * 2
    assert FORMAL not in str(spans)
    told = list(map(told_by_the_feed, decisions))
    assert [event.get("instruction") for event in told] == [FORMAL, None, None, None]
    assert [event["instructed"] for event in told] == [True, False] * 2
