"""Which question does this answer belong to?

A runnable on the right of `llm | …` is handed the answer alone. LangChain tells a callback handler what every model run
was asked and what it answered, so one process-wide `QuestionRecord` listens and is asked afterwards, in this order:

1. by the message's own id, which the model run gave it;
2. where only text arrives (`llm | StrOutputParser() | …`), by that text among the model runs of the same chain run,
   the innermost chain first;
3. the only question that was asked in the innermost chain run that asked any;
4. otherwise the question is unknown. It is never guessed between candidates.

The record holds the text of the last human message and of the answer, and whether JSON was asked for, for at most `limit`
answers; once an `AlignerRunnable(dialogue=True)` was made, that of the whole conversation too.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, Generic, TypeVar
from uuid import UUID

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import BaseMessage
from langchain_core.outputs import ChatGeneration, LLMResult
from langchain_core.tracers.context import register_configure_hook

from aligner_middleware.errors import MissingQuestionError
from aligner_middleware.langchain.messages import question_of, question_or_error
from aligner_middleware.langchain.structured import asks_for_structure

K = TypeVar("K")
V = TypeVar("V")

_ANSWERS_PER_CHAIN = 64  # a chain run that calls models without end keeps the latest


@dataclass(frozen=True)
class _Question:
    """What was asked last, and the conversation up to there, where that is recorded.

    Attributes:
        last, dialogue: The texts; empty where there is none.
        structured: Whether a structured answer was asked for.
        cause: Why there is no text.
    """

    last: str
    dialogue: str
    structured: bool
    cause: str = "its prompt is empty"

    def text(self, dialogue: bool) -> str:
        return self.dialogue if dialogue else self.last


@dataclass(frozen=True)
class _Asked:
    question: _Question
    answer: str


@dataclass
class _Run:
    """A run in progress: its parent, what a model was asked, or what was answered beneath a chain."""

    parent: UUID | None
    question: _Question | None = None
    answers: list[_Asked] = field(default_factory=list)


class _Latest(OrderedDict[K, V], Generic[K, V]):
    """A dict of at most `limit` entries that forgets the oldest."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit

    def put(self, key: K, value: V) -> None:
        self[key] = value
        self.move_to_end(key)
        while len(self) > self.limit:
            self.popitem(last=False)


class QuestionRecord(BaseCallbackHandler):
    """Remembers which question each model run was asked.

    Args:
        limit: How many answers, and how many runs in progress, are remembered at most; the oldest go first.

    Attributes:
        enabled: Whether anything is recorded. Switch it off where prompts must not be held in memory; an
            `AlignerRunnable` then needs `question=`, or a dict with question and answer.
        dialogues: Whether whole conversations are recorded too.
    """

    run_inline = True  # keep to the caller's thread: this is a dict lookup, and order matters
    raise_error = False
    ignore_retry = True
    ignore_agent = True
    ignore_retriever = True
    ignore_custom_event = True

    def __init__(self, limit: int = 1024) -> None:
        self.enabled = True
        self.dialogues = False
        self._lock = Lock()
        self._by_message_id: _Latest[str, _Asked] = _Latest(limit)
        self._runs: _Latest[UUID, _Run] = _Latest(limit * 16)  # a run that never ends must not stay for ever

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._by_message_id.clear()
            self._runs.clear()

    @property
    def remembered(self) -> int:
        """Number of answers remembered by their message's id."""
        return len(self._by_message_id)

    @property
    def running(self) -> int:
        """Number of runs in progress that are being followed."""
        return len(self._runs)

    def find(
        self, answer: str, message_id: str | None, parent_run_id: UUID | None, *, dialogue: bool = False
    ) -> str | MissingQuestionError:
        """Find the question that an answer belongs to.

        Args:
            answer: The answer's text.
            message_id: Id of the message it came in, if it came in one.
            parent_run_id: The chain run in which it turned up, if any.
            dialogue: Whether the whole conversation is wanted.

        Returns:
            The question; where it is not known for certain, an error that says why.
        """
        found, scope = self._matches(answer, message_id, parent_run_id)
        asked = {one.question.text(dialogue): one.question.cause for one in found or scope}
        if len(asked) > 1:
            return MissingQuestionError("it may be that of several model runs, which were asked different questions")
        if asked:
            ((question, cause),) = asked.items()
            return question or MissingQuestionError(cause)
        if not self.enabled:
            return MissingQuestionError("the record of questions is switched off")
        return MissingQuestionError("it does not come from a model run of this chain")

    def gave_structure(self, answer: str, message_id: str | None, parent_run_id: UUID | None) -> bool:
        """Say whether an answer certainly is of a model run that was asked for JSON or the like; see `find`."""
        found, _ = self._matches(answer, message_id, parent_run_id)
        return bool(found) and all(one.question.structured for one in found)

    def _matches(
        self, answer: str, message_id: str | None, parent_run_id: UUID | None
    ) -> tuple[list[_Asked], list[_Asked]]:
        """Find what certainly gave an answer, and all that was answered in the innermost chain run that has answers."""
        with self._lock:
            if message_id is not None and (asked := self._by_message_id.get(message_id)):
                return [asked], []
            scopes = [list(run.answers) for _, run in self._ancestors(parent_run_id) if run.answers]
        same_text = ([asked for asked in answers if asked.answer == answer] for answers in scopes)
        return next(filter(None, same_text), []), scopes[0] if scopes else []

    def ask_early(self, message_id: str | None, parent_run_id: UUID | None, *, dialogue: bool = False) -> str | None:
        """Say which question a model run that has not ended yet is likely to be answering.

        Args:
            message_id: Id of a chunk of its answer, which LangChain makes from the run's.
            parent_run_id: The chain run in which it turned up, if any.
            dialogue: Whether the whole conversation is wanted.

        Returns:
            The question of that run, or else of the only model running beneath that chain; `None` where there are several.
        """
        with self._lock:
            runs = [(str(run_id), run) for run_id, run in self._runs.items() if run.question is not None]
            own = [run.question for run_id, run in runs if message_id is not None and message_id.endswith(run_id)]
            scopes = [run_id for run_id, _ in self._ancestors(parent_run_id)]
            beneath = {run.question for _, run in runs if any(at in scopes for at, _ in self._ancestors(run.parent))}
        question = own[0] if own else beneath.pop() if len(beneath) == 1 else None
        return (question.text(dialogue) or None) if question else None

    def _ancestors(self, run_id: UUID | None) -> Iterator[tuple[UUID, _Run]]:
        while run_id is not None and (run := self._runs.get(run_id)):
            yield run_id, run
            run_id = run.parent

    def _start(self, run_id: UUID, parent: UUID | None, question: _Question | None = None) -> None:
        if self.enabled:
            with self._lock:
                self._runs.put(run_id, _Run(parent, question))

    def _end(self, run_id: UUID) -> _Run | None:
        with self._lock:
            return self._runs.pop(run_id, None)

    def on_chat_model_start(
        self,
        serialized: dict[str, Any],
        messages: list[list[BaseMessage]],
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        **kwargs: Any,
    ) -> None:
        """Note what a chat model was asked."""
        last = question_or_error(messages[0])
        whole = question_of(messages[0], dialogue=True) if self.dialogues else None
        text, cause = (last, "") if isinstance(last, str) else ("", last.cause)
        self._start(run_id, parent_run_id, _Question(text, whole or text, _asks(serialized, kwargs), cause))

    def on_llm_start(
        self,
        serialized: dict[str, Any],
        prompts: list[str],
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        **kwargs: Any,
    ) -> None:
        """Note what a text model was asked: its whole prompt."""
        self._start(run_id, parent_run_id, _Question(prompts[0], prompts[0], _asks(serialized, kwargs)))

    def on_llm_end(self, response: LLMResult, *, run_id: UUID, **kwargs: Any) -> None:
        """Tie the question to the answers, by message id and in every chain run around the model."""
        run = self._end(run_id)
        if run is None or run.question is None:
            return
        with self._lock:
            scopes = [ancestor.answers for _, ancestor in self._ancestors(run.parent)]
            for generation in (generation for candidates in response.generations for generation in candidates):
                asked = _Asked(run.question, generation.text)
                if isinstance(generation, ChatGeneration) and generation.message.id:
                    self._by_message_id.put(generation.message.id, asked)
                for answers in scopes:
                    answers.append(asked)
                    del answers[:-_ANSWERS_PER_CHAIN]

    def on_llm_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        """Forget a model run that failed."""
        self._end(run_id)

    def on_chain_start(
        self,
        serialized: dict[str, Any],
        inputs: dict[str, Any],
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        **kwargs: Any,
    ) -> None:
        """Open a scope in which answers may turn up."""
        self._start(run_id, parent_run_id)

    def on_chain_end(self, outputs: dict[str, Any], *, run_id: UUID, **kwargs: Any) -> None:
        """Close it."""
        self._end(run_id)

    def on_chain_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        """Close it."""
        self._end(run_id)

    def on_tool_start(
        self,
        serialized: dict[str, Any],
        input_str: str,
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        **kwargs: Any,
    ) -> None:
        """Link the runs inside a tool to those around it."""
        self._start(run_id, parent_run_id)

    def on_tool_end(self, output: Any, *, run_id: UUID, **kwargs: Any) -> None:
        """Drop the link."""
        self._end(run_id)

    def on_tool_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        """Drop the link."""
        self._end(run_id)


def _asks(serialized: dict[str, Any] | None, run: dict[str, Any]) -> bool:
    """Say whether a model run asks for a structured answer, by what the model was made with and called with."""
    return asks_for_structure((serialized or {}).get("kwargs"), run.get("invocation_params"))


RECORD = QuestionRecord()
"""What every `AlignerRunnable` of this process asks."""

# A default, not `.set()`: it is seen in every thread and context, whoever imports this first.
_record: ContextVar[QuestionRecord | None] = ContextVar("aligner_question_record", default=RECORD)
_listening = False
_listening_lock = Lock()


def listen(dialogues: bool = False) -> None:
    """Have `RECORD` told of every model run from now on; LangChain offers no way to take that back."""
    global _listening
    RECORD.dialogues |= dialogues
    with _listening_lock:
        if not _listening:
            register_configure_hook(_record, inheritable=True)
            _listening = True
