"""Reasoning inside the text of an answer stays byte for byte, and the answer around it is corrected."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from langchain.agents import create_agent
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage
from langchain_core.runnables import Runnable

from aligner_middleware import AlignerMiddleware, AlignerRunnable, question_record
from aligner_middleware.langchain.messages import question_of
from aligner_middleware.text.reasoning import apart
from tests.chat_models import Scripted, saying
from tests.fakes import InstantAligner, fake_aligner, judging_aligner

ALIGNERS = {
    "instant": InstantAligner(lambda question, answer: answer.replace("bad", "good")),
    "copying": fake_aligner(lambda question, answer: answer.replace("bad", "good")),
    "judging": judging_aligner(lambda question, answer: answer.replace("bad", "good")),
}
THOUGHT = "bad thought: 12 * 12 < 200"
# What is said, in parts: every other one is reasoning, and stays.
SAID: dict[str, list[str]] = {
    "before": ["", f"<think>\n{THOUGHT}\n</think>\n\n", "A bad answer."],
    "thinking": ["", f"<thinking>{THOUGHT}</thinking>", "A bad answer."],
    "reasoning": ["", f"<Reasoning depth='9'>{THOUGHT}</Reasoning>\n", "A bad answer."],
    "two blocks": ["", f"<think>{THOUGHT}</think>\n<reasoning>{THOUGHT}</reasoning>\n", "A bad answer."],
    "between": ["A bad answer.\n\n", f"<think>{THOUGHT}</think>\n", "\nAnother bad answer.\n"],
    "within a line": ["A bad answer. ", f"<think>{THOUGHT}</think>", " Another bad answer."],
    "again and again": ["", f"<think>{THOUGHT}</think>", "Bad, bad.\n", f"<think>{THOUGHT}</think>\n", "A bad answer."],
    "behind": ["A bad answer.\n", f"<think>{THOUGHT}</think>\n", ""],
    "not closed": ["", f"<think>{THOUGHT}", ""],
    "not closed, behind": ["A bad answer.\n", f"<think>{THOUGHT}", ""],
    "not opened": ["", f"{THOUGHT}\n</think>\n\n", "A bad answer."],
    "none": ["A bad answer.", "", ""],
    "in code": ["Write `<think>` or bad:\n```\n<think>\nbad\n</think>\n```\n", "", ""],
    "in quotes": ['Open it by "<think>", a bad tag.', "", ""],
}


def wanted(said: str) -> str:
    return "".join(part if at % 2 else part.replace("bad", "good") for at, part in enumerate(SAID[said]))


async def collected(runnable: Runnable[Any, Any], value: Any) -> list[Any]:
    return [piece async for piece in runnable.astream(value)]


def text(value: Any) -> str:
    return value if isinstance(value, str) else str(value.text)


CALLS: dict[str, Callable[[Runnable[Any, Any], Any], str]] = {
    "invoke": lambda runnable, value: text(runnable.invoke(value)),
    "batch": lambda runnable, value: text(runnable.batch([value, value])[1]),
    "stream": lambda runnable, value: "".join(map(text, runnable.stream(value))),
    "ainvoke": lambda runnable, value: text(asyncio.run(runnable.ainvoke(value))),
    "astream": lambda runnable, value: "".join(map(text, asyncio.run(collected(runnable, value)))),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("aligner", ALIGNERS)
@pytest.mark.parametrize("said", SAID)
def test_reasoning_stays_and_what_is_around_it_is_corrected(said: str, aligner: str, call: str) -> None:
    question_record.clear()
    align, answer = AlignerRunnable(ALIGNERS[aligner]), "".join(SAID[said])
    assert CALLS[call](AlignerRunnable(ALIGNERS[aligner], question="q"), answer) == wanted(said)
    assert CALLS[call](saying(answer) | align, "q") == wanted(said)
    assert CALLS[call](align.wrap(saying(answer)), "q") == wanted(said)


@pytest.mark.parametrize("said", SAID)
def test_in_agents_and_content_blocks_too(said: str) -> None:
    answer = "".join(SAID[said])
    graph: Any = create_agent(saying(answer), [], middleware=[AlignerMiddleware(ALIGNERS["instant"])])
    ask: Any = {"messages": [("user", "q")]}
    parts = graph.stream(ask, stream_mode="messages")
    assert "".join(chunk.text for chunk, _ in parts) == wanted(said)
    blocks: list[Any] = [{"type": "text", "text": part} for part in SAID[said] if part]
    model = AlignerRunnable(ALIGNERS["instant"]).wrap(Scripted(reply=lambda messages: AIMessage(blocks)))
    assert model.invoke("q").text == wanted(said)


@pytest.mark.parametrize("said", SAID)
def test_a_long_answer_is_cut_into_pieces_without_its_reasoning(said: str) -> None:
    options: dict[str, Any] = {"question": "q", "max_answer_tokens": 40, "on_long_answer": "piecewise"}
    align = AlignerRunnable(ALIGNERS["copying"], **options)
    assert align.invoke("".join(SAID[said])) == wanted(said)


def test_reasoning_does_not_count_as_length() -> None:
    align = AlignerRunnable(ALIGNERS["copying"], question="q", max_answer_tokens=20)
    thought = f"<think>{THOUGHT * 20}</think>"
    assert align.invoke(thought + "A bad answer.") == thought + "A good answer."


def test_a_stream_gives_the_reasoning_before_the_answer_is_decided() -> None:
    align = AlignerRunnable(ALIGNERS["instant"], question="q")
    first, *rest = align.stream(AIMessageChunk(content="".join(SAID["before"]), id="7"))
    assert first.content == SAID["before"][1]
    assert "".join(chunk.text for chunk in rest) == "A good answer."


def test_what_is_nothing_but_reasoning_is_kept_and_reported() -> None:
    message = AlignerRunnable(ALIGNERS["judging"], question="q", keep_original=True).invoke(AIMessage("<think>bad"))
    report = message.response_metadata["aligner"]
    assert message.content == "<think>bad"
    assert (report["aligned"], report["changed"], report["usage"]["passes"]) == (True, False, 0)


def test_the_report_is_of_the_whole_answer_and_has_the_verdict_of_its_one_text() -> None:
    told: list[Any] = []
    answer = "".join(SAID["before"])
    align = AlignerRunnable(ALIGNERS["judging"], question="q", keep_original=True, on_correction=told.append)
    report = align.invoke(AIMessage(answer)).response_metadata["aligner"]
    assert report["original"] == answer
    assert report["verdict"] == "edit"
    assert (told[0].original, told[0].corrected) == (answer, wanted("before"))


def test_the_reasoning_of_earlier_turns_is_no_part_of_a_dialogue() -> None:
    turns = [HumanMessage("a <think>"), AIMessage("<think>hm</think>\n\nb"), HumanMessage("c")]
    assert question_of(turns, dialogue=True) == "User: a <think>\n\nAssistant: b\n\nUser: c"


TEXTS = st.lists(
    st.sampled_from(["<think>", "</think>", "<reasoning>", "bad", " ", "\n", "`", "```\n", "<b>", "é", '"']),
    max_size=14,
).map("".join)


@given(TEXTS)
def test_an_answer_in_parts_is_the_answer(answer: str) -> None:
    parts = apart(answer)
    assert "".join(aside + text for aside, text in parts) == answer
    assert AlignerRunnable(InstantAligner(lambda question, said: said), question="q").invoke(answer) == answer
    assert all(parts[at][0] for at in range(1, len(parts)))


def test_a_failing_correction_of_an_answer_behind_reasoning_goes_by_the_options() -> None:
    align = AlignerRunnable(ALIGNERS["judging"], question="q", fallback="Sorry.")
    assert align.invoke("<think>x</think>bad \ud800") == "Sorry."
    align = AlignerRunnable(ALIGNERS["judging"], question="q", on_error="passthrough")
    assert align.invoke("<think>x</think>bad \ud800") == "<think>x</think>bad \ud800"
