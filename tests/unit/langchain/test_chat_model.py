"""`AlignerRunnable.wrap(llm)`: in all but the text of its answers the inner model."""

import asyncio
from typing import Any, assert_type

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler, get_usage_metadata_callback
from langchain_core.language_models import BaseChatModel, FakeListLLM, FakeMessagesListChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage
from langchain_core.rate_limiters import InMemoryRateLimiter
from langchain_core.runnables import ConfigurableField, RunnableBinding, RunnableLambda
from langchain_core.tools import tool
from langchain_core.tracers import BaseTracer, Run
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

from aligner_middleware import AlignedChatModel, AlignerRunnable, MissingQuestionError
from tests.chat_models import USAGE, Scripted, answering, saying
from tests.fakes import fake_aligner

ALIGNER = fake_aligner(lambda question, answer: answer.replace("bad", f"good for {question}"))


def good(question: str) -> str:
    return f"good for {question}({question})"


def wrap(llm: Any, **options: Any) -> Any:
    return AlignerRunnable.wrap(llm, ALIGNER, **options)


class Ear(BaseCallbackHandler):
    """Hears all that a callback is told, as text."""

    def __init__(self) -> None:
        self.heard: list[str] = []
        self.events: list[dict[str, Any]] = []

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("on_") and name != "on_custom_event":
            heard = object.__getattribute__(self, "heard")
            return lambda *args, **kwargs: heard.append(f"{name} {args!r} {kwargs!r}")
        return object.__getattribute__(self, name)

    def on_custom_event(self, name: str, data: Any, **kwargs: Any) -> None:
        self.events.append({"name": name, **data})


class Runs(BaseTracer):
    def __init__(self) -> None:
        super().__init__()
        self.runs: list[Run] = []

    def _persist_run(self, run: Run) -> None:
        self.runs.append(run)


def added(chunks: list[AIMessageChunk]) -> AIMessageChunk:
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    return whole


def test_an_answer_is_corrected_and_all_else_is_the_inner_models() -> None:
    message = wrap(answering()).invoke("why", stop=["x"], seed=3)
    assert message.content == good("why")
    assert message.usage_metadata == USAGE
    assert message.id.startswith("lc_run--")
    report = message.response_metadata.pop("aligner")
    assert report["aligned"] and report["changed"]
    assert message.response_metadata == {"model_name": "scripted", "stop": ["x"], "seed": 3, "calls": 1}


def test_every_generation_is_aligned() -> None:
    result = wrap(answering().model_copy(update={"n": 3})).generate([[HumanMessage("a")], [HumanMessage("b")]])
    assert [[one.text for one in generations] for generations in result.generations] == [
        [good("a")] * 3,
        [good("b")] * 3,
    ]
    assert result.llm_output == answering().generate([[HumanMessage("a")]]).llm_output


@pytest.mark.parametrize("asynchronous", [False, True])
def test_chunks_add_up_to_the_message_with_id_usage_metadata_and_the_last_mark(asynchronous: bool) -> None:
    model = wrap(answering())

    async def collect() -> list[AIMessageChunk]:
        return [chunk async for chunk in model.astream("why")]

    chunks = asyncio.run(collect()) if asynchronous else list(model.stream("why"))
    assert len(chunks) > 1
    assert all(isinstance(chunk, AIMessageChunk) for chunk in chunks)
    whole = added(chunks)
    assert whole.content == good("why")
    assert whole.usage_metadata == USAGE
    assert {chunk.id for chunk in chunks} == {whole.id}
    assert whole.id and whole.id.startswith("lc_run--")
    assert [chunk.chunk_position for chunk in chunks] == [None] * (len(chunks) - 1) + ["last"]
    assert whole.response_metadata["finish_reason"] == "stop"
    assert whole.response_metadata["model_name"] == "scripted"
    assert whole.response_metadata["aligner"]["changed"]


@pytest.mark.parametrize("policy", [{"on_error": "passthrough"}, {"on_error": "raise"}])
def test_no_callback_event_or_stream_hears_a_raw_token(policy: dict[str, Any]) -> None:
    model, ear = wrap(answering(), **policy), Ear()
    chain = model | RunnableLambda(lambda message: message)
    config = {"callbacks": [ear]}

    async def listen() -> None:
        await model.ainvoke("why", config)
        async for chunk in model.astream("why", config):
            ear.heard.append(repr(chunk))
        async for event in chain.astream_events("why", version="v2"):
            ear.heard.append(repr(event))
        async for event in model.astream_events("why", version="v2"):
            ear.heard.append(repr(event))

    model.invoke("why", config)
    ear.heard += [repr(chunk) for chunk in model.stream("why", config)]
    asyncio.run(listen())
    assert any("good for why" in heard for heard in ear.heard)
    assert not [heard for heard in ear.heard if "bad(" in heard]


def test_one_call_is_one_run_and_usage_counts_once() -> None:
    tracer = Runs()
    with get_usage_metadata_callback() as usage:
        wrap(answering()).invoke("why", {"callbacks": [tracer]})
        assert usage.usage_metadata["scripted"]["total_tokens"] == 8
        list(wrap(answering()).stream("why", {"callbacks": [tracer]}))
        assert usage.usage_metadata["scripted"]["total_tokens"] == 16
    assert [(run.run_type, run.name, len(run.child_runs)) for run in tracer.runs] == [
        ("llm", "AlignedChatModel", 0)
    ] * 2
    outputs = tracer.runs[0].outputs
    assert outputs is not None
    assert outputs["generations"][0][0]["text"] == good("why")


def test_a_custom_event_tells_of_each_correction() -> None:
    ear = Ear()
    wrap(answering()).invoke("why", {"callbacks": [ear]})
    (RunnableLambda(lambda x: x) | wrap(answering())).invoke("why", {"callbacks": [ear]})
    assert [(event["name"], event["changed"]) for event in ear.events] == [("aligner_correction", True)] * 2
    seen: list[Any] = []

    async def listen() -> None:
        async for event in (RunnableLambda(lambda x: x) | wrap(answering())).astream_events("why", version="v2"):
            seen.extend([event] if event["event"] == "on_custom_event" else [])

    asyncio.run(listen())
    assert [event["name"] for event in seen] == ["aligner_correction"]


def test_tools_are_bound_and_their_calls_are_not_touched() -> None:
    @tool
    def weather(place: str) -> str:
        """Tell the weather."""
        return "sunny"

    call = {"name": "weather", "args": {"place": "bad Rome"}, "id": "1", "type": "tool_call"}
    bound = wrap(Scripted(reply=lambda m: AIMessage("", tool_calls=[call]))).bind_tools([weather], tool_choice="any")
    assert isinstance(bound, RunnableBinding)
    assert isinstance(bound.bound, AlignedChatModel)
    assert bound.kwargs["tool_choice"] == "any"
    assert bound.invoke("?").tool_calls == [call]
    assert added(list(bound.stream("?"))).tool_calls == [call]
    text = Scripted(reply=lambda m: AIMessage("bad idea", tool_calls=[call]))
    assert wrap(text).invoke("q").content == "good for q idea"
    assert AlignedChatModel(llm=text, aligner=ALIGNER, final_only=True).invoke("q").content == "bad idea"


def test_json_that_was_asked_for_is_not_rewritten() -> None:
    class Joke(BaseModel):
        setup: str

    model = wrap(saying('{"setup": "bad"}'))
    assert model.bind(response_format={"type": "json_object"}).invoke("q").content == '{"setup": "bad"}'
    assert model.bind(response_format={"type": "text"}).invoke("q").content == '{"setup": "good for q"}'
    call = {"name": "Joke", "args": {"setup": "bad"}, "id": "1", "type": "tool_call"}
    structured = wrap(Scripted(reply=lambda m: AIMessage("", tool_calls=[call]))).with_structured_output(Joke)
    assert structured.invoke("q") == Joke(setup="bad")


def test_what_is_bound_configured_or_retried_stays_around_the_model() -> None:
    assert wrap(answering().bind(stop=["x"])).invoke("q").response_metadata["stop"] == ["x"]
    assert wrap(answering().with_retry()).invoke("q").content == good("q")
    failing = Scripted(reply=lambda messages: 1 / 0)
    assert wrap(failing.with_fallbacks([answering()])).invoke("q").content == good("q")
    tracer = Runs()
    wrap(answering()).with_config(run_name="mine", tags=["t"]).invoke("q", {"callbacks": [tracer]})
    assert (tracer.runs[0].name, tracer.runs[0].tags) == ("mine", ["t"])
    per_call = wrap(answering()).configurable_fields(when=ConfigurableField(id="when"))
    off = {"configurable": {"when": lambda question, answer: False}}
    assert per_call.invoke("q", off).content == "bad(q)"
    assert per_call.invoke("q").content == good("q")


def test_it_takes_the_inner_models_settings() -> None:
    limiter = InMemoryRateLimiter(requests_per_second=1000, check_every_n_seconds=0.001)
    ear = Ear()
    inner = answering().model_copy(
        update={
            "rate_limiter": limiter,
            "profile": {"tool_calling": True},
            "tags": ["a"],
            "metadata": {"b": 1},
            "callbacks": [ear],
        }
    )
    model = wrap(inner)
    assert model.rate_limiter is limiter
    assert model.profile == {"tool_calling": True}
    assert model.model_name == "scripted"
    assert model._llm_type == "scripted"
    assert model._get_ls_params() == inner._get_ls_params()
    assert model.get_num_tokens_from_messages is not None
    with pytest.raises(AttributeError):
        _ = model.no_such_thing
    model.invoke("q")
    assert ear.heard
    assert "'a'" in ear.heard[0]
    quiet = wrap(answering().model_copy(update={"disable_streaming": True}))
    assert len([chunk for chunk in quiet.stream("q") if chunk.content]) == 1


def test_a_cache_holds_aligned_answers_apart_from_raw_ones_and_from_other_aligners() -> None:
    cache = InMemoryCache()
    raw = answering().model_copy(update={"cache": cache})
    other = AlignerRunnable.wrap(raw, fake_aligner(lambda question, answer: "other", max_new_tokens=50))
    for _ in range(2):
        assert raw.invoke("q").content == "bad(q)"
        assert wrap(raw).invoke("q").content == good("q")
        assert other.invoke("q").content == "other"
    assert len(cache._cache) == 3


def test_a_model_that_does_not_stream_is_not_made_to() -> None:
    model = wrap(FakeMessagesListChatModel(responses=[AIMessage("bad")]))
    (message,) = model.stream("q")
    assert message.content == "good for q"


def test_content_blocks_stream_whole_and_in_place() -> None:
    blocks: list[Any] = [
        {"type": "reasoning", "reasoning": "hm", "index": 0},
        {"type": "text", "text": "bad", "index": 1},
    ]
    model = wrap(Scripted(reply=lambda messages: AIMessage(blocks)))
    assert [block["type"] for block in model.invoke("q").content] == ["reasoning", "text"]
    whole = added(list(model.stream("q")))
    content: list[Any] = list(whole.content)
    assert [block.get("text") for block in content] == [None, "good for q"]


def test_questions_that_are_given_and_whole_dialogues() -> None:
    messages = [HumanMessage("one"), AIMessage("uno"), HumanMessage("two")]
    assert wrap(saying("bad")).invoke(messages).content == "good for two"
    assert wrap(saying("bad"), question="Q").invoke(messages).content == "good for Q"
    assert wrap(saying("bad"), question=lambda asked: asked[0].text).invoke(messages).content == "good for one"
    dialogue = wrap(saying("bad"), dialogue=True).invoke(messages).content
    assert dialogue == "good for User: one\n\nAssistant: uno\n\nUser: two"
    with pytest.raises(MissingQuestionError):
        wrap(saying("bad")).invoke([AIMessage("hello")])
    unasked = wrap(saying("bad"), on_missing_question="passthrough").invoke([AIMessage("hello")])
    assert (unasked.content, unasked.response_metadata["aligner"]["aligned"]) == ("bad", False)


def test_wrap_on_an_instance_keeps_its_options_and_refuses_others() -> None:
    align = AlignerRunnable(ALIGNER, when=lambda question, answer: False)
    assert align.wrap(answering()).invoke("q").content == "bad(q)"
    with pytest.raises(TypeError, match="options already"):
        align.wrap(answering(), on_error="passthrough")
    with pytest.raises(TypeError, match=r"llm \| AlignerRunnable"):
        wrap(FakeListLLM(responses=["x"]))


def test_two_aligners_in_a_row_align_once() -> None:
    made: list[Any] = []
    align = AlignerRunnable(ALIGNER, on_correction=made.append)
    assert (align.wrap(answering()) | align).invoke("q").content == good("q")
    assert len(made) == 1


def test_it_is_a_chat_model() -> None:
    assert isinstance(wrap(answering()), BaseChatModel)


def test_wrap_is_typed_as_what_it_gives() -> None:
    assert_type(AlignerRunnable.wrap(answering(), ALIGNER), AlignedChatModel)
    assert_type(AlignerRunnable(ALIGNER).wrap(answering()), AlignedChatModel)
    model: BaseChatModel = AlignerRunnable.wrap(answering(), ALIGNER)
    assert isinstance(model, AlignedChatModel)


def test_it_shows_itself_in_one_short_line() -> None:
    model = wrap(answering(), mode="shadow")
    assert repr(model) == str(model) == f"AlignedChatModel(Scripted('scripted'), {ALIGNER!r}, mode='shadow')"
    nameless = wrap(FakeMessagesListChatModel(responses=[AIMessage("bad")]))
    assert repr(nameless) == f"AlignedChatModel(FakeMessagesListChatModel, {ALIGNER!r})"


def test_options_that_it_lacks_are_the_inner_models() -> None:
    inner = ChatOpenAI(model="one", api_key="key", temperature=0.5)
    model = AlignedChatModel(llm=inner, aligner=ALIGNER, model="two", max_tokens=7, tags=["t"])
    assert (model.model_name, model.max_tokens, model.temperature) == ("two", 7, 0.5)
    assert (model.tags, inner.model_name, inner.max_tokens) == (["t"], "one", None)
    with pytest.raises(TypeError, match="takes no option 'max_token'; did you mean 'max_tokens'"):
        AlignedChatModel(llm=inner, aligner=ALIGNER, max_token=7)
