"""Whoever is asked for JSON, in whatever way, is left alone; and what parses as JSON never becomes what does not."""

import asyncio
import warnings
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import ModelCallLimitMiddleware
from langchain_core.messages import AIMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.runnables import RunnableLambda
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

from aligner_middleware import AlignerMiddleware, AlignerRunnable, DoubtError, question_record
from aligner_middleware.langchain.structured import asks_for_structure
from tests.chat_models import Scripted, saying
from tests.fakes import InstantAligner, fake_aligner

UPPER = InstantAligner(lambda question, answer: answer.upper())
JSON = '{"quote": "you fool"}'
SCHEMA = {"type": "object", "properties": {"quote": {"type": "string"}}}


class Quote(BaseModel):
    quote: str


ASKED: dict[str, dict[str, Any]] = {
    "OpenAI": {"response_format": {"type": "json_object"}},
    "OpenAI, a class": {"response_format": Quote},
    "OpenAI, responses": {"text": {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}}},
    "OpenAI, set": {"model_kwargs": {"response_format": {"type": "json_object"}}},
    "Anthropic": {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
    "Anthropic, before": {"output_format": {"type": "json_schema", "schema": SCHEMA}},
    "Bedrock": {"outputConfig": {"textFormat": {"type": "json_schema", "structure": {"jsonSchema": {}}}}},
    "Gemini": {"response_mime_type": "application/json"},
    "Gemini, a schema": {"generation_config": {"responseSchema": SCHEMA}},
    "Ollama": {"format": "json"},
    "Ollama, a schema": {"format": SCHEMA},
    "vLLM": {"extra_body": {"structured_outputs": {"json": SCHEMA}}},
    "vLLM, before": {"extra_body": {"guided_json": SCHEMA}},
    "vLLM, a choice": {"extra_body": {"guided_choice": ["yes", "no"]}},
    "vLLM, as OpenAI": {"extra_body": {"response_format": {"type": "json_object"}}},
    "SGLang": {"extra_body": {"json_schema": "{}"}},
    "llama.cpp": {"grammar": "root ::= object"},
    "what nobody knows yet": {"answer": {"shape": {"type": "json_schema", "schema": SCHEMA}}},
}
NOT_ASKED: dict[str, dict[str, Any]] = {
    "nothing": {},
    "plain": {"response_format": {"type": "text"}},
    "plain text": {"text": {"format": {"type": "text"}, "verbosity": "low"}, "response_mime_type": "text/plain"},
    "null": {"response_format": None, "format": "", "extra_body": None, "model_kwargs": None, "json_schema": {}},
    "effort": {"output_config": {"effort": "high"}},
    "sound": {"audio": {"voice": "alloy", "format": "wav"}},
    "tools": {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"format": SCHEMA}}}]},
}


class Kept(Scripted):
    """A model with fields for what it is asked."""

    response_format: Any = None
    extra_body: Any = None
    model_kwargs: Any = None


def kept(**options: Any) -> Kept:
    return Kept(reply=saying(JSON).reply, **options)


@pytest.mark.parametrize("way", ASKED)
def test_json_that_was_asked_for_is_left_alone(way: str) -> None:
    question_record.clear()
    asked, align = ASKED[way], AlignerRunnable(UPPER)
    for model in (saying(JSON).bind(**asked), kept(model_kwargs=asked), kept(extra_body=asked)):
        wrapped = align.wrap(model)
        assert wrapped.invoke("q").content == JSON
        assert "".join(chunk.text for chunk in wrapped.stream("q")) == JSON
    assert align.wrap(saying(JSON)).bind(**asked).invoke("q").content == JSON
    assert asyncio.run(align.wrap(saying(JSON)).bind(**asked).ainvoke("q")).content == JSON
    chain = saying(JSON).bind(**asked) | align
    assert chain.invoke("q").content == JSON
    assert asyncio.run(chain.ainvoke("q")).content == JSON
    assert "".join(chunk.text for chunk in chain.stream("q")) == JSON
    assert (saying(JSON).bind(**asked) | StrOutputParser() | align).invoke("q") == JSON


@pytest.mark.parametrize("way", NOT_ASKED)
def test_what_is_not_asked_for_json_is_corrected(way: str) -> None:
    question_record.clear()
    given, align = NOT_ASKED[way], AlignerRunnable(UPPER)
    assert align.wrap(saying("you fool").bind(**given)).invoke("q").content == "YOU FOOL"
    assert (saying("you fool").bind(**given) | align).invoke("q").content == "YOU FOOL"
    assert not asks_for_structure(given)


def test_what_is_said_of_a_run_is_not_asked_of_the_model() -> None:
    question_record.clear()
    noted = kept(metadata={"response_format": "json", "format": "json"}, tags=["json_schema"])
    assert AlignerRunnable(UPPER).wrap(noted).invoke("q").content == JSON.upper()
    assert (noted | AlignerRunnable(UPPER)).invoke("q").content == JSON.upper()


def test_what_is_given_in_a_call_goes_before_what_a_model_is_made_with() -> None:
    made = kept(response_format={"type": "json_object"})
    assert AlignerRunnable(UPPER).wrap(made).invoke("q").content == JSON
    assert AlignerRunnable(UPPER).wrap(made).invoke("q", response_format={"type": "text"}).content == JSON.upper()
    openai = ChatOpenAI(model="m", api_key="k", model_kwargs={"response_format": {"type": "json_object"}})
    assert asks_for_structure(vars(openai))
    assert not asks_for_structure(vars(ChatOpenAI(model="m", api_key="k")))
    assert asks_for_structure(vars(openai), openai.bind(response_format=Quote).kwargs)


@pytest.mark.parametrize("raw_streaming", [False, True])
@pytest.mark.parametrize("asked", ["OpenAI", "vLLM"])
def test_an_agent_whose_model_is_asked_for_json(asked: str, raw_streaming: bool) -> None:
    class Settings(ModelCallLimitMiddleware):
        def wrap_model_call(self, request: Any, handler: Any) -> Any:
            return handler(request.override(model_settings=ASKED[asked]))

    ask: Any = {"messages": [("user", "q")]}
    model: Any = saying(JSON).bind(**ASKED[asked])
    align = AlignerMiddleware(UPPER, raw_streaming=raw_streaming)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bound = create_agent(model, [], middleware=[align])
        assert bound.invoke(ask)["messages"][-1].content == JSON
        settings = create_agent(saying(JSON), [], middleware=[Settings(run_limit=9), align])
        assert settings.invoke(ask)["messages"][-1].content == JSON


def test_only_the_answer_that_json_was_asked_for_is_left_alone() -> None:
    question_record.clear()
    align = AlignerRunnable(UPPER)
    both = {"one": saying(JSON).bind(format="json"), "two": saying("you fool")}
    chain = both | RunnableLambda(lambda said: [align.invoke(said["one"]).text, align.invoke(said["two"]).text])
    assert chain.invoke("q") == [JSON, "YOU FOOL"]
    changed = saying(JSON).bind(format="json") | StrOutputParser() | RunnableLambda(lambda text: "you fool") | align
    assert changed.invoke("q") == "YOU FOOL"


def spoiled(question: str, answer: str) -> str:
    return answer.replace('fool"}', 'x"')


FENCED = f"```json\n{JSON}\n```"
THOUGHT = f"<think>hm</think>\n{JSON}"


@pytest.mark.parametrize("answer", [JSON, f"{JSON}\n", FENCED, THOUGHT, f"[{JSON}, {JSON}]"])
@pytest.mark.parametrize("aligner", [InstantAligner(lambda q, a: spoiled(q, a) + "!"), fake_aligner(spoiled)])
@pytest.mark.parametrize(
    "options", [{}, {"on_doubt": "keep"}, {"max_answer_tokens": 20, "on_long_answer": "piecewise"}]
)
def test_what_parses_as_json_never_becomes_what_does_not(answer: str, aligner: Any, options: dict[str, Any]) -> None:
    align = AlignerRunnable(aligner, question="q", **options)
    for value in (align.invoke(AIMessage(answer)), asyncio.run(align.ainvoke(AIMessage(answer)))):
        assert value.content == answer
        assert "structure" in value.response_metadata["aligner"]["doubts"]
        assert value.response_metadata["aligner"]["changed"] is False
    model = align.wrap(saying(answer))
    assert "".join(chunk.text for chunk in model.stream("q")) == answer

    async def listen() -> str:
        return "".join([chunk.text async for chunk in model.astream("q")])

    assert asyncio.run(listen()) == answer


@pytest.mark.parametrize("answer", [JSON, FENCED, THOUGHT])
def test_json_that_stays_json_is_corrected(answer: str) -> None:
    align = AlignerRunnable(
        InstantAligner(lambda question, said: said.replace("you fool", "you")), question="q", on_doubt="keep"
    )
    assert align.invoke(answer) == answer.replace("you fool", "you")
    assert "".join(align.stream(answer)) == answer.replace("you fool", "you")


def test_a_correction_that_is_no_json_raises_where_doubts_do_and_a_fallback_is_the_users_word() -> None:
    with pytest.raises(DoubtError, match="structure"):
        AlignerRunnable(InstantAligner(spoiled), question="q", on_doubt="raise").invoke(JSON)
    assert AlignerRunnable(InstantAligner(spoiled), question="q", on_doubt="raise", fallback="{}").invoke(JSON) == "{}"
    shadow = AlignerRunnable(InstantAligner(spoiled), question="q", mode="shadow").invoke(AIMessage(JSON))
    report = shadow.response_metadata["aligner"]
    assert (report["would_change"], report["proposed"]) == (False, spoiled("q", JSON))
