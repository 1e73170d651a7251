"""Answers with and without the aligner, judged in pairs: both orders, replies that are no verdict, a job that is cut off."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from langchain_core.messages import AIMessage, BaseMessage
from numpy.typing import NDArray

from aligner_middleware.data.progress import Progress
from aligner_middleware.data.prompts import Prompt
from aligner_middleware.errors import UpstreamError
from aligner_middleware.evaluation import ChatJudge, OfflineJudge, Pair, Tally, compare, write_report
from tests.chat_models import Scripted, answering
from tests.fakes import InstantAligner

PAIR = Pair("Why?", "bad", "good")
ALIGNER = InstantAligner(lambda question, answer: answer.replace("bad", "good") if "keep" not in question else answer)


def judging(say: Any) -> tuple[ChatJudge, list[str]]:
    """A judge that says `say(first answer, second answer)`, and what it was asked."""
    asked: list[str] = []

    def reply(messages: list[BaseMessage]) -> AIMessage:
        asked.append(messages[-1].text)
        case = next(message.text for message in messages if "Answer 1:" in message.text)
        first, second = re.findall(r"Answer \d:\n(.*)", case)
        return AIMessage(say(first, second))

    return ChatJudge(Scripted(reply=reply), "judge"), asked


def better(place: int) -> str:
    return json.dumps({"better": place})


@pytest.mark.parametrize(
    ("say", "verdict"),
    [
        (lambda first, second: better(1 if first == "good" else 2), "win"),
        (lambda first, second: better(1 if first == "bad" else 2), "loss"),
        (lambda first, second: better(0), "tie"),
        (lambda first, second: better(1), "tie"),  # a liking for the first answer cancels
        (lambda first, second: better(2 if second == "good" else 0), "win"),
        (lambda first, second: "I like them both!", "malformed"),
        (lambda first, second: 'Sure: {"better": "2"}' if second == "good" else better(1), "win"),
    ],
)
def test_both_orders_make_a_verdict(say: Any, verdict: str) -> None:
    judge, _ = judging(say)
    assert judge.judge([PAIR]) == [{"helpful": verdict, "harmless": verdict, "honest": verdict}]


def test_an_unchanged_answer_is_a_tie_and_nobody_is_asked() -> None:
    judge, asked = judging(lambda first, second: better(1))
    assert set(judge.judge([Pair("q", "same", "same")])[0].values()) == {"tie"}
    assert asked == []


def test_a_reply_that_is_no_verdict_is_asked_for_again_and_paid_verdicts_are_kept(tmp_path: Path) -> None:
    asked: list[str] = []

    def reply(messages: list[BaseMessage]) -> AIMessage:
        asked.append(messages[-1].text)
        return AIMessage(better(0) if "one line of JSON, please" in messages[-1].text else "hm")

    for _ in range(2):
        judge = ChatJudge(Scripted(reply=reply), "judge", tmp_path / "verdicts.sqlite")
        assert set(judge.judge([PAIR])[0].values()) == {"tie"}
    assert len(asked) == 2 * 6


def test_a_judge_that_fails_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    judge, _ = judging(lambda first, second: 1 / 0)
    with pytest.raises(UpstreamError, match="ZeroDivisionError"):
        judge.judge([PAIR])


def test_the_rate_is_the_papers_with_an_interval_around_it() -> None:
    verdicts: list[Any] = ["win"] * 6 + ["tie"] * 2 + ["loss"] * 2 + ["malformed"]
    tally = Tally.of(verdicts)
    assert (tally.win, tally.tie, tally.loss, tally.malformed) == (6, 2, 2, 1)
    assert tally.rate == pytest.approx(0.4)
    assert tally.low < 0.4 < tally.high
    assert Tally.of(["win"] * 3).low == 1
    assert np.isnan(Tally.of(["malformed"]).rate)


class Words:
    """Vectors of which words a text has."""

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        words = ["tokyo", "japan", "capital"]
        rows = [[float(word in text.lower()) for word in words] + [0.1] for text in texts]
        return np.array([np.array(row) / np.linalg.norm(row) for row in rows], dtype=np.float32)


def test_the_offline_judge_counts_insults_and_likeness_and_leaves_honesty_alone() -> None:
    question = "What is the capital of Japan?"
    rude, kind = "Tokyo, capital of Japan, you idiot.", "Tokyo, capital of Japan."
    judge = OfflineJudge(Words())
    assert judge.judge([Pair(question, rude, kind), Pair(question, kind, rude), Pair(question, rude, rude)]) == [
        {"helpful": "tie", "harmless": "win"},
        {"helpful": "tie", "harmless": "loss"},
        {"helpful": "tie", "harmless": "tie"},
    ]
    assert judge.judge([Pair(question, "Dunno.", kind)])[0]["helpful"] == "win"
    assert judge.judge([]) == []


def test_a_comparison_goes_on_where_it_stopped_and_reports(tmp_path: Path) -> None:
    prompts = [Prompt(question=f"q{number}", category="c") for number in range(5)] + [Prompt(question="keep")]
    judge, asked = judging(lambda first, second: better(1 if first.startswith("good") else 2))
    down = {"q3"}

    def reply(messages: list[BaseMessage]) -> AIMessage:
        if messages[-1].text in down:
            raise ValueError("refused <b>")
        return answering().reply(messages)

    model = Scripted(reply=reply)
    first = compare(prompts, tmp_path, ALIGNER, judge, model, upstream_name="m", concurrency=2)
    assert (len(first.rows), len(first.failed)) == (5, 1)
    down.clear()
    asked.clear()
    reported: list[Progress] = []
    options: dict[str, Any] = {"upstream_name": "m", "concurrency": 2, "report": reported.append}
    second = compare(prompts, tmp_path, ALIGNER, judge, model, **options)
    assert reported == [Progress("compare", done, 6) for done in (5, 6)]
    assert len(asked) == 6
    assert (len(second.rows), second.failed) == (6, {})
    tally = second.tallies()["helpful"]
    assert (tally.win, tally.tie, tally.loss) == (5, 1, 0)
    assert second.tallies("c")["honest"].win == 5
    write_report(second, tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["left_alone"] == pytest.approx(1 / 6)
    assert summary["verdicts"]["helpful"]["rate"] == pytest.approx(5 / 6)
    html = (tmp_path / "report.html").read_text()
    assert html.count("data:image/png;base64,") == 2
    assert "<del>bad</del><ins>good</ins>" in html
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 6
