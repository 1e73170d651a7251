"""An instruction says how to correct: of a call, or else of its aligner."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from typer.testing import CliRunner

from aligner_middleware import Aligner, InputError
from aligner_middleware.cli import app as cli
from aligner_middleware.evaluation.calibration import measure
from aligner_middleware.evaluation.guard import guard
from aligner_middleware.evaluation.labelled_rows import LabelledRow
from aligner_middleware.text.template import PromptTemplate
from tests.fakes import (
    FakeModel,
    byte_tokenizer,
    collected,
    fake_aligner,
    instructed_aligner,
)

FORMAL = "formal"
ANSWER = "hey, it rains"


NEEDING = PromptTemplate(name="needing", text="{instruction}|{question}|{answer}|")


def told(instruction: str, question: str, answer: str) -> str:
    """Correct `hey` by the instruction, and not at all without one."""
    return answer.replace("hey", {"": "hey", FORMAL: "Dear all"}.get(instruction, instruction))


async def arriving(*chunks: str) -> AsyncIterator[str]:
    for chunk in chunks:
        yield chunk


CALLS: dict[str, Callable[..., str]] = {
    "correct": lambda a, **o: a.correct("q", ANSWER, **o).corrected,
    "correct_batch": lambda a, **o: a.correct_batch([("q", ANSWER)] * 2, **o)[1].corrected,
    "acorrect": lambda a, **o: asyncio.run(a.acorrect("q", ANSWER, **o)).corrected,
    "acorrect_batch": lambda a, **o: asyncio.run(a.acorrect_batch([("q", ANSWER)], **o))[0].corrected,
    "stream": lambda a, **o: "".join(a.stream("q", ANSWER, **o)),
    "astream": lambda a, **o: "".join(asyncio.run(collected(a.astream("q", ANSWER, **o)))),
    "chunks": lambda a, **o: "".join(a.stream("q", [ANSWER[:5], ANSWER[5:]], **o)),
    "async chunks": lambda a, **o: "".join(
        asyncio.run(collected(a.stream("q", arriving(ANSWER[:5], ANSWER[5:]), **o)))
    ),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_every_call_corrects_by_its_instruction_or_else_by_the_aligners(call: Callable[..., str]) -> None:
    with instructed_aligner(told) as plain, instructed_aligner(told, instruction=FORMAL) as formal:
        assert (call(plain), call(plain, instruction=FORMAL)) == (ANSWER, "Dear all, it rains")
        assert (call(formal), call(formal, instruction="kind")) == ("Dear all, it rains", "kind, it rains")
        assert call(formal, instruction="") == ANSWER
        assert call(plain, instruction=f"  {FORMAL}\n") == "Dear all, it rains"


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_an_aligner_without_instructions_refuses_one_and_says_so(call: Callable[..., str]) -> None:
    with fake_aligner(lambda q, a: a) as aligner, pytest.raises(InputError, match="not trained with instructions"):
        call(aligner, instruction=FORMAL)
    with fake_aligner(lambda q, a: a) as aligner:
        assert call(aligner, instruction="") == ANSWER


def test_an_aligner_without_instructions_cannot_be_made_with_one() -> None:
    with pytest.raises(InputError, match="'default' has no place for one"):
        fake_aligner(lambda q, a: a, instruction=FORMAL)


def test_a_template_whose_prompts_all_have_an_instruction_asks_for_one() -> None:
    def make(**options: Any) -> Aligner:
        return Aligner(FakeModel(lambda tokens: 2), byte_tokenizer(), NEEDING, [2], **options)

    with make() as aligner, pytest.raises(InputError, match="'needing' holds an instruction: give one"):
        aligner.correct("q", "a")
    with make(instruction="i") as aligner:
        assert aligner.correct("q", "a").usage.prompt_tokens == len("i|q|a|")
    with pytest.raises(InputError, match="give one"):
        aligner.correct("q", "a", instruction="")


@pytest.mark.parametrize(
    ("instruction", "reason"),
    [("x" * 2001, "2001 characters long, expected at most 2000"), ("\ud800", "lone surrogate"), (3, "expected text")],
)
def test_an_instruction_that_cannot_be_read_is_refused_before_anything_is_run(instruction: Any, reason: str) -> None:
    with instructed_aligner(told) as aligner:
        for call in (CALLS["correct"], CALLS["stream"], CALLS["acorrect"]):
            with pytest.raises(InputError, match=reason):
                call(aligner, instruction=instruction)
        with pytest.raises(InputError, match=reason):
            aligner.correct_batch([("q", "a")], instruction=instruction, return_exceptions=True)
        assert aligner.fake_model.passes == 0


def test_a_correction_says_by_which_instruction_it_was_made() -> None:
    with instructed_aligner(told, instruction=FORMAL) as aligner:
        assert aligner.correct("q", ANSWER).instruction == aligner.correct("q", " ").instruction == FORMAL
        assert aligner.correct("q", ANSWER, instruction="").instruction is None
        assert aligner.identity["instruction"] == FORMAL
    with instructed_aligner(told) as aligner:
        assert "instruction" not in aligner.identity


def test_likelihood_evidence_and_room_count_the_instruction() -> None:
    with instructed_aligner(told) as aligner:
        ((_, likeliest),) = aligner.log_likelihood("q", ANSWER, ["Dear all, it rains"], FORMAL)
        assert likeliest
        ((_, likeliest),) = aligner.log_likelihood("q", ANSWER, ["Dear all, it rains"])
        assert not likeliest
        assert aligner.evidence("q", ANSWER) <= 0 < aligner.evidence("q", ANSWER, FORMAL) < math.inf
        assert aligner.longest_answer("q", "x" * 1000) < aligner.longest_answer("q") - 400


def test_labelled_rows_are_measured_and_corrected_each_by_its_own_instruction() -> None:
    told_so = [None, FORMAL, "kind", None, " ", FORMAL]
    rows = [LabelledRow(question="q", answer=ANSWER, kind="bad", instruction=one) for one in told_so]
    with instructed_aligner(told) as aligner:
        texts = [item.corrections["medium"].corrected for item in guard(aligner, rows).rows]
        evidence = [item.evidence for item in measure(aligner, rows)]
    with fake_aligner(lambda q, a: a) as aligner:  # without a place for an instruction
        assert guard(aligner, rows).left_out == len(measure(aligner, rows)) == 3
    assert texts == [told((one or "").strip(), "q", ANSWER) for one in told_so]
    assert [value > 0 for value in evidence] == [text != ANSWER for text in texts]


def test_an_answer_is_read_ahead_with_its_instruction() -> None:
    long, read = "it rains, " * 30, {}
    for name in (FORMAL, "kind"):
        with instructed_aligner(told) as aligner:
            ahead = aligner.read_ahead("q", instruction=name)
            ahead.feed(long)
            while len(ahead.prefill.cached_tokens) < len(long):
                time.sleep(0.001)
            before = aligner.fake_model.tokens
            assert "".join(aligner.stream("q", long, ahead=ahead, instruction=FORMAL)) == long
            read[name] = aligner.fake_model.tokens - before
    assert read[FORMAL] < read["kind"] - len(long) + 20


DEAR = "Dear all, it rains"


def test_the_command_takes_an_instruction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Aligner, "load", lambda *args, **options: instructed_aligner(told, **_own(options)))
    result = CliRunner().invoke(cli.app, ["correct", "-q", "q", "-a", ANSWER, "--instruction", FORMAL, "--json"])
    row = json.loads(result.stdout)
    assert (row["corrected"], row["instruction"]) == (DEAR, FORMAL)


def _own(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name == "instruction"}
