"""An answer whose question is not known: what is there is used, and else a policy decides and the error says why."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import Runnable, RunnableLambda

from aligner_middleware import AlignerMiddleware, AlignerRunnable, InputError, MissingQuestionError, question_record
from tests.chat_models import saying
from tests.fakes import InstantAligner

ALIGNER = InstantAligner(lambda question, answer: f"{answer} ({question})")
IMAGE = HumanMessage([{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}])
TALK = [HumanMessage("What plant is on my picture?"), AIMessage("Show me."), IMAGE]


def agent(**options: Any) -> Runnable[Any, Any]:
    graph: Any = create_agent(saying("a fern"), [], middleware=[AlignerMiddleware(ALIGNER, **options)])

    async def asynchronously(messages: list[BaseMessage]) -> Any:
        return (await graph.ainvoke({"messages": messages}))["messages"][-1]

    return RunnableLambda(lambda messages: graph.invoke({"messages": messages})["messages"][-1], asynchronously)


async def joined(runnable: Runnable[Any, Any], value: Any) -> Any:
    return "".join([piece.text async for piece in runnable.astream(value)])


WAYS: dict[str, Callable[..., Runnable[Any, Any]]] = {
    "chain": lambda **options: saying("a fern") | AlignerRunnable(ALIGNER, **options),
    "wrapped model": lambda **options: AlignerRunnable(ALIGNER, **options).wrap(saying("a fern")),
    "agent": agent,
}
CALLS: dict[str, Callable[[Runnable[Any, Any], Any], str]] = {
    "invoke": lambda runnable, value: runnable.invoke(value).text,
    "ainvoke": lambda runnable, value: asyncio.run(runnable.ainvoke(value)).text,
    "stream": lambda runnable, value: "".join(piece.text for piece in runnable.stream(value)),
    "astream": lambda runnable, value: asyncio.run(joined(runnable, value)),
}


@pytest.fixture(autouse=True)
def forget() -> Any:
    question_record.clear()
    yield
    question_record.dialogues = False


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("way", WAYS)
class TestEveryWay:
    def test_a_message_without_text_is_the_policys_to_decide_and_the_error_says_so(self, way: str, call: str) -> None:
        with pytest.raises(MissingQuestionError, match=r"no text, only image_url \(dialogue=True"):
            CALLS[call](WAYS[way](), TALK)
        assert CALLS[call](WAYS[way](on_missing_question="passthrough"), TALK) == "a fern"

    def test_a_dialogue_is_the_text_there_is(self, way: str, call: str) -> None:
        said = "User: What plant is on my picture?\n\nAssistant: Show me."
        assert CALLS[call](WAYS[way](dialogue=True), TALK) == f"a fern ({said})"
        with pytest.raises(MissingQuestionError, match="no text, only image_url\\. Give it"):
            CALLS[call](WAYS[way](dialogue=True), [IMAGE])

    def test_a_function_that_knows_no_question_is_the_policys_to_decide(self, way: str, call: str) -> None:
        options: dict[str, Any] = {"question": lambda value: None}
        with pytest.raises(MissingQuestionError, match="question= returned None"):
            CALLS[call](WAYS[way](**options), TALK[:1])
        assert CALLS[call](WAYS[way](**options, on_missing_question="passthrough"), TALK[:1]) == "a fern"

    def test_a_function_that_fails_is_an_error_as_any_other(self, way: str, call: str) -> None:
        def broken(value: Any) -> str:
            raise KeyError("oops")

        with pytest.raises(KeyError, match="oops"):
            CALLS[call](WAYS[way](question=broken), TALK[:1])
        assert CALLS[call](WAYS[way](question=broken, on_error="passthrough"), TALK[:1]) == "a fern"

    def test_a_conversation_without_a_human_message_is_named(self, way: str, call: str) -> None:
        with pytest.raises(MissingQuestionError, match="no human message"):
            CALLS[call](WAYS[way](), [AIMessage("Hello")])


def test_the_report_says_why_an_answer_was_let_through() -> None:
    for way in WAYS.values():
        report = way(on_missing_question="passthrough").invoke([IMAGE]).response_metadata["aligner"]
        assert report["aligned"] is False
        assert report["reason"] == "question not known: the human message that it answers has no text, only image_url"


def test_the_error_of_a_record_names_its_cause() -> None:
    align = AlignerRunnable(ALIGNER)
    with pytest.raises(MissingQuestionError, match="does not come from a model run"):
        align.invoke("a fern")
    two = {"one": saying("a fern"), "two": RunnableLambda(lambda q: f"{q}?") | saying("a fern")}
    with pytest.raises(MissingQuestionError, match="several model runs"):
        (two | RunnableLambda(lambda said: said["one"].text + "!") | align).invoke("x")
    question_record.enabled = False
    try:
        with pytest.raises(MissingQuestionError, match="switched off"):
            align.invoke("a fern")
    finally:
        question_record.enabled = True


def test_a_picture_does_not_borrow_the_question_of_another_run() -> None:
    both = {"one": RunnableLambda(lambda q: [IMAGE]) | saying("one"), "two": saying("two")}
    chain = both | RunnableLambda(lambda said: said["one"].text + "!") | AlignerRunnable(ALIGNER)
    with pytest.raises(MissingQuestionError, match="several model runs"):
        chain.invoke("x")


def test_a_state_and_text_after_a_parser_name_the_same_cause() -> None:
    state: dict[str, list[BaseMessage]] = {"messages": [IMAGE, AIMessage("a fern")]}
    with pytest.raises(MissingQuestionError, match="only image_url"):
        AlignerRunnable(ALIGNER).invoke(state)
    with pytest.raises(MissingQuestionError, match="only image_url"):
        (saying("a fern") | StrOutputParser() | AlignerRunnable(ALIGNER)).invoke([IMAGE])


@pytest.mark.parametrize(
    "question",
    ["q", HumanMessage("q"), [HumanMessage("q")], [("human", "q")], ChatPromptTemplate.from_template("q").invoke({})],
)
def test_a_given_question_may_be_text_messages_or_a_prompt(question: Any) -> None:
    assert AlignerRunnable(ALIGNER).invoke({"question": question, "answer": "a fern"})["answer"] == "a fern (q)"


def test_a_given_question_that_is_none_of_these_is_refused_and_one_without_text_is_missing() -> None:
    with pytest.raises(InputError, match="'question' is of type int"):
        AlignerRunnable(ALIGNER).invoke({"question": 5, "answer": "a fern"})
    with pytest.raises(MissingQuestionError, match="only image_url"):
        AlignerRunnable(ALIGNER).invoke({"question": [IMAGE], "answer": "a fern"})
    given = {"question": TALK, "answer": "a fern"}
    assert "Show me." in AlignerRunnable(ALIGNER, dialogue=True).invoke(given)["answer"]
