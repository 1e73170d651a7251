"""`AlignerMiddleware` in `create_agent`: whoever looks, wherever, sees corrected answers under the model's own ids."""

import asyncio
import warnings
from dataclasses import replace
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import (
    AgentMiddleware,
    HumanInTheLoopMiddleware,
    ModelFallbackMiddleware,
    ModelRetryMiddleware,
    PIIMiddleware,
    SummarizationMiddleware,
)
from langchain.agents.structured_output import ProviderStrategy, ToolStrategy
from langchain.chat_models import init_chat_model
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, ToolMessage
from langchain_core.runnables import ConfigurableField, RunnableLambda
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.types import Command
from pydantic import BaseModel

from aligner_middleware import AlignerMiddleware, AlignerRunnable
from aligner_middleware.langchain.messages import with_text
from tests.chat_models import Scripted, saying
from tests.fakes import fake_aligner

ALIGNER = fake_aligner(lambda question, answer: answer.replace("RAW", f"good for {question}"))
ASK: Any = {"messages": [HumanMessage("why")]}


@tool
def weather(place: str) -> str:
    """Tell the weather of a place."""
    return f"sunny in {place}"


CALL = {"name": "weather", "args": {"place": "RAW-Rome"}, "id": "call", "type": "tool_call"}


def tool_then_answer(text: str = "") -> Scripted:
    """A model that calls the tool, with some text, and then answers `RAW answer`."""

    def reply(messages: list[BaseMessage]) -> AIMessage:
        if isinstance(messages[-1], ToolMessage):
            return AIMessage("RAW answer")
        return AIMessage(text, tool_calls=[CALL])

    return Scripted(reply=reply)


def agent(model: Any = None, before: list[Any] | None = None, after: list[Any] | None = None, **options: Any) -> Any:
    more = {name: options.pop(name) for name in ("checkpointer", "response_format", "name") if name in options}
    return create_agent(
        model or tool_then_answer(),
        [weather],
        middleware=[*(before or []), AlignerMiddleware(ALIGNER, **options), *(after or [])],
        **more,
    )


def last(state: dict[str, Any]) -> AIMessage:
    message = state["messages"][-1]
    assert isinstance(message, AIMessage)
    return message


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_final_answer_is_corrected_for_the_users_question(asynchronous: bool) -> None:
    state = asyncio.run(agent().ainvoke(ASK)) if asynchronous else agent().invoke(ASK)
    assert last(state).content == "good for why answer"
    assert [type(message) for message in state["messages"]] == [HumanMessage, AIMessage, ToolMessage, AIMessage]
    assert state["messages"][1].tool_calls == [CALL]
    assert state["messages"][2].content == "sunny in RAW-Rome"
    usage = last(state).usage_metadata
    assert usage is not None and usage["total_tokens"] == 8
    assert last(state).response_metadata["aligner"]["changed"]


@pytest.mark.parametrize("mode", ["messages", "updates", "values", "custom", "debug", "events"])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_no_stream_shows_the_raw_answer(mode: str, asynchronous: bool) -> None:
    graph = agent()

    async def listen() -> list[Any]:
        if mode == "events":
            return [event async for event in graph.astream_events(ASK, version="v2")]
        return [part async for part in graph.astream(ASK, stream_mode=mode)]

    if mode == "events" and not asynchronous:
        pytest.skip("events are asynchronous")
    seen = asyncio.run(listen()) if asynchronous else list(graph.stream(ASK, stream_mode=mode))
    assert seen
    shown = repr(seen).replace("RAW-Rome", "")
    assert "RAW" not in shown
    if mode == "custom":
        assert [part["aligner_correction"]["changed"] for part in seen] == [True]
    elif mode != "messages":
        assert "good for why" in shown
    else:
        tokens = [chunk.text for chunk, _ in seen if chunk.text and not isinstance(chunk, ToolMessage)]
        assert "".join(tokens) == "good for why answer"


def test_raw_streaming_is_a_choice_and_what_is_stored_is_corrected() -> None:
    graph = agent(raw_streaming=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokens = [chunk.text for chunk, _ in graph.stream(ASK, stream_mode="messages") if chunk.text]
    assert "RAW " in tokens
    assert last(graph.invoke(ASK)).content == "good for why answer"
    assert last(asyncio.run(graph.ainvoke(ASK))).content == "good for why answer"


def test_a_checkpoint_holds_the_corrected_answer_once_under_the_id_that_was_streamed() -> None:
    graph = agent(checkpointer=InMemorySaver(), keep_original=True)
    config = {"configurable": {"thread_id": "1"}}
    streamed = [chunk for chunk, _ in graph.stream(ASK, config, stream_mode="messages") if chunk.text]
    stored = graph.get_state(config).values["messages"]
    assert [message.text for message in stored] == ["why", "", "sunny in RAW-Rome", "good for why answer"]
    assert {chunk.id for chunk in streamed if not isinstance(chunk, ToolMessage)} == {stored[-1].id}
    assert stored[-1].response_metadata["aligner"]["original"] == "RAW answer"
    graph.invoke({"messages": [HumanMessage("and now")]}, config)
    again = graph.get_state(config).values["messages"]
    assert again[-1].content == "good for and now answer"
    assert len(again) == 8


def test_text_beside_tool_calls_is_corrected_by_choice() -> None:
    model = tool_then_answer("RAW thought")
    assert agent(model).invoke(ASK)["messages"][1].content == "RAW thought"
    assert agent(model, intermediate=True).invoke(ASK)["messages"][1].content == "good for why thought"
    assert (
        agent(model, intermediate=True, raw_streaming=True).invoke(ASK)["messages"][1].content == "good for why thought"
    )


def test_tool_results_go_along_by_choice() -> None:
    answer = last(agent(tool_results=True).invoke(ASK)).content
    assert answer == "good for why\n\nTool: sunny in RAW-Rome answer"
    asked = agent(question=lambda messages: messages[0].text.upper())
    assert last(asked.invoke(ASK)).content == "good for WHY answer"
    assert last(asyncio.run(asked.ainvoke(ASK))).content == "good for WHY answer"


class Verdict(BaseModel):
    text: str


def test_structured_responses_are_not_touched() -> None:
    call = {"name": "Verdict", "args": {"text": "RAW"}, "id": "1", "type": "tool_call"}
    by_tool = agent(Scripted(reply=lambda m: AIMessage("", tool_calls=[call])), response_format=ToolStrategy(Verdict))
    assert by_tool.invoke(ASK)["structured_response"] == Verdict(text="RAW")
    by_provider = agent(saying('{"text": "RAW"}'), response_format=ProviderStrategy(Verdict))
    state = asyncio.run(by_provider.ainvoke(ASK))
    assert state["structured_response"] == Verdict(text="RAW")
    assert last(state).content == '{"text": "RAW"}'


def test_a_human_in_the_loop() -> None:
    human = HumanInTheLoopMiddleware(interrupt_on={"weather": True})
    graph = agent(before=[human], checkpointer=InMemorySaver())
    config = {"configurable": {"thread_id": "1"}}
    assert "__interrupt__" in graph.invoke(ASK, config)
    state = graph.invoke(Command(resume={"decisions": [{"type": "approve"}]}), config)
    assert last(state).content == "good for why answer"


def failing() -> Scripted:
    def reply(messages: list[BaseMessage]) -> AIMessage:
        raise ConnectionError("down")

    return Scripted(reply=reply)


def shown(graph: Any) -> str:
    return "".join(chunk.text for chunk, _ in graph.stream(ASK, stream_mode="messages") if isinstance(chunk, AIMessage))


def test_a_fallback_before_it_shows_nothing_raw_and_one_after_it_is_warned_of() -> None:
    fallback = ModelFallbackMiddleware(saying("RAW fallback"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert shown(agent(failing(), before=[fallback])) == "good for why fallback"
    with pytest.warns(RuntimeWarning, match="List AlignerMiddleware last"):
        assert last(agent(failing(), after=[fallback]).invoke(ASK)).content == "good for why fallback"
    with pytest.warns(RuntimeWarning, match="raw tokens"):
        assert last(asyncio.run(agent(failing(), after=[fallback]).ainvoke(ASK))).content == "good for why fallback"


other = saying("RAW other")
CONFIGURABLE = ConfigurableField(id="which")


def by_name(model: str, **kwargs: Any) -> Any:
    """What `init_chat_model` makes of a name."""
    return tool_then_answer() if model == "first" else other


class Routed(RunnableLambda[Any, Any]):
    """What no aligner can be put into."""

    def bind_tools(self, tools: Any, **kwargs: Any) -> Any:
        return self


MODELS: dict[str, Any] = {
    "bound": lambda: tool_then_answer().bind(seed=1),
    "configured": lambda: tool_then_answer().with_config(tags=["x"]),
    "fallback": lambda: failing().with_fallbacks([tool_then_answer()]),
    "fallback of bound": lambda: failing().bind(seed=1).with_fallbacks([tool_then_answer().with_config(tags=["x"])]),
    "fields": lambda: tool_then_answer().configurable_fields(model_name=CONFIGURABLE),
    "alternatives": lambda: tool_then_answer().configurable_alternatives(CONFIGURABLE, other=other),
    "alternatives of fields": lambda: (
        tool_then_answer()
        .configurable_fields(model_name=ConfigurableField(id="name"))
        .configurable_alternatives(CONFIGURABLE, other=lambda: other.with_fallbacks([failing()]))
    ),
    "chosen by name": lambda: init_chat_model("first", model_provider="x", configurable_fields=["model"]),
    "chosen by name, with a config": lambda: init_chat_model(
        "first", model_provider="x", configurable_fields="any"
    ).with_config(tags=["x"]),
    "wrapped": lambda: AlignerRunnable(ALIGNER).wrap(failing().with_fallbacks([tool_then_answer()])),
    "wrapped alternatives": lambda: AlignerRunnable(ALIGNER).wrap(
        tool_then_answer().configurable_alternatives(CONFIGURABLE, other=other)
    ),
}


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("langchain.chat_models.base._init_chat_model_helper", by_name)


@pytest.mark.usefixtures("named")
@pytest.mark.parametrize("name", MODELS)
def test_whatever_holds_the_model_only_corrected_tokens_are_streamed(name: str) -> None:
    graph = agent(MODELS[name]())

    async def listen() -> str:
        parts = [chunk async for chunk, _ in graph.astream(ASK, stream_mode="messages")]
        return "".join(chunk.text for chunk in parts if isinstance(chunk, AIMessage))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert shown(graph) == "good for why answer"
        assert asyncio.run(listen()) == "good for why answer"
        state = graph.invoke(ASK)
    assert last(state).content == "good for why answer"
    assert last(state).response_metadata["aligner"]["changed"]


def test_a_model_with_retries_to_which_langchain_binds_no_tools() -> None:
    model: Any = saying("RAW answer").with_retry()
    graph = create_agent(model, [], middleware=[AlignerMiddleware(ALIGNER)])
    assert shown(graph) == "good for why answer"


@pytest.mark.usefixtures("named")
@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("alternatives", {"which": "other"}),
        ("alternatives of fields", {"which": "other"}),
        ("wrapped alternatives", {"which": "other"}),
        ("chosen by name", {"model": "other"}),
        ("chosen by name, with a config", {"model": "other"}),
    ],
)
def test_the_model_that_a_config_chooses_is_corrected(name: str, config: dict[str, str]) -> None:
    graph: Any = create_agent(MODELS[name](), [], middleware=[AlignerMiddleware(ALIGNER)])
    said = graph.stream(ASK, {"configurable": config}, stream_mode="messages")
    assert "".join(chunk.text for chunk, _ in said) == "good for why other"
    model = AlignerRunnable(ALIGNER).wrap(MODELS[name]())
    assert model.invoke("why", {"configurable": config}).content == "good for why other"
    assert [one.content for one in model.batch(["a", "b"], {"configurable": config})] == [
        "good for a other",
        "good for b other",
    ]
    assert "".join(chunk.text for chunk in model.stream("why", {"configurable": config})) == "good for why other"


def test_what_no_aligner_can_be_put_into_is_refused_before_it_is_called() -> None:
    called: list[Any] = []

    def reply(messages: Any) -> AIMessage:
        called.append(messages)
        return AIMessage("RAW")

    routed: Any = Routed(reply)
    graph: Any = create_agent(routed, [], middleware=[AlignerMiddleware(ALIGNER)])
    with pytest.raises(TypeError, match="not a Routed"):
        graph.invoke(ASK)
    assert not called
    graph = create_agent(routed, [], middleware=[AlignerMiddleware(ALIGNER, raw_streaming=True)])
    assert last(graph.invoke(ASK)).content == "good for why"


class Translator(AgentMiddleware[Any, Any, Any]):
    """Changes what a model has said."""

    def wrap_model_call(self, request: Any, handler: Any) -> Any:
        response = handler(request)
        return replace(response, result=[with_text(m, m.text + " RAW") if m.text else m for m in response.result])


def test_an_answer_that_was_changed_since_is_corrected_again() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert last(agent(after=[Translator()]).invoke(ASK)).content == "good for why answer good for why"
    chain = create_agent(saying("RAW"), middleware=[Translator(), AlignerMiddleware(ALIGNER)]) | AlignerRunnable(
        ALIGNER
    )
    assert last(chain.invoke(ASK)).content == "good for why good for why"


@pytest.mark.parametrize("place", ["before", "after"])
def test_other_middleware_on_either_side(place: str) -> None:
    others: list[AgentMiddleware] = [
        ModelRetryMiddleware(max_retries=1, initial_delay=0),
        PIIMiddleware("email", strategy="redact", apply_to_output=True),
        SummarizationMiddleware(model=saying("a summary"), trigger=("messages", 50)),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        graph = agent(**{place: others})
        assert last(graph.invoke(ASK)).content == "good for why answer"
        assert shown(graph) == "good for why answer"


def test_after_a_summary_the_question_is_still_the_users() -> None:
    summary = SummarizationMiddleware(model=saying("a summary"), trigger=("messages", 3), keep=("messages", 2))
    answer = last(agent(before=[summary]).invoke(ASK)).text
    assert answer.startswith("good for Here is a summary")  # all that is left of it
    keeping = SummarizationMiddleware(model=saying("a summary"), trigger=("messages", 3), keep=("messages", 3))
    assert last(agent(before=[keeping]).invoke(ASK)).content == "good for why answer"


def test_agents_within_agents() -> None:
    inner = create_agent(saying("RAW inner"), middleware=[AlignerMiddleware(ALIGNER)])

    @tool("weather")
    def ask_inner(place: str) -> str:
        """Ask another agent."""
        asked: Any = {"messages": [HumanMessage(f"at {place}")]}
        return last(inner.invoke(asked)).text

    outer = create_agent(tool_then_answer(), [ask_inner], middleware=[AlignerMiddleware(ALIGNER)])
    state = outer.invoke(ASK)
    assert state["messages"][2].content == "good for at RAW-Rome inner"
    assert last(state).content == "good for why answer"
    parts = [repr(part) for part in outer.stream(ASK, stream_mode="messages", subgraphs=True)]
    assert not [part for part in parts if "RAW" in part.replace("RAW-Rome", "")]


def test_an_aligned_model_and_a_middleware_align_once() -> None:
    made: list[Any] = []
    align = AlignerRunnable(ALIGNER, on_correction=made.append)
    graph = create_agent(align.wrap(tool_then_answer()), [weather], middleware=[AlignerMiddleware(align)])
    assert last(graph.invoke(ASK)).content == "good for why answer"
    assert len(made) == 1
    alone = create_agent(align.wrap(tool_then_answer()), [weather])
    assert shown(alone) == "good for why answer"


def test_options_beside_an_aligner_runnable_are_refused() -> None:
    with pytest.raises(TypeError, match="on_error"):
        AlignerMiddleware(AlignerRunnable(ALIGNER), on_error="passthrough")


def test_an_agent_with_an_aligner_to_its_right() -> None:
    chain = create_agent(tool_then_answer(), [weather]) | AlignerRunnable(ALIGNER)
    state = chain.invoke(ASK)
    assert last(state).content == "good for why answer"
    assert len(state["messages"]) == 4
    updates = list(chain.stream(ASK))
    assert [node for update in updates for node in update] == ["model", "tools", "model"]
    assert last(updates[-1]["model"]).content == "good for why answer"

    async def listen() -> list[Any]:
        return [update async for update in chain.astream(ASK)]

    assert last(asyncio.run(listen())[-1]["model"]).content == "good for why answer"


@pytest.mark.parametrize("inside", [False, True])
def test_as_a_node_of_a_graph_and_inside_of_one(inside: bool) -> None:
    align = AlignerRunnable(ALIGNER)
    model = saying("RAW node")

    def answer(state: MessagesState) -> Any:
        return {"messages": [(model | align if inside else model).invoke(state["messages"])]}

    builder = StateGraph(MessagesState)
    builder.add_node("answer", answer)
    builder.add_edge(START, "answer")
    if not inside:
        builder.add_node("align", align)
        builder.add_edge("answer", "align")
    graph = builder.compile()
    assert [message.content for message in graph.invoke(ASK)["messages"]] == ["why", "good for why node"]
    assert [m.content for m in asyncio.run(graph.ainvoke(ASK))["messages"]] == ["why", "good for why node"]
    *_, update = graph.stream(ASK, stream_mode="updates")
    assert [m.content for m in update["answer" if inside else "align"]["messages"]] == ["good for why node"]
