"""Metrics, spans, the audit log with its export, and the page's routes."""

from __future__ import annotations

import hmac
import stat
import threading
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from typer.testing import CliRunner

from aligner_middleware.cli.app import app as commands
from aligner_middleware.data.triples import read_rows
from aligner_middleware.errors import JobError
from aligner_middleware.evaluation.labelled_rows import read_labelled
from aligner_middleware.langchain.outcome import Aligned
from aligner_middleware.serve.app import create_app
from aligner_middleware.serve.audit import AuditLog
from aligner_middleware.serve.audit_file import AuditFile, opened
from aligner_middleware.serve.keys import new_key
from aligner_middleware.serve.service import Decision, Service
from aligner_middleware.serve.settings import KeySettings, PolicySettings, ServeSettings
from aligner_middleware.serve.tracing import Spans
from tests.fakes import judging_aligner

RUDE = "Boil it. Even a moron can."
ALIGNER = judging_aligner(lambda question, answer: answer.replace(" Even a moron can.", ""))


def client_of(**settings: Any) -> TestClient:
    return TestClient(create_app(ServeSettings(**settings), ALIGNER))


def decision(keep: bool = True, question: str = "How?", answer: str = RUDE, text: str = "Boil it.") -> Decision:
    client = Service(ServeSettings(policy=PolicySettings(keep_texts=keep)), ALIGNER).client(None)
    changed = text != answer
    metadata = {"aligned": True, "changed": changed, "verdict": "edit" if changed else "keep", "score": 0.9}
    return Decision(client, "/v1/correct", question, answer, text, metadata, 0.1)


def ask(client: TestClient, **more: Any) -> Any:
    return client.post("/page/correct", json={"question": "How?", "answer": RUDE} | more)


def test_metrics_count_verdicts_and_routes_by_their_templates() -> None:
    with client_of() as client:
        assert ask(client).status_code == 200
        assert client.get("/no/such/path").status_code == 404
        text = client.get("/metrics").text
    assert 'aligner_requests_total{route="/page/correct",status="200"} 1.0' in text
    assert 'aligner_requests_total{route="other",status="404"} 1.0' in text
    assert 'aligner_verdicts_total{client="anonymous",verdict="' in text
    assert "aligner_score_count 1.0" in text and "/no/such" not in text


def test_a_span_has_the_facts_and_no_text() -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    Spans(provider)(decision())
    (span,) = exporter.get_finished_spans()
    values = dict(span.attributes or {})
    assert values["aligner.verdict"] == "edit" and values["aligner.changed"] is True
    assert "moron" not in str(values)
    assert span.start_time and span.end_time and span.end_time - span.start_time == 100_000_000


def test_all_that_waits_is_written_at_the_close_and_only_the_owner_may_read(tmp_path: Path) -> None:
    path = tmp_path / "audit.sqlite"
    log = AuditLog(path, keep=10_000)
    for _ in range(2000):
        log(decision())
    log.close()
    with opened(path) as file:
        assert len(list(file.rows())) == 2000
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_without_keep_texts_no_text_is_in_the_files(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.sqlite", keep=10)
    log(decision(keep=False, question="a secret question"))
    log.close()
    for file in tmp_path.iterdir():
        assert b"secret" not in file.read_bytes() and b"moron" not in file.read_bytes()


def test_digests_tell_a_text_only_to_those_who_have_the_key(tmp_path: Path) -> None:
    rows = {}
    for name, key in (("one", b"k" * 16), ("same", b"k" * 16), ("other", b"o" * 16), ("new", None), ("newer", None)):
        log = AuditLog(tmp_path / name, keep=10, key=key)
        log(decision(keep=False))
        log(decision(keep=False))
        log.close()
        with opened(tmp_path / name) as file:
            first, second = ([row[f"{text}_digest"] for text in ("question", "answer", "text")] for row in file.rows())
        assert first == second
        rows[name] = first
    assert rows["one"] == rows["same"]
    assert rows["one"][0] == hmac.digest(b"k" * 16, b"How?", "sha256").hex()
    assert len({digest for row in rows.values() for digest in row}) == 4 * 3


def test_the_audit_key_of_the_settings_holds(tmp_path: Path) -> None:
    path = tmp_path / "audit.sqlite"
    with client_of(audit=path, audit_key="a secret of sixteen") as client:
        ask(client)
    with opened(path) as file:
        (row,) = file.rows()
    assert row["question_digest"] == hmac.digest(b"a secret of sixteen", b"How?", "sha256").hex()


def test_a_search_takes_its_words_literally(tmp_path: Path) -> None:
    path = tmp_path / "audit.sqlite"
    log = AuditLog(path, keep=10)
    for question in ("100 %", "100 x", "a_b", "a'b", "a\\b"):
        log(decision(question=question))
    log.close()
    with opened(path) as file:
        found = {
            words: [row["question"] for row in file.search("anonymous", words, 9)]
            for words in ("%", "_", "'", "\\", "")
        }
    assert found == {"%": ["100 %"], "_": ["a_b"], "'": ["a'b"], "\\": ["a\\b"], "": found[""]}
    assert len(found[""]) == 5


def test_two_writers_of_a_file_keep_its_bound(tmp_path: Path) -> None:
    path = tmp_path / "audit.sqlite"
    logs = [AuditLog(path, keep=50) for _ in range(2)]
    made = decision

    def write(log: AuditLog) -> None:
        for _ in range(100):
            log(made())
        log.close()

    threads = [threading.Thread(target=write, args=(log,)) for log in logs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with opened(path) as file:
        assert len(list(file.rows())) == 50


def test_what_cannot_wait_is_counted_as_lost(tmp_path: Path) -> None:
    lost: list[int] = []
    log = AuditLog(tmp_path / "audit.sqlite", 10, lost.append, waiting=0)
    log(decision())
    log.close()
    assert lost == [1]


def test_marks_become_labels_that_training_and_calibration_read(tmp_path: Path) -> None:
    path, out = tmp_path / "audit.sqlite", tmp_path / "rows.jsonl"
    log = AuditLog(path, keep=100)
    cases = [("a", "x", "y", "right"), ("b", "x", "y", "wrong"), ("c", "x", "x", "right"), ("d", "x", "x", "wrong")]
    rows = [(decision(True, q, a, t), mark) for q, a, t, mark in cases]
    for made, _ in [*rows, (decision(True, "e"), None), (decision(False, "f"), None)]:
        log(made)
    log.close()
    with opened(path, create=True) as file:
        assert all(file.mark(made.id, "anonymous", mark) for made, mark in rows)  # type: ignore[arg-type]
        assert not file.mark(rows[0][0].id, "another", "wrong")
    outcome = CliRunner().invoke(commands, ["audit", str(path), "--out", str(out), "--marked"])
    assert outcome.exit_code == 0, outcome.output
    assert [row.kind for row in read_labelled(out)] == ["bad", "keep", "keep", "bad"]
    assert [row.correction for row in read_rows(out).triples] == ["y", "x", "x", ""]
    assert "2 answers to keep, 2 bad ones; 2 decisions left out" in outcome.stdout


def test_a_missing_or_foreign_file_is_refused_and_not_changed(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.write_text("no database at all, but a text of some length " * 20)
    before = foreign.read_bytes()
    for create in (True, False):
        with pytest.raises(JobError, match="is no audit log"):
            AuditFile(foreign, create=create)
    assert foreign.read_bytes() == before
    outcome = CliRunner().invoke(commands, ["audit", str(tmp_path / "none"), "--out", str(tmp_path / "out")])
    assert outcome.exit_code == 1 and "there is no such file" in outcome.stderr


@pytest.mark.parametrize("path", ["/", "/page/app.js", "/page/style.css", "/page/about", "/page/log", "/page/none"])
def test_all_of_the_page_has_strict_headers(path: str) -> None:
    with client_of() as client:
        headers = client.get(path).headers
    assert headers["content-security-policy"].startswith("default-src 'none'")
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"


def test_a_page_of_another_site_is_refused() -> None:
    with client_of() as client:
        assert client.get("/page/about", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403


def test_a_strength_is_this_calls_alone_and_the_parts_mark_the_words() -> None:
    with client_of() as client:
        kept, changed = ask(client, strength=1).json(), ask(client).json()
    assert kept["changed"] is False and kept["threshold"] == 1
    assert [part["kind"] for part in changed["parts"]] == ["same", "removed"]


def test_a_policy_without_overrides_holds_for_the_page_too() -> None:
    with client_of(policy=PolicySettings(overrides=False)) as client:
        refused = ask(client, strength=1)
        assert client.get("/page/about").json()["overrides"] is False
        assert ask(client).json()["changed"] is True
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "override_not_allowed")


def test_with_keys_each_client_sees_and_marks_its_own_rows_alone(tmp_path: Path) -> None:
    made = {name: new_key() for name in ("one", "two")}
    keys = [KeySettings(name=name, sha256=hashed, keep_texts=True) for name, (_, hashed) in made.items()]
    with client_of(keys=keys, audit=tmp_path / "audit.sqlite") as client:
        assert client.get("/page/about").status_code == 401
        one, two = ({"Authorization": f"Bearer {key}"} for key, _ in made.values())
        client.post("/page/correct", json={"question": "How?", "answer": RUDE}, headers=one)
        for _ in range(200):
            rows = client.get("/page/log?search=moron", headers=one).json()["rows"]
            if rows:
                break
        assert client.get("/page/log", headers=two).json()["rows"] == []
        body = {"id": rows[0]["id"], "mark": "wrong"}
        assert client.post("/page/mark", json=body, headers=two).status_code == 404
        assert client.post("/page/mark", json=body, headers=one).json()["mark"] == "wrong"


async def test_the_feed_tells_texts_only_where_they_are_kept_and_ends() -> None:
    from aligner_middleware.serve.feed import Feed

    feed = Feed(5)
    feed(decision(keep=False))
    feed(decision(question="<img src=x>"))
    events = feed.watch("anonymous")
    first = await anext(aiter(events))
    assert first.count("event: decision") == 2 and first.count("moron") == 1
    feed.close()
    assert [event async for event in events] == []


def test_an_outcome_without_a_verdict_is_told_as_none() -> None:
    from aligner_middleware.serve.facts import facts

    client = Service(ServeSettings(), ALIGNER).client(None)
    passed = Aligned("a", {"aligned": False, "reason": "question not known: x"})
    assert facts(Decision(client, "/", "", "a", "a", passed.metadata, 0.1)).verdict == "none"
    failed = {"aligned": False, "reason": "CorrectionTimeoutError: x"}
    assert facts(Decision(client, "/", "", "a", "a", failed, 0.1)).error == "CorrectionTimeoutError"
