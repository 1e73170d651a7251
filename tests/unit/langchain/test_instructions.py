"""Instructions in chains, wrapped models and agents: of the aligner, of its runnable, and of a call."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.runnables import ConfigurableField, Runnable

from aligner_middleware import Aligner, AlignerMiddleware, AlignerRunnable, InputError
from tests.chat_models import saying
from tests.fakes import (
    collected,
    fake_aligner,
    instructed_aligner,
    joined,
)

FORMAL = "formal"
ANSWER = "hey, it rains"


def told(instruction: str, question: str, answer: str) -> str:
    """Correct `hey` by the instruction, and not at all without one."""
    return answer.replace("hey", {"": "hey", FORMAL: "Dear all"}.get(instruction, instruction))


@pytest.fixture(scope="module")
def aligner() -> Iterator[Aligner]:
    with instructed_aligner(told) as aligner:
        yield aligner


RUNS: dict[str, Callable[[Runnable[Any, Any], Any], Any]] = {
    "invoke": lambda r, value: r.invoke(value),
    "batch": lambda r, value: r.batch([value, value])[1],
    "stream": lambda r, value: joined(list(r.stream(value))),
    "ainvoke": lambda r, value: asyncio.run(r.ainvoke(value)),
    "astream": lambda r, value: joined(asyncio.run(collected(r.astream(value)))),
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_a_chain_takes_an_instruction_also_per_call(
    aligner: Aligner, run: Callable[[Runnable[Any, Any], Any], Any]
) -> None:
    chosen = AlignerRunnable(aligner, question="q").configurable_fields(instruction=ConfigurableField(id="instruction"))
    made = run(saying(ANSWER) | chosen, "q")
    assert (made.content, "instruction" in made.response_metadata["aligner"]) == (ANSWER, False)
    made = run(saying(ANSWER) | chosen.with_config(configurable={"instruction": FORMAL}), "q")
    assert (made.content, made.response_metadata["aligner"]["instruction"]) == ("Dear all, it rains", FORMAL)


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_a_wrapped_model_corrects_by_its_instruction(
    aligner: Aligner, run: Callable[[Runnable[Any, Any], Any], Any]
) -> None:
    made = run(AlignerRunnable.wrap(saying(ANSWER), aligner, instruction=FORMAL), "q")
    assert (made.content, made.response_metadata["aligner"]["instruction"]) == ("Dear all, it rains", FORMAL)


def test_an_agent_corrects_by_its_instruction(aligner: Aligner) -> None:
    agent = create_agent(saying(ANSWER), [], middleware=[AlignerMiddleware(aligner, instruction=FORMAL)])
    assert agent.invoke({"messages": [HumanMessage("q")]})["messages"][-1].content == "Dear all, it rains"


def test_a_piecewise_answer_has_the_instruction_in_every_piece(aligner: Aligner) -> None:
    paragraphs = "\n\n".join([ANSWER] * 3)
    align = AlignerRunnable(aligner, question="q", instruction=FORMAL, max_answer_tokens=20, on_long_answer="piecewise")
    made = align.invoke(AIMessage(paragraphs))
    assert "hey" not in made.content
    assert made.response_metadata["aligner"]["instruction"] == FORMAL


def test_what_was_aligned_by_another_instruction_is_aligned_again(aligner: Aligner) -> None:
    plain, formal = AlignerRunnable(aligner, question="q"), AlignerRunnable(aligner, question="q", instruction=FORMAL)
    kept = plain.invoke(AIMessage(ANSWER))
    assert formal.invoke(kept).content == "Dear all, it rains"
    once = formal.invoke(kept)
    assert formal.invoke(once) is once


def test_cached_answers_are_apart_for_each_instruction(aligner: Aligner) -> None:
    def key(own: Aligner, **options: Any) -> str:
        return str(AlignerRunnable.wrap(saying(ANSWER), own, **options)._get_llm_string())

    with instructed_aligner(told, instruction=FORMAL) as formal:
        assert len({key(aligner), key(aligner, instruction=FORMAL), key(aligner, instruction="kind")}) == 3
        assert key(formal) == key(aligner, instruction=FORMAL) != key(formal, instruction="")


def test_a_chain_refuses_an_instruction_that_its_aligner_was_not_trained_with() -> None:
    with fake_aligner(lambda q, a: a) as plain, pytest.raises(InputError, match="not trained with instructions"):
        AlignerRunnable(plain, instruction=FORMAL)
