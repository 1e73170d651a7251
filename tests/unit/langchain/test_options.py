"""What is done with an answer: when, for how long, up to which length, and the outcome of one that fails."""

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage
from langchain_core.runnables import ConfigurableField, RunnableConfig

from aligner_middleware import (
    AlignedChatModel,
    AlignerMiddleware,
    AlignerRunnable,
    Correction,
    CorrectionTimeoutError,
    DoubtError,
    InputError,
)
from aligner_middleware.langchain.outcome import unwrap
from aligner_middleware.text.split import split
from tests.chat_models import answering, saying
from tests.fakes import FakeModel, InstantAligner, fake_aligner

ALIGNER = fake_aligner(lambda question, answer: answer.replace("bad", "good"))
TEXT = st.lists(
    st.sampled_from(["word", " ", "\n\n", "\n", "One. Two! ", "```\n", "x" * 30, "é", "。"]), max_size=20
).map("".join)


def runnable(**options: Any) -> AlignerRunnable:
    return AlignerRunnable(ALIGNER, **{"question": "Q", **options})


class Slow(FakeModel):
    """Takes its time for a pass."""

    def append(self, *args: Any) -> Any:
        time.sleep(0.02)
        return super().append(*args)


def slow(**options: Any) -> AlignerRunnable:
    aligner = fake_aligner(lambda question, answer: answer)
    aligner.fake_model.__class__ = Slow
    return AlignerRunnable(aligner, question="Q", **options)


def test_a_correction_that_takes_too_long_is_given_up() -> None:
    answer = "word " * 40
    for call in (
        lambda: slow(timeout=0.05).invoke(answer),
        lambda: slow(timeout=0.05).batch([answer, answer]),
        lambda: list(slow(timeout=0.05).stream(answer)),
        lambda: asyncio.run(slow(timeout=0.05).ainvoke(answer)),
        lambda: asyncio.run(collected(slow(timeout=0.05), answer)),
    ):
        start = time.perf_counter()
        with pytest.raises(CorrectionTimeoutError, match=r"timeout=0\.05") as raised:
            call()
        assert isinstance(raised.value, TimeoutError)
        assert time.perf_counter() - start < 1
    assert slow(timeout=0.05, on_error="passthrough").invoke(answer) == answer
    assert asyncio.run(slow(timeout=0.05, fallback="Sorry.").ainvoke(answer)) == "Sorry."
    assert runnable(timeout=30).invoke("bad") == "good"
    with pytest.raises(InputError, match=r"^timeout is 0: Input should be greater than 0$"):
        runnable(timeout=0)
    with pytest.raises(
        InputError, match=r"^question is 5: Input should be a valid string, or Input should be callable$"
    ):
        runnable(question=5)


async def collected(align: Any, answer: Any) -> list[Any]:
    return [piece async for piece in align.astream(answer)]


def test_who_gives_up_leaves_the_aligner_to_others() -> None:
    align = slow(timeout=0.05, on_error="passthrough")
    assert align.invoke("word " * 40) == "word " * 40
    assert align.aligner.correct("Q", "a").corrected == "a"


@pytest.mark.parametrize("limit", [None, 4])
def test_long_answers(limit: int | None) -> None:
    short, long = "bad", "bad word " * (2 if limit else 1000)
    assert runnable(max_answer_tokens=limit).invoke(short) == "good"
    with pytest.raises(InputError):
        runnable(max_answer_tokens=limit).invoke(long)
    marked = runnable(max_answer_tokens=limit, on_long_answer="passthrough").invoke(AIMessage(long))
    assert (marked.content, marked.response_metadata["aligner"]["aligned"]) == (long, False)
    assert runnable(max_answer_tokens=limit, fallback="Too long.").invoke(long) == "Too long."


def test_a_long_answer_is_corrected_piece_by_piece_and_what_is_kept_is_kept_byte_for_byte() -> None:
    asked: list[tuple[str, str]] = []

    def correct(question: str, answer: str) -> str:
        return answer.replace("bad", "good")

    def noted(question: str, answer: str) -> bool:
        asked.append((question, answer))
        return True

    aligner = fake_aligner(correct)
    align = AlignerRunnable(
        aligner,
        question="Q",
        max_answer_tokens=30,
        on_long_answer="piecewise",
        when=noted,
        keep_original=True,
    )
    answer = "  First bad paragraph.\n\n\nSecond good one.\n \n```\ncode\n\nmore code\n```\n\nLast, a bad one.\n"
    wanted = answer.replace("bad", "good")
    message = align.invoke(AIMessage(answer))
    assert message.content == wanted
    report = message.response_metadata["aligner"]
    assert report["original"] == answer
    assert report["usage"]["passes"] > 3
    assert align.invoke(wanted) == wanted
    assert asyncio.run(align.ainvoke(answer)) == wanted
    assert "".join(align.stream(answer)) == wanted
    assert "".join(asyncio.run(collected(align, answer))) == wanted
    assert asked[0] == ("Q", answer)


def test_what_all_pieces_become_is_said_once() -> None:
    align = AlignerRunnable(
        fake_aligner(lambda question, answer: "No."), question="Q", max_answer_tokens=12, on_long_answer="piecewise"
    )
    assert align.invoke("One thing.\n\nAnother.\n\nA third.") == "No.\n\n"


def test_a_later_piece_is_asked_with_the_end_of_what_stands_before() -> None:
    align = AlignerRunnable(
        fake_aligner(lambda question, answer: f"<{question}|{answer}>"),
        question="Q",
        max_answer_tokens=12,
        on_long_answer="piecewise",
    )
    assert align.invoke("One thing.\n\nAnother.") == "<Q|One thing.>\n\n<Q Continue after: One thing.|Another.>"


@given(TEXT, st.integers(1, 40))
def test_pieces_are_the_text_and_fit(text: str, limit: int) -> None:
    pieces = split(text, limit, len)
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= limit for piece in pieces)


def test_paragraphs_and_code_stay_whole_where_they_fit() -> None:
    text = "One.\n\nTwo.\n\n```\na\n\nb\n```\n\nThree."
    assert split(text, 14, len) == ["One.\n\nTwo.\n\n", "```\na\n\nb\n```\n\n", "Three."]
    assert split(text, 100, len) == [text]


def test_options_per_call() -> None:
    align = AlignerRunnable(ALIGNER, question="Q").configurable_fields(
        fallback=ConfigurableField(id="fallback"),
        when=ConfigurableField(id="when"),
        max_answer_tokens=ConfigurableField(id="longest"),
        keep_original=ConfigurableField(id="keep"),
    )
    chain = answering() | align
    assert chain.invoke("q").content == "good(q)"
    sorry = RunnableConfig(configurable={"fallback": "Sorry.", "longest": 2})
    assert chain.invoke("q", sorry).content == "Sorry."
    assert chain.with_config(configurable={"when": lambda q, a: False}).invoke("q").content == "bad(q)"
    kept = asyncio.run(chain.ainvoke("q", {"configurable": {"keep": True}}))
    assert kept.response_metadata["aligner"]["original"] == "bad(q)"
    assert [m.content for m in chain.batch(["a", "b"], [sorry, {}])] == ["Sorry.", "good(b)"]


def test_a_users_function_that_fails_is_an_error_as_any_other() -> None:
    def broken(question: str, answer: str) -> bool:
        raise KeyError("oops")

    with pytest.raises(KeyError):
        runnable(when=broken).invoke("bad")
    assert runnable(when=broken, on_error="passthrough").invoke("bad") == "bad"


@pytest.mark.parametrize("limit", [None, 6])
def test_a_users_function_is_asked_once_an_answer(limit: int | None) -> None:
    asked: list[str] = []

    def noted(question: str, answer: str) -> bool:
        asked.append(answer)
        return True

    align = runnable(when=noted, max_answer_tokens=limit, on_long_answer="piecewise")
    answer = "bad one.\n\nbad two."
    for call in (
        lambda: align.invoke(answer),
        lambda: list(align.stream(answer)),
        lambda: asyncio.run(align.ainvoke(answer)),
        lambda: asyncio.run(collected(align, answer)),
    ):
        call()
        assert asked == [answer]
        asked.clear()


def test_corrections_are_told_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    told: list[Correction] = []
    align = runnable(on_correction=told.append)
    with caplog.at_level(logging.INFO, logger="aligner_middleware"):
        align.batch(["bad one", "fine"])
        list(align.stream("bad two"))
        asyncio.run(align.ainvoke("bad three"))
    assert [(c.original, c.changed) for c in told] == [
        ("bad one", True),
        ("fine", False),
        ("bad two", True),
        ("bad three", True),
    ]
    assert told[0].diff().removed == ["bad"]
    assert len([record for record in caplog.records if record.levelno == logging.INFO]) == 4
    assert not [record for record in caplog.records if "bad" in record.getMessage()]

    def broken(correction: Correction) -> None:
        raise RuntimeError("metrics are down")

    assert runnable(on_correction=broken).invoke("bad") == "good"
    assert "on_correction failed" in caplog.text


def test_a_slow_function_of_the_user_does_not_hold_up_the_event_loop() -> None:
    threads: set[str] = set()

    def when(question: str, answer: str) -> bool:
        threads.add(threading.current_thread().name)
        return True

    asyncio.run(runnable(when=when).ainvoke("bad"))
    assert threads.isdisjoint({threading.main_thread().name})


MAKERS: dict[str, Callable[..., Any]] = {
    "runnable": lambda **options: AlignerRunnable(ALIGNER, **options),
    "by name": lambda **options: AlignerRunnable("no such folder", **options),
    "wrap": lambda **options: AlignerRunnable.wrap(answering(), ALIGNER, **options),
    "wrapped model": lambda **options: AlignedChatModel(llm=answering(), aligner=ALIGNER, **options),
    "middleware": lambda **options: AlignerMiddleware(ALIGNER, **options),
    "configured": lambda **options: (
        AlignerRunnable(ALIGNER)
        .configurable_fields(**{name: ConfigurableField(id=name) for name in options})
        .invoke("bad", {"configurable": options})
    ),
}


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"on_error": "pasthrough"},
            "on_error is 'pasthrough', expected one of raise, passthrough; did you mean 'passthrough'",
        ),
        ({"on_error": "Sorry."}, r"a text that replaces the answer is given as fallback='Sorry\.'"),
        ({"on_error": None}, "on_error is None"),
        ({"on_missing_question": "rais"}, "did you mean 'raise'"),
        ({"on_doubt": "pass-through"}, "did you mean 'passthrough'"),
        ({"on_long_answer": "piece-wise"}, "did you mean 'piecewise'"),
        ({"mode": "shaddow"}, "did you mean 'shadow'"),
        ({"strength": "hi"}, "did you mean 'high'"),
        ({"strength": "strong"}, "expected one of low, medium, high, or a number$"),
        ({"on_error": "passthrough", "fallback": "Sorry."}, "give one of them"),
    ],
)
def test_a_misspelt_value_is_refused_when_the_object_is_made(maker: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message if maker != "wrapped model" else message.removesuffix("$")) as raised:
        MAKERS[maker](**options)
    assert maker == "wrapped model" or isinstance(raised.value, InputError)


@pytest.mark.parametrize("maker", [name for name in MAKERS if name != "configured"])
def test_a_misspelt_option_is_refused_when_the_object_is_made(maker: str) -> None:
    with pytest.raises(TypeError, match="takes no option 'on_eror'; did you mean 'on_error'"):
        MAKERS[maker](on_eror="raise")
    with pytest.raises(TypeError, match=r"takes no option 'colour': it takes .*\btimeout\b"):
        MAKERS[maker](colour="red")


def test_options_of_loading_and_of_the_middleware_have_nearest_names_too() -> None:
    with pytest.raises(TypeError, match="did you mean 'precision'"):
        AlignerRunnable(precison="int8")
    with pytest.raises(TypeError, match="did you mean 'raw_streaming'"):
        AlignerMiddleware(AlignerRunnable(ALIGNER), raw_steaming=True)
    with pytest.raises(TypeError, match="with a model's name only"):
        AlignerRunnable(ALIGNER, precision="int8")


class Failing(InstantAligner):
    def _made(self, question: str, answer: str) -> Correction:
        raise DoubtError(("repeats",))


@pytest.mark.parametrize("around", ["runnable", "wrapped model"])
def test_a_fallback_replaces_an_answer_whose_correction_failed(around: str) -> None:
    align = AlignerRunnable(
        Failing(lambda question, answer: answer), question="Q", fallback="Sorry.", keep_original=True
    )
    chain: Any = align if around == "runnable" else align.wrap(saying("bad"))
    assert isinstance(chain, BaseChatModel) == (around == "wrapped model")
    value = AIMessage("bad") if around == "runnable" else "bad"
    message = chain.invoke(value)
    report = message.response_metadata["aligner"]
    assert message.content == "Sorry."
    assert (report["aligned"], report["changed"], report["original"]) == (False, True, "bad")
    assert report["reason"].startswith("DoubtError")
    assert asyncio.run(chain.ainvoke(value)).content == "Sorry."
    assert "".join(chunk.text for chunk in chain.stream(value)) == "Sorry."
    assert "".join(chunk.text for chunk in asyncio.run(collected(chain, value))) == "Sorry."


def test_a_fallback_changes_no_answer_that_was_corrected_and_may_be_empty() -> None:
    assert runnable(fallback="Sorry.").invoke("bad") == "good"
    assert runnable(fallback="").invoke("bad \ud800") == ""
    with pytest.raises(InputError):
        runnable(fallback=None).invoke("bad \ud800")
    shadow = runnable(fallback="Sorry.", mode="shadow")
    assert shadow.invoke("bad \ud800") == "bad \ud800"


def test_a_stream_of_an_alignment_has_its_outcome_at_its_end() -> None:
    align = AlignerRunnable(ALIGNER)
    stream = align.stream_pair("why?", "so bad")
    with pytest.raises(RuntimeError, match="iterate the stream to its end"):
        _ = stream.outcome
    assert "".join(stream) == unwrap(stream.outcome).text == "so good"

    async def collect() -> None:
        stream = align.stream_pair("why?", "so bad")
        assert "".join([text async for text in stream]) == unwrap(stream.outcome).text == "so good"

    asyncio.run(collect())


def test_a_stream_that_is_closed_early_has_no_outcome() -> None:
    align = AlignerRunnable(ALIGNER)
    stream = align.stream_pair("why?", "<think>hm</think> so bad")
    assert next(iter(stream)).startswith("<think>")
    stream.close()
    with pytest.raises(RuntimeError):
        _ = stream.outcome


def test_an_error_in_a_stream_is_its_outcome() -> None:
    def fail(question: str, answer: str) -> str:
        raise ValueError("no rule")

    stream = AlignerRunnable(InstantAligner(fail)).stream_pair("why?", "so bad")
    assert list(stream) == []
    assert isinstance(stream.outcome, ValueError)
