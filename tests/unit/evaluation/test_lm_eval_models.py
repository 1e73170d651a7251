"""An aligner behind a model of lm-evaluation-harness."""

import math
from typing import Any

import pytest
from langchain_core.messages import AIMessage
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from aligner_middleware import InputError
from aligner_middleware.errors import UpstreamError
from aligner_middleware.evaluation.lm_eval_models import AlignedLM, LangChainLM
from tests.chat_models import Scripted
from tests.fakes import InstantAligner, fake_aligner


class Known(LM):
    """Says what it was told to say, and likes choices as much as it was told to."""

    def __init__(self, answer: str = "", likes: dict[str, float] | None = None) -> None:
        super().__init__()
        self.answer = answer
        self.likes = likes or {}

    def generate_until(self, requests: list[Instance]) -> list[str]:
        return [self.answer for _ in requests]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        best = max(self.likes, key=lambda choice: self.likes[choice])
        return [(math.log(self.likes[r.args[1].strip()]), r.args[1].strip() == best) for r in requests]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        return [0.0 for _ in requests]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return "".join(f"<{message['role']}>{message['content']}" for message in chat_history)


class Certain(InstantAligner):
    """Gives its correction of an answer nearly all of the probability."""

    def log_likelihood(
        self, question: str, answer: str, corrections: Any, instruction: str | None = None
    ) -> list[tuple[float, bool]]:
        meant = self._correct(question, answer)
        return [(math.log(0.97), True) if text == meant else (math.log(0.01), False) for text in corrections]


def choices(*texts: str, context: str = "Which?") -> list[Instance]:
    return [
        Instance("loglikelihood", {}, (context, f" {text}"), at, ("task", 0, 1), task_name="task", doc_id=0)
        for at, text in enumerate(texts)
    ]


def generation(prompt: str, **options: Any) -> Instance:
    return Instance("generate_until", {}, (prompt, options), 0, ("task", 0, 1), task_name="task", doc_id=0)


def test_an_aligner_that_keeps_answers_keeps_the_models_ranking() -> None:
    lm = AlignedLM(Known(likes={"a": 0.5, "b": 0.3, "c": 0.1}), Certain(lambda question, answer: answer))
    scores = lm.loglikelihood(choices("a", "b", "c"))
    assert [greedy for _, greedy in scores] == [True, False, False]
    expected = [0.97 * p + 0.01 * (0.9 - p) for p in (0.5, 0.3, 0.1)]  # the sum over what the model may have chosen
    assert [math.exp(score) for score, _ in scores] == pytest.approx(expected)


def test_an_aligner_that_changes_the_choice_moves_its_probability() -> None:
    lm = AlignedLM(Known(likes={"a": 0.6, "b": 0.3}), Certain(lambda question, answer: "b"))
    (a, _), (b, greedy) = lm.loglikelihood(choices("a", "b"))
    assert greedy
    assert math.exp(b) == pytest.approx(0.97 * 0.9)
    assert math.exp(a) == pytest.approx(0.01 * 0.9)


def test_a_text_scored_alone_gets_the_lower_bound() -> None:
    lm = AlignedLM(Known(likes={"a": 0.5}), Certain(lambda question, answer: answer))
    assert lm.loglikelihood(choices("a"))[0][0] == pytest.approx(math.log(0.5 * 0.97))


def test_the_aligner_hears_the_users_question_and_corrects_up_to_the_stop_text() -> None:
    heard: list[str] = []

    def correct(question: str, answer: str) -> str:
        heard.append(question)
        return f"{answer} indeed\nmore"

    lm = AlignedLM(Known("yes"), InstantAligner(correct))
    prompt = lm.apply_chat_template([{"role": "system", "content": "s"}, {"role": "user", "content": "really?"}])
    assert prompt == "<system>s<user>really?"
    assert lm.generate_until([generation(prompt, until=["\n"]), generation("plain", until="nothing")]) == [
        "yes indeed",
        "yes indeed\nmore",
    ]
    assert heard == ["really?", "plain"]
    assert lm.changed == 2


def test_what_the_aligner_cannot_take_is_left_as_it_is_and_counted() -> None:
    lm = AlignedLM(Known("yes", {"a": 0.5, "b": 0.4}), fake_aligner(lambda question, answer: "no"))
    assert lm.generate_until([generation(" ")]) == ["yes"]
    assert [math.exp(score) for score, _ in lm.loglikelihood(choices("a", "b", context=" "))] == pytest.approx(
        [0.5, 0.4]
    )
    assert lm.passed == 2
    with pytest.raises(InputError, match="answer no question"):
        lm.loglikelihood_rolling([generation("text")])


def test_the_likelihood_of_a_correction_is_that_of_its_tokens() -> None:
    aligner = fake_aligner(lambda question, answer: "good" if answer == "bad" else answer)
    aligner.fake_model.sure = 1.0
    # It gives the next token a logit of 1 and 1,023 others 0. "good" and its end are five such tokens; of "bad" and its end
    # only the last is one.
    total = math.log(math.e + 1023)
    (good, good_is_likeliest), (bad, bad_is_likeliest) = aligner.log_likelihood("q", "bad", ["good", "bad"])
    assert good == pytest.approx(5 * (1 - total), rel=1e-5)
    assert bad == pytest.approx(1 - 4 * total, rel=1e-5)
    assert (good_is_likeliest, bad_is_likeliest) == (True, False)
    assert aligner.log_likelihood("q", "fine", ["fine"])[0][1]
    with pytest.raises(InputError, match="blank"):
        aligner.log_likelihood(" ", "a", ["a"])


def test_a_langchain_model_is_asked_in_turns_and_says_what_it_cannot_do() -> None:
    asked: list[Any] = []

    def reply(messages: Any) -> AIMessage:
        asked.append([(message.type, message.text) for message in messages])
        return AIMessage("four\nfive")

    lm = LangChainLM(Scripted(reply=reply), "scripted")
    prompt = lm.apply_chat_template([{"role": "system", "content": "count"}, {"role": "user", "content": "2 + 2?"}])
    assert lm.generate_until([generation(prompt, until=["\n"]), generation("[1]")]) == ["four", "four\nfive"]
    assert [("system", "count"), ("human", "2 + 2?")] in asked
    assert [("human", "[1]")] in asked
    with pytest.raises(InputError, match="does not give"):
        lm.loglikelihood(choices("a"))


def test_a_langchain_model_that_fails_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)

    def reply(messages: Any) -> AIMessage:
        raise ConnectionError("down")

    with pytest.raises(UpstreamError, match="down"):
        LangChainLM(Scripted(reply=reply), "scripted").generate_until([generation("q")])
