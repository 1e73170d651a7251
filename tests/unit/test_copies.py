"""What holds an aligner can be copied: copies share its engine; errors can be pickled, and what is made of parts cannot."""

import copy
import pickle
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_core.output_parsers import StrOutputParser

from aligner_middleware import (
    AlignerError,
    AlignerMiddleware,
    AlignerRunnable,
    CorrectionTimeoutError,
    DoubtError,
    PromptTooLongError,
)
from tests.chat_models import saying
from tests.fakes import fake_aligner

ALIGNER = fake_aligner(lambda question, answer: answer.replace("idiot", "friend"))
ASKED = "Who am I?"


def test_a_copy_deep_or_not_shares_the_engine() -> None:
    for copied in (copy.copy(ALIGNER), copy.deepcopy(ALIGNER), copy.deepcopy({"a": [ALIGNER]})["a"][0]):
        assert copied is ALIGNER


RUNNABLES: dict[str, Any] = {
    "runnable": AlignerRunnable(ALIGNER, question=ASKED),
    "chain": saying("an idiot") | AlignerRunnable(ALIGNER) | StrOutputParser(),
    "wrapped model": AlignerRunnable(ALIGNER).wrap(saying("an idiot")) | StrOutputParser(),
}


@pytest.mark.parametrize("runnable", RUNNABLES.values(), ids=RUNNABLES)
def test_what_holds_an_aligner_can_be_copied(runnable: Any) -> None:
    given = "an idiot" if runnable is RUNNABLES["runnable"] else ASKED
    for copied in (copy.copy(runnable), copy.deepcopy(runnable), runnable.model_copy(deep=True)):
        assert copied is not runnable
        assert copied.invoke(given) == runnable.invoke(given) == "an friend"


def test_an_agent_with_a_copied_middleware_corrects() -> None:
    middleware = copy.deepcopy(AlignerMiddleware(ALIGNER))
    agent = create_agent(saying("an idiot"), [], middleware=[middleware])
    ask: Any = {"messages": [("user", ASKED)]}
    assert agent.invoke(ask)["messages"][-1].text == "an friend"


def test_an_aligner_made_of_parts_says_that_it_cannot_be_pickled() -> None:
    for what in (ALIGNER, RUNNABLES["runnable"]):
        with pytest.raises(TypeError, match=r"Aligner\('fake', .* was made of parts, which cannot be pickled"):
            pickle.dumps(what)


@pytest.mark.parametrize("error", [PromptTooLongError(9, 8), CorrectionTimeoutError(0.5), DoubtError(("holes",))])
def test_an_error_reaches_another_process_as_it_is(error: AlignerError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))
