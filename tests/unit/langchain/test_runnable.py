"""`llm | AlignerRunnable()`: in every way of calling it, the answer meets the question that it was given to."""

import asyncio
import gc
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, assert_type

import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.language_models import FakeListLLM
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, SystemMessage
from langchain_core.messages.ai import UsageMetadata
from langchain_core.output_parsers import StrOutputParser
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import Runnable, RunnableConfig, RunnableLambda, RunnableParallel, RunnablePassthrough
from langchain_core.tracers import BaseTracer, Run
from pydantic import Field

from aligner_middleware import AlignerRunnable, InputError, MissingQuestionError, question_record
from aligner_middleware.langchain.messages import with_text
from tests.chat_models import Scripted, answering
from tests.fakes import FakeModel, fake_aligner


class Echo(Scripted):
    """Answers `bad(question)`; fails the first `failures` times."""

    reply: Any = answering().reply
    failures: int = 0
    usage: UsageMetadata = Field(default=UsageMetadata(input_tokens=1, output_tokens=2, total_tokens=3))

    def _generate(self, *args: Any, **kwargs: Any) -> ChatResult:
        if self.failures:
            self.failures -= 1
            raise ValueError("busy")
        return super()._generate(*args, **kwargs)


ALIGNER = fake_aligner(lambda question, answer: answer.replace("bad", f"good for {question}"))


@pytest.fixture
def align() -> AlignerRunnable:
    question_record.clear()
    return AlignerRunnable(ALIGNER)


def good(question: str) -> str:
    return f"good for {question}({question})"


def test_invoke_keeps_everything_but_the_text(align: AlignerRunnable) -> None:
    answer = (Echo() | align).invoke("Why?")
    assert answer.content == good("Why?")
    assert answer.id.startswith("lc_run--")
    assert answer.usage_metadata["total_tokens"] == 3
    report = answer.response_metadata["aligner"]
    assert report["aligned"] and report["changed"] and report["model"] == "fake"
    assert report["usage"]["passes"] > 1
    assert "original" not in report


def test_every_way_of_calling(align: AlignerRunnable) -> None:
    chain = Echo() | align
    questions: list[Any] = [f"q{n}" for n in range(7)]
    wanted = [good(question) for question in questions]

    async def asynchronously() -> None:
        assert (await chain.ainvoke("a")).content == good("a")
        assert [m.content for m in await chain.abatch(questions)] == wanted
        assert "".join([chunk.text async for chunk in chain.astream("b")]) == good("b")
        together = await asyncio.gather(*(chain.ainvoke(question) for question in questions))
        assert [m.content for m in together] == wanted

    assert [m.content for m in chain.batch(questions)] == wanted
    chunks = list(chain.stream("c"))
    assert len(chunks) > 1
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert whole.content == good("c")
    assert whole.response_metadata["aligner"]["changed"]
    asyncio.run(asynchronously())


def test_threads(align: AlignerRunnable) -> None:
    chain = Echo() | StrOutputParser() | align
    questions = [f"q{n}" for n in range(40)]
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(chain.invoke, questions)) == [good(question) for question in questions]


def test_text_after_a_parser_and_a_text_model(align: AlignerRunnable) -> None:
    assert (Echo() | StrOutputParser() | align).invoke("x") == good("x")
    assert "".join((Echo() | StrOutputParser() | align).stream("x")) == good("x")
    assert (FakeListLLM(responses=["bad(x)"]) | align).invoke("x") == good("x")


def test_text_that_was_changed_on_the_way_has_one_candidate_only(align: AlignerRunnable) -> None:
    chain = Echo() | StrOutputParser() | RunnableLambda(lambda text: text + "!") | align
    assert chain.invoke("x") == good("x") + "!"


def test_conversations_ask_their_last_human_message(align: AlignerRunnable) -> None:
    messages = [SystemMessage("be kind"), HumanMessage("first"), AIMessage("…"), HumanMessage("second")]
    assert (Echo() | align).invoke(messages).content == good("second")
    prompt = ChatPromptTemplate.from_messages([("system", "s"), ("human", "{topic}?")])
    assert (prompt | Echo() | align | StrOutputParser()).invoke({"topic": "rain"}) == good("rain?")


def test_retries_fallbacks_and_nesting(align: AlignerRunnable) -> None:
    assert (Echo(failures=1).with_retry(wait_exponential_jitter=False) | align).invoke("x").content == good("x")
    failing = Echo(failures=99).with_fallbacks([Echo()])
    assert (failing | StrOutputParser() | align).invoke("x") == good("x")
    nested: Runnable[Any, Any] = RunnableLambda(lambda question: (Echo() | StrOutputParser()).invoke(question)) | align
    assert nested.invoke("x") == good("x")


def test_several_models_in_one_chain(align: AlignerRunnable) -> None:
    second: Runnable[Any, Any] = RunnableLambda(lambda answer: [HumanMessage("other " + answer.content)]) | Echo()
    assert (Echo() | second | align).invoke("x").content.startswith("good for other bad(x)")
    both = RunnableParallel(
        one=RunnableLambda(lambda x: x + "1") | Echo() | StrOutputParser() | align,
        two=RunnableLambda(lambda x: x + "2") | Echo() | StrOutputParser() | align,
    )
    assert both.invoke("q") == {"one": good("q1"), "two": good("q2")}


def test_it_never_guesses_between_candidates(align: AlignerRunnable) -> None:
    two = RunnableParallel(one=Echo(), two=RunnableLambda(lambda q: q + "?") | Echo())
    chain = two | RunnableLambda(lambda answers: answers["one"].content + " and more") | align
    with pytest.raises(MissingQuestionError, match="question="):
        chain.invoke("x")


def test_a_message_is_known_outside_its_chain_and_text_is_not(align: AlignerRunnable) -> None:
    message = Echo().invoke("x")
    assert align.invoke(message).content == good("x")
    with pytest.raises(MissingQuestionError):
        align.invoke("bad")
    assert AlignerRunnable(ALIGNER, on_missing_question="passthrough").invoke("bad") == "bad"


def test_a_question_that_is_given(align: AlignerRunnable) -> None:
    assert AlignerRunnable(ALIGNER, question="Q").invoke("bad") == "good for Q"
    assert AlignerRunnable(ALIGNER, question=lambda answer: answer[-1]).invoke("bad z") == "good for z z"
    assert align.invoke({"question": "Q", "answer": "bad", "more": 1}) == {
        "question": "Q",
        "answer": "good for Q",
        "more": 1,
    }
    explicit = {"question": RunnablePassthrough()} | RunnablePassthrough.assign(
        answer=(lambda row: row["question"]) | Echo()
    )
    assert (explicit | align).invoke("x")["answer"].content == good("x")


def test_options() -> None:
    unwanted = AlignerRunnable(ALIGNER, question="Q", when=lambda question, answer: "bad" not in answer)
    assert unwanted.invoke("bad") == "bad"
    broken = "bad \ud800"
    with pytest.raises(InputError):
        AlignerRunnable(ALIGNER, question="Q").invoke(broken)
    assert AlignerRunnable(ALIGNER, question="Q", on_error="passthrough").invoke(broken) == broken
    assert AlignerRunnable(ALIGNER, question="Q", fallback="Sorry.").invoke(broken) == "Sorry."
    marked = AlignerRunnable(ALIGNER, question="Q", on_error="passthrough").invoke(AIMessage(broken))
    assert marked.response_metadata["aligner"]["aligned"] is False
    kept = AlignerRunnable(ALIGNER, question="Q", keep_original=True).invoke(AIMessage("bad"))
    assert kept.response_metadata["aligner"]["original"] == "bad"


def test_one_failure_in_a_batch_stays_alone() -> None:
    align = AlignerRunnable(ALIGNER, question="Q")
    first, second = align.batch(["bad", "bad \ud800"], return_exceptions=True)
    assert first == "good for Q"
    assert isinstance(second, InputError)


def test_tool_calls_pass_through_and_blocks_stay(align: AlignerRunnable) -> None:
    call = AIMessage("", tool_calls=[{"name": "f", "args": {}, "id": "1"}])
    assert align.invoke(call) is call
    blocks: list[str | dict[Any, Any]] = [
        {"type": "reasoning", "reasoning": "hm"},
        {"type": "text", "text": "ba"},
        {"type": "text", "text": "d"},
    ]
    answer = AlignerRunnable(ALIGNER, question="Q").invoke(AIMessage(blocks))
    assert answer.content == [blocks[0], {"type": "text", "text": "good for Q"}]


def test_what_is_no_answer_is_refused(align: AlignerRunnable) -> None:
    with pytest.raises(InputError, match="right of the model"):
        align.invoke(42)  # type: ignore[type-var]


def test_more_calls_than_it_remembers_leave_a_bounded_record(align: AlignerRunnable) -> None:
    chain = Echo() | StrOutputParser() | AlignerRunnable(ALIGNER, when=lambda question, answer: False)
    for number in range(1_500):
        chain.invoke(f"q{number}")
    assert 0 < question_record.remembered <= 1024
    assert question_record.running == 0
    next(iter(chain.stream("abandoned")))
    gc.collect()
    assert question_record.running == 0


def test_recording_can_be_switched_off(align: AlignerRunnable) -> None:
    question_record.enabled = False
    try:
        with pytest.raises(MissingQuestionError):
            (Echo() | align).invoke("x")
    finally:
        question_record.enabled = True


@pytest.mark.parametrize("parse", [False, True])
def test_an_answer_is_read_while_it_is_still_streamed(parse: bool) -> None:
    aligner = fake_aligner(lambda question, answer: answer)
    read: list[int] = []

    class Slow(Echo):
        def _stream(self, *args: Any, **kwargs: Any) -> Iterator[ChatGenerationChunk]:
            for _ in range(40):
                time.sleep(0.003)
                yield ChatGenerationChunk(message=AIMessageChunk(content="words, "))
            read.append(aligner.fake_model.tokens)

    question_record.clear()
    chain = Slow() | StrOutputParser() | AlignerRunnable(aligner) if parse else Slow() | AlignerRunnable(aligner)
    pieces = list(chain.stream("what?"))
    assert "".join(piece if isinstance(piece, str) else piece.content for piece in pieces) == "words, " * 40
    assert read[0] > 0.5 * len("words, ") * 40
    aligner.close()


def test_many_tasks_share_passes_of_one_aligner(align: AlignerRunnable) -> None:
    chain = Echo() | align

    async def main() -> list[Any]:
        return await asyncio.gather(*(chain.ainvoke(f"{number}") for number in range(40)))

    assert [message.content for message in asyncio.run(main())] == [good(f"{number}") for number in range(40)]


def test_a_trace_holds_a_named_run_with_what_came_in_and_what_went_out() -> None:
    runs: list[Run] = []

    class Tracer(BaseTracer):
        def _persist_run(self, run: Run) -> None:
            runs.append(run)

    (Echo() | AlignerRunnable(ALIGNER, name="house style")).invoke("x", {"callbacks": [Tracer()]})
    step = next(run for run in runs[0].child_runs if run.name == "house style")
    assert step.outputs is not None
    assert (step.inputs["input"].content, step.outputs["output"].content) == ("bad(x)", good("x"))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_custom_event_tells_of_each_answer(align: AlignerRunnable, asynchronous: bool) -> None:
    told: list[dict[str, Any]] = []

    class Ear(BaseCallbackHandler):
        def on_custom_event(self, name: str, data: Any, **kwargs: Any) -> None:
            told.append({"name": name, **data})

    chain, config = Echo() | align, RunnableConfig(callbacks=[Ear()])

    async def calls() -> None:
        await chain.ainvoke("a", config)
        await chain.abatch(["b", "c"], config)
        [_ async for _ in chain.astream("d", config)]

    if asynchronous:
        asyncio.run(calls())
    else:
        chain.invoke("a", config)
        chain.batch(["b", "c"], config)
        list(chain.stream("d", config))
    assert [(event["name"], event["changed"], event["model"]) for event in told] == [
        ("aligner_correction", True, "fake")
    ] * 4
    assert "original" not in told[0]


def test_a_state_and_an_agents_update_are_corrected_in_place(align: AlignerRunnable) -> None:
    asked, said = HumanMessage("x"), AIMessage("bad", id="7")
    state: dict[str, Any] = {"messages": [asked, said], "more": 1}
    aligned = align.invoke(state)
    assert aligned["messages"][1].content == "good for x"
    assert (aligned["messages"][0], aligned["messages"][1].id, aligned["more"]) == (asked, "7", 1)
    assert state["messages"] == [asked, said]
    unanswered = {"messages": [asked]}
    assert align.invoke(unanswered) is unanswered
    dialogue = AlignerRunnable(ALIGNER, dialogue=True).invoke(
        {"messages": [asked, AIMessage("y"), HumanMessage("z"), said]}
    )
    assert dialogue["messages"][-1].content == "good for User: x\n\nAssistant: y\n\nUser: z"


def test_whole_dialogues_are_recorded_once_they_are_wanted() -> None:
    chain = Echo() | StrOutputParser() | AlignerRunnable(ALIGNER, dialogue=True)
    turns = [HumanMessage("a"), AIMessage("b"), HumanMessage("c")]
    assert chain.invoke(turns) == "good for User: a\n\nAssistant: b\n\nUser: c(c)"
    question_record.dialogues = False


def test_a_pass_that_fails_is_the_policys_to_decide() -> None:
    class Broken(FakeModel):
        def append(self, *args: Any) -> Any:
            raise RuntimeError("out of order")

    def broken(**policy: Any) -> AlignerRunnable:
        aligner = fake_aligner(lambda question, answer: answer)
        aligner.fake_model.__class__ = Broken
        return AlignerRunnable(aligner, question="q", **policy)

    with pytest.raises(RuntimeError, match="out of order"):
        broken().invoke("answer")
    with pytest.raises(RuntimeError, match="out of order"):
        asyncio.run(broken().ainvoke("answer"))
    assert broken(on_error="passthrough").batch(["one", "two"]) == ["one", "two"]
    assert asyncio.run(broken(fallback="Sorry.").ainvoke("answer")) == "Sorry."
    assert list(broken(on_error="passthrough").stream("answer")) == ["answer"]


@pytest.mark.parametrize(
    "content", ["bad", [{"type": "reasoning", "reasoning": "hm"}, {"type": "text", "text": "bad"}]]
)
def test_an_aligned_message_is_aligned_again_once_its_text_was_changed(content: Any) -> None:
    align = AlignerRunnable(ALIGNER, question="Q")
    first = align.invoke(AIMessage(content))
    assert align.invoke(first) is first
    edited = with_text(first, "bad, as a translator has it")
    assert align.invoke(edited).text == "good for Q, as a translator has it"
    other = AlignerRunnable(fake_aligner(lambda question, answer: "never"), question="Q")
    assert other.invoke(first) is first  # of the same name
    streamed = joined(align.stream(AIMessageChunk(content="bad")))
    assert align.invoke(streamed) is streamed
    assert align.invoke(streamed.model_copy(update={"content": "bad"})).text == "good for Q"


def joined(chunks: Any) -> Any:
    whole, *rest = chunks
    for chunk in rest:
        whole += chunk
    return whole


def test_what_it_takes_and_gives_is_typed(align: AlignerRunnable) -> None:
    assert align.InputType == align.OutputType == str | AIMessage | dict[str, Any]
    kinds = align.get_input_jsonschema()["anyOf"]
    assert [kind.get("type", kind.get("$ref")) for kind in kinds] == ["string", "#/$defs/AIMessage", "object"]
    assert (answering() | align).get_output_jsonschema()["anyOf"] == kinds
    given = AlignerRunnable(ALIGNER, question="Q")
    assert_type(given.invoke("bad"), str)
    assert_type(given.invoke(AIMessage("bad")), AIMessage)
    assert_type(given.batch(["bad", "bad"]), list[str])


def test_it_shows_itself_in_one_short_line() -> None:
    assert repr(AlignerRunnable(ALIGNER)) == f"AlignerRunnable({ALIGNER!r})"
    align = AlignerRunnable(ALIGNER, strength="high", on_error="passthrough", timeout=3, question=lambda value: "q")
    shown = f"AlignerRunnable({ALIGNER!r}, strength='high', on_error='passthrough', timeout=3.0)"
    assert repr(align) == str(align) == shown
    assert shown in repr(answering() | align)


def test_importing_the_runnable_loads_neither_the_runtime_nor_a_hub_nor_a_terminal() -> None:
    heavy = ("numpy", "onnxruntime", "tokenizers", "tiktoken", "huggingface_hub", "rich", "langchain", "torch")
    code = (
        f"import sys; from aligner_middleware import AlignerRunnable; print([m for m in {heavy} if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "[]", result.stderr
