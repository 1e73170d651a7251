"""Which question does this answer belong to?

A runnable on the right of `llm | …` gets the answer alone. LangChain tells a callback handler (`question_handler.py`) the
prompt and the answer of every model run; the record keeps them, and finds an answer's question in this order:

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
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar
from uuid import UUID

from aligner_middleware.errors import MissingQuestionError
from aligner_middleware.forks import Lock

K = TypeVar("K")
V = TypeVar("V")

_ANSWERS_PER_CHAIN = 64  # a chain run that calls models without end keeps the latest


@dataclass(frozen=True)
class RecordedQuestion:
    """The question of a model run, and the conversation up to there, where that is recorded.

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
        """Give the last message, or the whole conversation."""
        return self.dialogue if dialogue else self.last


@dataclass(frozen=True)
class _Exchange:
    """A question and its answer."""

    question: RecordedQuestion
    answer: str


@dataclass
class _Run:
    """A run in progress: its parent, the question of a model run, or the exchanges inside of a chain run."""

    parent: UUID | None
    question: RecordedQuestion | None = None
    exchanges: list[_Exchange] = field(default_factory=list)


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


class QuestionRecord:
    """Remembers the question of each model run.

    Args:
        limit: How many answers, and how many runs in progress, are remembered at most; the oldest go first.

    Attributes:
        enabled: Whether anything is recorded. Switch it off where prompts must not be held in memory; an
            `AlignerRunnable` then needs `question=`, or a dict with question and answer.
        dialogues: Whether whole conversations are recorded too.
    """

    def __init__(self, limit: int = 1024) -> None:
        self.enabled = True
        self.dialogues = False
        self._lock = Lock()
        self._by_message_id: _Latest[str, _Exchange] = _Latest(limit)
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

    # --- finding --------------------------------------------------------------------------------------------

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
        matches, scope = self._matches(answer, message_id, parent_run_id)
        causes = {match.question.text(dialogue): match.question.cause for match in matches or scope}
        if len(causes) > 1:
            return MissingQuestionError("it may be that of several model runs, which were asked different questions")
        if causes:
            ((question, cause),) = causes.items()
            return question or MissingQuestionError(cause)
        if not self.enabled:
            return MissingQuestionError("the record of questions is switched off")
        return MissingQuestionError("it does not come from a model run of this chain")

    def gave_structure(self, answer: str, message_id: str | None, parent_run_id: UUID | None) -> bool:
        """Say whether an answer certainly is of a model run that was asked for JSON or the like; see `find`."""
        matches, _ = self._matches(answer, message_id, parent_run_id)
        return bool(matches) and all(match.question.structured for match in matches)

    def likely_question(
        self, message_id: str | None, parent_run_id: UUID | None, *, dialogue: bool = False
    ) -> str | None:
        """Find the question that a model run is likely to be answering which has not ended yet.

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
            scopes = {run_id for run_id, _ in self._ancestors(parent_run_id)}
            beneath = {run.question for _, run in runs if any(at in scopes for at, _ in self._ancestors(run.parent))}
        question = own[0] if own else beneath.pop() if len(beneath) == 1 else None
        return (question.text(dialogue) or None) if question else None

    def _matches(
        self, answer: str, message_id: str | None, parent_run_id: UUID | None
    ) -> tuple[list[_Exchange], list[_Exchange]]:
        """Find the exchanges that an answer certainly is of, and all those of the innermost chain run that has any."""
        with self._lock:
            if message_id is not None and (exchange := self._by_message_id.get(message_id)):
                return [exchange], []
            scopes = [list(run.exchanges) for _, run in self._ancestors(parent_run_id) if run.exchanges]
        same_text = ([exchange for exchange in scope if exchange.answer == answer] for scope in scopes)
        return next(filter(None, same_text), []), scopes[0] if scopes else []

    def _ancestors(self, run_id: UUID | None) -> Iterator[tuple[UUID, _Run]]:
        while run_id is not None and (run := self._runs.get(run_id)):
            yield run_id, run
            run_id = run.parent

    # --- recording ------------------------------------------------------------------------------------------

    def start(self, run_id: UUID, parent: UUID | None, question: RecordedQuestion | None = None) -> None:
        """Follow a run; a model run has a question."""
        if self.enabled:
            with self._lock:
                self._runs.put(run_id, _Run(parent, question))

    def end(self, run_id: UUID, answers: Iterable[tuple[str | None, str]] = ()) -> None:
        """Follow a run no further, and tie its question to its answers, in every chain run around it.

        Args:
            run_id: The run.
            answers: The answers of a model run: the message's id, where there is one, and the text.
        """
        with self._lock:
            run = self._runs.pop(run_id, None)
            if run is None or run.question is None:
                return
            scopes = [ancestor.exchanges for _, ancestor in self._ancestors(run.parent)]
            for message_id, text in answers:
                exchange = _Exchange(run.question, text)
                if message_id:
                    self._by_message_id.put(message_id, exchange)
                for exchanges in scopes:
                    exchanges.append(exchange)
                    del exchanges[:-_ANSWERS_PER_CHAIN]


RECORD = QuestionRecord()
"""The record of this process, which every `AlignerRunnable` reads."""
