"""How willingly it corrects, and what becomes of a correction that a safeguard objects to: in chains, models and agents."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.runnables import ConfigurableField, Runnable
from typer.testing import CliRunner

from aligner_middleware import Aligner, AlignerMiddleware, AlignerRunnable, Correction, DoubtError, InputError
from aligner_middleware.cli import app as cli
from tests.chat_models import answering, saying
from tests.fakes import collected, fake_aligner, joined, judging_aligner

ODDS = {"clear": 20.0, "likely": 1.0, "possible": -1.0}  # log odds; scores of 1, 0.73 and 0.27


def correct(question: str, answer: str) -> str:
    """Correct `bad` to `good`; and `bad` that is `odd` to letters of another script, which a safeguard objects to."""
    return answer.replace("bad", "плохо" if "odd" in answer else "good")


def log_odds(question: str, answer: str) -> float:
    if "bad" not in answer:
        return -20.0
    return next((odds for name, odds in ODDS.items() if name in answer), 20.0)


ALIGNER = judging_aligner(correct, log_odds)


def runnable(**options: Any) -> AlignerRunnable:
    return AlignerRunnable(ALIGNER, **{"question": "q", **options})


def wrap(llm: Any, **options: Any) -> Any:
    return AlignerRunnable.wrap(llm, ALIGNER, **options)


CALLS: dict[str, Callable[[Runnable[Any, Any], Any], Any]] = {
    "invoke": lambda r, value: r.invoke(value),
    "batch": lambda r, value: r.batch([value, value])[1],
    "stream": lambda r, value: joined(list(r.stream(value))),
    "transform": lambda r, value: joined(list(r.transform(iter([value])))),
    "ainvoke": lambda r, value: asyncio.run(r.ainvoke(value)),
    "abatch": lambda r, value: asyncio.run(r.abatch([value, value]))[1],
    "astream": lambda r, value: joined(asyncio.run(collected(r.astream(value)))),
}


class Ear(BaseCallbackHandler):
    def __init__(self) -> None:
        self.reports: list[dict[str, Any]] = []

    def on_custom_event(self, name: str, data: Any, **kwargs: Any) -> None:
        assert name == "aligner_correction"
        self.reports.append(data)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("strength", "changed"),
    [
        ("low", {"clear"}),
        ("medium", {"clear", "likely"}),
        ("high", {"clear", "likely", "possible"}),
        (0.8, {"clear"}),
        (0.0, {"clear", "likely", "possible"}),
        (1, set()),
    ],
)
def test_an_answer_is_changed_where_its_score_is_above_the_strength(
    call: str, strength: Any, changed: set[str]
) -> None:
    align = runnable(strength=strength)
    for name in ODDS:
        answer = CALLS[call](align, AIMessage(f"bad {name}"))
        assert answer.content == f"{'good' if name in changed else 'bad'} {name}"
        report = answer.response_metadata["aligner"]
        assert report["score"] == pytest.approx(1 / (1 + math.exp(-ODDS[name])))
        assert (report["verdict"] != "keep", report["changed"], report["aligned"]) == (*[name in changed] * 2, True)


@pytest.mark.parametrize("call", CALLS)
def test_a_model_and_a_chain_have_the_same_strengths(call: str) -> None:
    for chain in (saying("bad likely") | runnable(strength="low"), wrap(saying("bad likely"), strength="low")):
        answer = CALLS[call](chain, "q")
        assert (answer.content, answer.response_metadata["aligner"]["verdict"]) == ("bad likely", "keep")
    for chain in (saying("bad likely") | runnable(strength=0.7), wrap(saying("bad likely"), strength=0.7)):
        assert CALLS[call](chain, "q").content == "good likely"


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("value", ["bad odd", AIMessage("bad odd"), {"question": "q", "answer": "bad odd"}])
def test_what_a_safeguard_objects_to_is_passed_by_or_raised_or_kept(call: str, value: Any) -> None:
    def text(result: Any) -> str:
        return str(result["answer"] if isinstance(result, dict) else getattr(result, "content", result))

    assert text(CALLS[call](runnable(), value)) == "bad odd"
    assert text(CALLS[call](runnable(on_doubt="keep"), value)) == "плохо odd"
    with pytest.raises(DoubtError, match="on_doubt='passthrough'") as raised:
        CALLS[call](runnable(on_doubt="raise"), value)
    assert raised.value.doubts == ("script",)
    assert text(CALLS[call](runnable(on_doubt="raise", fallback="Sorry."), value)) == "Sorry."
    assert text(CALLS[call](runnable(on_doubt="raise", on_error="passthrough"), value)) == "bad odd"


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("wrapped", [False, True])
def test_doubts_are_named_in_the_message_and_in_the_event(call: str, wrapped: bool) -> None:
    reports = []
    for options in (
        {"on_doubt": "passthrough"},
        {"on_doubt": "keep"},
        {"on_doubt": "raise", "on_error": "passthrough"},
        {"on_doubt": "raise", "fallback": "Sorry."},
    ):
        ear, model = Ear(), saying("bad odd")
        chain = wrap(model, **options) | (lambda message: message) if wrapped else model | runnable(**options)
        answer = CALLS[call](chain.with_config(callbacks=[ear]), "q")
        reports.append(answer.response_metadata["aligner"])
        assert reports[-1] in ear.reports
        assert {tuple(report["doubts"]) for report in ear.reports} == {("script",)}
    passed, kept, failed, replaced = reports
    assert [report["aligned"] for report in reports] == [True, True, False, False]
    assert [report["changed"] for report in reports] == [False, True, False, True]
    assert {passed["verdict"], kept["verdict"]} <= {"edit", "rewrite"}
    assert failed["reason"] == replaced["reason"]
    assert failed["reason"].startswith("DoubtError: ")


def test_one_doubt_in_a_batch_stays_alone() -> None:
    first, second = runnable(on_doubt="raise").batch(["bad odd", "bad"], return_exceptions=True)
    assert isinstance(first, DoubtError)
    assert second == "good"


def test_sound_corrections_and_kept_answers_have_no_doubts() -> None:
    for answer in ("bad", "fine", "fine odd"):
        assert "doubts" not in runnable().invoke(AIMessage(answer)).response_metadata["aligner"]


def test_whoever_is_told_of_corrections_is_told_of_doubts_and_of_what_was_written() -> None:
    told: list[Correction] = []
    runnable(on_correction=told.append).batch(["bad odd", "bad", "fine"])
    assert [(one.corrected, one.doubts, one.proposed) for one in told] == [
        ("bad odd", ("script",), "плохо odd"),
        ("good", (), None),
        ("fine", (), None),
    ]
    assert told[2].verdict == "keep"
    assert told[1].score == pytest.approx(1)


def test_an_aligner_without_verdicts_reports_none() -> None:
    answer = AlignerRunnable(fake_aligner(correct), question="q").invoke(AIMessage("bad"))
    assert answer.content == "good"
    assert not {"verdict", "score", "doubts"} & set(answer.response_metadata["aligner"])


PIECES = "fine here.\n\nbad likely.\n\nbad odd.\n\nall good.\n"


@pytest.mark.parametrize("call", CALLS)
def test_of_pieces_the_highest_score_all_doubts_and_an_edit_where_any_was_changed(call: str) -> None:
    told: list[Correction] = []
    pieces = {"max_answer_tokens": 14, "on_long_answer": "piecewise", "on_correction": told.append}
    answer = CALLS[call](runnable(**pieces), AIMessage(PIECES))
    assert answer.content == PIECES.replace("bad likely", "good likely")
    report = answer.response_metadata["aligner"]
    assert (report["verdict"], report["doubts"], report["changed"]) == ("edit", ["script"], True)
    assert report["score"] == pytest.approx(1)
    assert told[0].proposed == PIECES.replace("bad likely", "good likely").replace("bad odd", "плохо odd")
    kept = CALLS[call](runnable(**pieces), AIMessage(PIECES.replace("bad", "sad")))
    assert kept.response_metadata["aligner"]["verdict"] == "keep"
    assert kept.response_metadata["aligner"]["score"] < 0.01
    whole = {"on_doubt": "raise", "on_error": "passthrough"}
    passed = CALLS[call](runnable(**pieces, **whole), AIMessage(PIECES))
    assert (passed.content, passed.response_metadata["aligner"]["doubts"]) == (PIECES, ["script"])


def test_a_piece_of_which_nothing_is_left_is_a_doubt_and_what_was_written_says_so() -> None:
    told: list[Correction] = []
    emptying = judging_aligner(lambda question, answer: "" if "bad" in answer else answer)
    align = AlignerRunnable(
        emptying, question="q", max_answer_tokens=8, on_long_answer="piecewise", on_correction=told.append
    )
    assert align.invoke("fine.\n\nbad.\n\nok.\n") == "fine.\n\nbad.\n\nok.\n"
    assert (told[0].doubts, told[0].proposed) == (("empty",), "fine.\n\n\n\nok.\n")


PER_CALL = {name: ConfigurableField(id=name) for name in ("strength", "on_doubt", "mode")}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("wrapped", [False, True])
def test_strength_doubt_and_mode_per_call(call: str, wrapped: bool) -> None:
    def answer(said: str, **options: Any) -> str:
        configured = (wrap(saying(said)) if wrapped else runnable()).configurable_fields(**PER_CALL)
        chain = configured if wrapped else saying(said) | configured
        return str(CALLS[call](chain.with_config(configurable=options), "q").content)

    assert answer("bad likely") == "good likely"
    assert answer("bad likely", strength="low") == "bad likely"
    assert answer("bad possible", strength=0.1) == "good possible"
    assert answer("bad odd") == "bad odd"
    assert answer("bad odd", on_doubt="keep") == "плохо odd"
    assert answer("bad", mode="shadow") == "bad"
    with pytest.raises(DoubtError):
        answer("bad odd", on_doubt="raise")
    with pytest.raises(ValueError, match="expected one of low, medium, high, or a number; did you mean 'low'"):
        answer("bad", strength="lo")


MISSPELT = [("strength", "hihg"), ("on_doubt", "passthru"), ("mode", "shadwo")]
OUT_OF_RANGE = [
    *(("strength", value) for value in (-0.1, 1.5, math.nan, math.inf, True)),
    *(("timeout", value) for value in (-1, math.nan, math.inf, True)),
]
MAKERS: dict[str, Callable[..., Any]] = {
    "AlignerRunnable": runnable,
    "wrap": lambda **options: wrap(answering(), **options),
    "AlignerMiddleware": lambda **options: AlignerMiddleware(ALIGNER, **options),
}


@pytest.mark.parametrize(("name", "value"), [*MISSPELT, *OUT_OF_RANGE])
@pytest.mark.parametrize("maker", MAKERS)
def test_what_is_misspelt_or_out_of_range_is_refused_when_made(maker: str, name: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"^{name} is "):
        MAKERS[maker](**{name: value})


def test_without_verdicts_a_strength_is_a_tolerance_of_any_size() -> None:
    aligner = fake_aligner(correct)
    assert AlignerRunnable(aligner, question="q", strength=200.0).invoke("bad") == "bad"
    assert AlignerRunnable(aligner, question="q", strength=2).invoke("bad") == "good"
    with pytest.raises(InputError, match="at least 0"):
        AlignerRunnable(aligner, strength=-1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"strength": "hihg"}, "strength is 'hihg', expected one of low, medium, high; did you mean 'high'?"),
        (
            {"on_doubt": "passthru"},
            "on_doubt is 'passthru', expected one of passthrough, raise, keep; did you mean 'pas",
        ),
    ],
)
def test_an_aligner_names_the_nearest(options: Any, said: str) -> None:
    with pytest.raises(InputError) as raised:
        ALIGNER.correct("q", "bad", **options)
    assert str(raised.value).startswith(said)


def test_a_cache_tells_strengths_doubts_and_modes_apart() -> None:
    cache = InMemoryCache()
    raw = saying("bad odd likely").model_copy(update={"cache": cache})
    wanted: list[tuple[dict[str, Any], str, str]] = [
        ({"on_doubt": "keep"}, "плохо odd likely", "edit"),
        ({"on_doubt": "passthrough"}, "bad odd likely", "edit"),
        ({"on_doubt": "keep", "strength": "low"}, "bad odd likely", "keep"),
        ({"on_doubt": "keep", "mode": "shadow"}, "bad odd likely", "edit"),
    ]
    for _ in range(2):
        for options, text, verdict in wanted:
            answer = wrap(raw, **options).invoke("q")
            assert (answer.content, answer.response_metadata["aligner"]["verdict"]) == (text, verdict)
    assert len(cache._cache) == len(wanted)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_an_agents_answers_have_strength_verdict_score_and_doubts(asynchronous: bool) -> None:
    ask: Any = {"messages": [HumanMessage("why")]}

    def last(said: str, **options: Any) -> AIMessage:
        graph = create_agent(saying(said), middleware=[AlignerMiddleware(ALIGNER, **options)])
        state = asyncio.run(graph.ainvoke(ask)) if asynchronous else graph.invoke(ask)
        (event,) = [part["aligner_correction"] for part in graph.stream(ask, stream_mode="custom")]
        message: AIMessage = state["messages"][-1]
        report = message.response_metadata["aligner"]
        untimed = {"usage", "message_id"}
        assert {k: event[k] for k in event if k not in untimed} == {k: report[k] for k in report if k not in untimed}
        return message

    assert last("bad likely").content == "good likely"
    weak = last("bad likely", strength="low")
    assert (weak.content, weak.response_metadata["aligner"]["verdict"]) == ("bad likely", "keep")
    assert weak.response_metadata["aligner"]["score"] == pytest.approx(0.731, abs=1e-3)
    doubtful = last("bad odd")
    assert (doubtful.content, doubtful.response_metadata["aligner"]["doubts"]) == ("bad odd", ["script"])
    assert last("bad odd", on_doubt="keep").content == "плохо odd"
    passed = last("bad odd", on_doubt="raise", on_error="passthrough")
    assert (passed.content, passed.response_metadata["aligner"]["doubts"]) == ("bad odd", ["script"])


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.setattr(Aligner, "load", lambda *args, **options: ALIGNER)

    def invoke(*arguments: str, stdin: str | None = None) -> Any:
        return CliRunner().invoke(cli.app, ["correct", *arguments], input=stdin)

    return invoke


def test_the_command_takes_a_strength_and_what_to_do_in_doubt(run: Callable[..., Any]) -> None:
    ask = ("-q", "q", "-a", "bad likely")
    assert run(*ask).stdout == "good likely\n"
    assert run(*ask, "--strength", "low").stdout == "bad likely\n"
    assert run("-q", "q", "-a", "bad possible").stdout == "bad possible\n"
    assert run("-q", "q", "-a", "bad possible", "--strength", "0").stdout == "good possible\n"
    assert run("-q", "q", "-a", "bad odd", "--on-doubt", "keep").stdout == "плохо odd\n"
    row = json.loads(run("-q", "q", "-a", "bad odd", "--json").stdout)
    assert (row["corrected"], row["doubts"], row["proposed"]) == ("bad odd", ["script"], "плохо odd")
    refused = run("-q", "q", "-a", "bad odd", "--on-doubt", "raise")
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert "the correction is doubtful (script)" in refused.stderr


@pytest.mark.parametrize(
    ("option", "value"), [("--strength", "hihg"), ("--strength", "1.5"), ("--on-doubt", "pass"), ("--mode", "shadwo")]
)
def test_the_command_refuses_what_it_does_not_know(run: Callable[..., Any], option: str, value: str) -> None:
    outcome = run("-q", "q", "-a", "bad", option, value)
    assert outcome.exit_code == 2
    assert option in outcome.stderr
    assert value in outcome.stderr
