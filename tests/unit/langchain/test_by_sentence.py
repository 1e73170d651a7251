"""`by_sentence`: a stream shows what is kept while the model still talks, and adds up to what the whole becomes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.runnables import ConfigurableField, Runnable

from aligner_middleware import AlignerMiddleware, AlignerRunnable, InputError
from aligner_middleware import sentences as module
from aligner_middleware.langchain.alignment import Alignment
from tests.chat_models import Scripted, saying
from tests.fakes import collected, fake_aligner, joined, judging_aligner

KEPT = "Turn left. Then go on. It is near."
EDITED, SOFT = "Turn left. Then go on, idiot. It is near.", "Turn left. Then go on, friend. It is near."
REFUSED = "Turn left. Then go on. To the bomb. It is near."
REFUSAL = "I would rather not help with this."
OUTCOMES = {KEPT: KEPT, EDITED: SOFT, REFUSED: f"Turn left. Then go on. {REFUSAL}"}


def soften(question: str, answer: str) -> str:
    return REFUSAL if "bomb" in answer else answer.replace("idiot", "friend")


ALIGNER = judging_aligner(soften)


@pytest.fixture(autouse=True)
def _every_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PAUSE", 0.0)


def agent(model: Any, align: AlignerRunnable) -> Runnable[Any, Any]:
    return create_agent(model, [], middleware=[AlignerMiddleware(align)])


PLACES: dict[str, Callable[[Any, AlignerRunnable], Runnable[Any, Any]]] = {
    "chain": lambda model, align: model | align,
    "wrapped": lambda model, align: align.wrap(model),
}


@pytest.mark.parametrize("answer", OUTCOMES)
@pytest.mark.parametrize("place", PLACES)
async def test_a_stream_adds_up_to_what_was_shown_and_what_the_rest_becomes(place: str, answer: str) -> None:
    runnable = PLACES[place](saying(answer), AlignerRunnable(ALIGNER, by_sentence=True))
    for pieces in (list(runnable.stream("q")), await collected(runnable.astream("q"))):
        message = joined(pieces)
        assert message.content == OUTCOMES[answer]
        texts = [piece.content for piece in pieces if piece.content]
        assert texts[0] == "Turn left."
        assert len(texts) == (2 if answer == EDITED else 3)
        metadata = message.response_metadata["aligner"]
        assert metadata["released"] == len("Turn left." if answer == EDITED else "Turn left. Then go on.")
        assert metadata["late"] == (2 if answer == REFUSED else 0)
        assert metadata["changed"] == (answer != KEPT)
        assert message.usage_metadata is not None
        assert len({piece.id for piece in pieces}) == 1
    whole = PLACES[place](saying(answer), AlignerRunnable(ALIGNER, by_sentence=True)).invoke("q")
    assert whole.content == soften("q", answer)


def test_sentences_are_shown_before_the_model_has_ended() -> None:
    shown: list[str] = []
    seen: list[str] = []

    def words(value: Any) -> Iterator[str]:
        for word in KEPT.split(" "):
            yield word + " "
            seen.append("".join(shown))

    for piece in AlignerRunnable(ALIGNER, question="q", by_sentence=True).transform(words(None)):
        shown.append(piece)
    assert "".join(shown) == KEPT + " "
    assert "Turn left." in seen
    assert "Turn left. Then go on." in seen


def test_the_middleware_streams_so_too() -> None:
    graph = agent(saying(REFUSED), AlignerRunnable(ALIGNER, by_sentence=True))
    given = {"messages": [("user", "q")]}
    pieces = [chunk for chunk, _ in graph.stream(given, stream_mode="messages") if isinstance(chunk, AIMessageChunk)]
    assert [piece.content for piece in pieces if piece.content][:2] == ["Turn left.", " Then go on."]
    assert joined(pieces).content == OUTCOMES[REFUSED]


CALL = [{"name": "go", "args": {"to": "x"}, "id": "t1", "type": "tool_call"}]


@pytest.mark.parametrize("final_only", [False, True])
def test_text_beside_tool_calls_is_not_shown_twice(final_only: bool) -> None:
    model = Scripted(reply=lambda messages: AIMessage(KEPT, tool_calls=CALL))
    wrapped = AlignerRunnable(ALIGNER, by_sentence=True).wrap(model).model_copy(update={"final_only": final_only})
    message = joined(list(wrapped.stream("q")))
    assert message.content == KEPT
    assert [call["name"] for call in message.tool_calls] == ["go"]


def test_an_answer_that_turns_into_blocks_is_not_shown_twice() -> None:
    def chunks(value: Any) -> Iterator[AIMessageChunk]:
        yield AIMessageChunk(content="Turn left. Then ", id="m")
        yield AIMessageChunk(content=[{"type": "text", "text": "go on. You idiot."}], id="m")

    pieces = list(AlignerRunnable(ALIGNER, question="q", by_sentence=True).transform(chunks(None)))
    assert pieces[0].content == "Turn left."
    assert joined(pieces).text == "Turn left. Then go on. You friend."


def test_answers_asked_for_as_json_are_not_decided_on() -> None:
    model = saying(KEPT).bind(response_format={"type": "json_object"})
    pieces = list(AlignerRunnable(ALIGNER, by_sentence=True).wrap(model).stream("q"))
    assert [piece.content for piece in pieces if piece.content] == [KEPT]


def test_an_unknown_question_shows_nothing_early() -> None:
    align = AlignerRunnable(ALIGNER, question=lambda value: "q", by_sentence=True)
    assert len(list(align.transform(iter(["Turn left. ", "Then go on. ", "No."])))) == 1


@pytest.mark.parametrize("later", ["It is near, idiot. ", "To the bomb. "])
def test_a_long_answer_in_pieces_begins_with_what_was_shown(later: str) -> None:
    answer = "Turn left. Then go on.\n\n" + "On and on it goes. " * 6 + "\n\n" + later + "It is far away. " * 6
    align = AlignerRunnable(ALIGNER, question="q", by_sentence=True, max_answer_tokens=120, on_long_answer="piecewise")
    pieces = list(align.transform(iter([word + " " for word in answer.split(" ")])))
    assert pieces[0] == "Turn left."
    text = "".join(pieces)
    assert text.startswith("Turn left. Then go on.\n\nOn and on it goes.")
    assert "idiot" not in text
    assert "bomb" not in text


@pytest.mark.parametrize(
    "said", ["Turn left. <think>An idiot? Yes.</think>Then go on, idiot. So.", "Left. So.</think>Idiot. No."]
)
def test_reasoning_stays_where_it_is(said: str) -> None:
    align = AlignerRunnable(ALIGNER, question="q", by_sentence=True)
    text = "".join(align.transform(iter([said[at : at + 5] for at in range(0, len(said), 5)])))
    assert text == said.replace("on, idiot", "on, friend")


def test_an_error_of_the_whole_answer_lets_the_rest_pass_where_the_options_say_so() -> None:
    def broken(question: str, answer: str) -> str:
        if answer.endswith("near."):
            raise RuntimeError("no memory")
        return answer

    align = AlignerRunnable(judging_aligner(broken), question="q", by_sentence=True, on_error="passthrough")
    pieces = list(align.transform(iter(KEPT.partition("go")[::1])))
    assert "".join(pieces) == KEPT
    assert len(pieces) > 1


@pytest.mark.parametrize(
    ("options", "named"),
    [({"mode": "shadow"}, "shadow"), ({"fallback": "No."}, "fallback="), ({"when": lambda q, a: True}, "when=")],
)
def test_it_is_refused_together_with_what_only_the_whole_answer_can_decide(options: Any, named: str) -> None:
    with pytest.raises(InputError, match=named):
        AlignerRunnable(ALIGNER, by_sentence=True, **options)


def test_it_is_refused_with_an_aligner_that_gives_no_verdicts() -> None:
    with pytest.raises(InputError, match="gives verdicts"):
        AlignerRunnable(fake_aligner(soften), by_sentence=True)


def test_it_may_be_set_for_one_call() -> None:
    align = AlignerRunnable(ALIGNER, question="q").configurable_fields(by_sentence=ConfigurableField(id="by_sentence"))
    words = [word + " " for word in KEPT.split(" ")]
    assert len(list(align.transform(iter(words)))) == 1
    assert len(list(align.transform(iter(words), {"configurable": {"by_sentence": True}}))) == 3


def test_a_cache_tells_it_apart() -> None:
    keys = {
        AlignerRunnable(ALIGNER, by_sentence=by_sentence).wrap(saying(KEPT))._get_llm_string()
        for by_sentence in (False, True)
    }
    assert len(keys) == 2
    assert "by_sentence=True" in Alignment(aligner=ALIGNER, by_sentence=True).described()
