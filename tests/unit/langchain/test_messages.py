"""Only text is rewritten, and what points into text that stayed goes along with it."""

import io
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from rich.console import Console
from rich.text import Text

from aligner_middleware import AlignerRunnable, InputError
from aligner_middleware.diff import Diff
from aligner_middleware.langchain.messages import question_of, text_of, with_text
from tests.chat_models import Scripted
from tests.fakes import InstantAligner

WORDS = st.lists(st.sampled_from(["you", " idiot", ",", " ", "\n\n", "Paris", "é", "<b>", "a1"]), max_size=12).map(
    "".join
)


@given(WORDS, WORDS)
def test_a_diff_holds_both_texts(old: str, new: str) -> None:
    diff = Diff.between(old, new)
    assert "".join(change.text for change in diff.changes if change.kind != "added") == old
    assert "".join(change.text for change in diff.changes if change.kind != "removed") == new
    assert (old == new) == (not diff.removed and not diff.added and all(c.kind == "same" for c in diff.changes))


def test_a_diff_is_shown_as_text_in_a_terminal_and_as_html() -> None:
    diff = Diff.between("It is Paris, you idiot. Now go.", "It is Paris, dear <you>. Now go.")
    assert diff.removed == ["you", "idiot"]
    assert diff.added == ["dear", "<you>"]
    assert str(diff) == "It is Paris, [-you idiot-]{+dear <you>+}. Now go."
    for options in (
        {},
        {"force_terminal": True, "color_system": "truecolor"},
        {"force_terminal": True, "no_color": True},
    ):
        shown = io.StringIO()
        Console(file=shown, **options).print(Text("answer: "), diff, sep="")
        assert re.sub(r"\x1b\[[0-9;]*m", "", shown.getvalue()) == f"answer: {diff}\n"
    assert "&lt;" in diff.html()
    assert "<del>" in diff.html()
    assert "<ins>" in diff.html()


@given(st.lists(WORDS, min_size=1, max_size=4), WORDS)
def test_blocks_of_any_shape_hold_the_new_text(parts: list[str], new: str) -> None:
    blocks: list[Any] = []
    for number, part in enumerate(parts):
        blocks += [{"type": "reasoning", "reasoning": str(number)}, {"type": "text", "text": part}]
    message = AIMessage(blocks, id="7")
    changed = with_text(message, new)
    assert text_of(changed) == new
    assert changed.id == "7"
    content: list[Any] = list(changed.content)
    assert [b for b in content if b["type"] == "reasoning"] == [b for b in blocks if b["type"] == "reasoning"]
    assert text_of(message) == "".join(parts)


def test_what_became_of_a_block_stays_in_its_place() -> None:
    image = {"type": "image", "url": "https://x/y.png"}
    unknown = {"type": "something_new", "x": 1}
    message = AIMessage(
        [
            {"type": "reasoning", "reasoning": "hm"},
            {"type": "text", "text": "It rains. ", "citations": [{"cited_text": "rain"}]},
            image,
            {"type": "text", "text": "You idiot, take an umbrella. ", "citations": [{"cited_text": "umbrella"}]},
            unknown,
            "Good bye.",
        ]
    )
    corrected = with_text(message, "It rains. Take an umbrella. Good bye.")
    assert corrected.content == [
        {"type": "reasoning", "reasoning": "hm"},
        {"type": "text", "text": "It rains. ", "citations": [{"cited_text": "rain"}]},
        image,
        {"type": "text", "text": "Take an umbrella. "},
        unknown,
        "Good bye.",
    ]


def test_citations_with_places_move_along_with_unchanged_text_and_go_with_changed_text() -> None:
    text = "You fool. Rome is in Italy. It has 9 people."
    marks = [
        {"type": "citation", "start_index": 10, "end_index": 27, "url": "https://italy"},
        {"type": "citation", "start_index": 28, "end_index": 44, "url": "https://people"},
    ]
    message = AIMessage([{"type": "text", "text": text, "annotations": marks}])
    new = "Rome is in Italy. It has 3 million people."
    block: Any = with_text(message, new).content[0]
    (mark,) = block["annotations"]
    assert new[mark["start_index"] : mark["end_index"]].strip() == "Rome is in Italy."
    assert mark["url"] == "https://italy"


def test_log_probabilities_of_the_old_text_go() -> None:
    message = AIMessage("bad", response_metadata={"logprobs": {"content": [{"token": "bad"}]}, "model_name": "m"})
    assert with_text(message, "good").response_metadata == {"model_name": "m"}
    assert with_text(message, "bad").response_metadata == message.response_metadata


def test_the_question_of_a_conversation() -> None:
    messages = [
        SystemMessage("be kind"),
        HumanMessage("Hello"),
        AIMessage("Hi"),
        HumanMessage("How warm is it?"),
        AIMessage("", tool_calls=[{"name": "weather", "args": {}, "id": "1"}]),
        ToolMessage("21 degrees", tool_call_id="1"),
    ]
    assert question_of(messages) == "How warm is it?"
    assert question_of(messages, tool_results=True) == "How warm is it?\n\nTool: 21 degrees"
    assert question_of(messages, dialogue=True) == "User: Hello\n\nAssistant: Hi\n\nUser: How warm is it?"
    assert (question_of(messages, dialogue=True, tool_results=True) or "").endswith("it?\n\nTool: 21 degrees")
    assert question_of(messages[:2], dialogue=True) == "Hello"
    assert question_of([]) is None
    summary = HumanMessage("Here is a summary", additional_kwargs={"lc_source": "summarization"})
    assert question_of([*messages, summary]) == "How warm is it?"


NULL = {"type": "text", "text": None}


def test_a_text_block_whose_text_is_null_is_no_text_and_stays() -> None:
    message = AIMessage([NULL, {"type": "text", "text": "A fern."}, {"type": "text"}])
    assert text_of(message) == message.text == "A fern."
    model = AlignerRunnable(InstantAligner(lambda question, answer: f"{question} {answer}")).wrap(
        Scripted(reply=lambda messages: message)
    )
    asked = [HumanMessage([NULL, {"type": "text", "text": "What is it?"}])]
    assert model.invoke(asked).content == [NULL, {"type": "text", "text": "What is it? A fern."}, {"type": "text"}]
    only = AIMessage([NULL])
    assert AlignerRunnable(InstantAligner(lambda question, answer: "never")).invoke(only) is only


def test_what_is_null_beside_an_answer_is_as_if_it_were_not_there() -> None:
    align = AlignerRunnable(InstantAligner(lambda question, answer: answer.upper()), question="q")
    assert align.invoke(AIMessage("a fern", response_metadata={"aligner": None})).content == "A FERN"
    row = {"question": None, "answer": "a fern"}
    assert align.invoke(row) == {"question": None, "answer": "A FERN"}
    with pytest.raises(InputError, match="'answer' is None"):
        align.invoke({"question": "q", "answer": None})
