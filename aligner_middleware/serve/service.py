"""What all routes share: the loaded aligner, the policy of each client, and those who are told of every decision."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

from aligner_middleware.aligner import Aligner
from aligner_middleware.errors import InputError, MissingQuestionError, RemoteError
from aligner_middleware.langchain.alignment import Alignment
from aligner_middleware.langchain.outcome import Aligned, Outcome
from aligner_middleware.read_ahead import ReadAhead
from aligner_middleware.serve.backlog import Backlog
from aligner_middleware.serve.facts import Facts, facts
from aligner_middleware.serve.keys import find_key
from aligner_middleware.serve.problems import Problem
from aligner_middleware.serve.settings import PolicySettings, ServeSettings

ANONYMOUS = "anonymous"

logger = logging.getLogger("aligner_middleware.serve")


@dataclass(frozen=True)
class Client:
    """Whoever made a request.

    Attributes:
        name: Of its key; `anonymous` where no keys are set.
        policy: Of its key.
        alignment: The aligner with this policy.
    """

    name: str
    policy: PolicySettings
    alignment: Alignment

    def with_policy(self, **options: Any) -> Client:
        """Give the client with other options in its policy, such as `strength`.

        Raises:
            ValidationError: If an option is out of range for the aligner.
            InputError: If it is none of its choices.
        """
        if options.get("mode") == "shadow":  # which holds nothing back
            options["by_sentence"] = False
        fields = {name: getattr(self.alignment, name) for name in type(self.alignment).model_fields}
        alignment = Alignment(**fields | options)
        return replace(self, policy=self.policy.model_copy(update=options), alignment=alignment)


@dataclass(frozen=True)
class Decision:
    """What became of one answer; metrics, audit log and page are told of it.

    Attributes:
        client: Whose it is.
        route: The route that it came by, such as `/v1/chat/completions`.
        question: The question; empty where it is not known.
        answer: The answer as it came.
        text: The answer as it left.
        metadata: As in `response_metadata["aligner"]`; see docs/langchain.md.
        seconds: From the whole answer to its decision.
        error: Name of the error, where there was one.
        at: When.
        id: A name of its own, under which audit log and page know it.
    """

    client: Client
    route: str
    question: str
    answer: str
    text: str
    metadata: Mapping[str, Any]
    seconds: float
    error: str | None = None
    at: datetime = field(default_factory=lambda: datetime.now(UTC))
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    @cached_property
    def facts(self) -> Facts:
        """All of it but the texts, as the listeners tell it."""
        return facts(self)


Listener = Callable[[Decision], None]


def load_aligner(settings: ServeSettings) -> Aligner:
    """Load the aligner that the settings name, or connect to its servers.

    Raises:
        AlignerError: As `Aligner.load` and `connect` do; and if a policy has an instruction that it cannot correct by.
    """
    if settings.aligner_url:
        options: dict[str, Any] = {"model": settings.aligner_url_model, "concurrency": settings.concurrency}
        aligner = Aligner.connect(settings.aligner_url, settings.model, **options)
    else:
        aligner = Aligner.load(settings.model, precision=settings.precision, threads=settings.threads)
    for name, policy in [(ANONYMOUS, settings.policy), *((key.name, key) for key in settings.keys)]:
        try:
            if policy.instruction:
                aligner.instruction_for(policy.instruction)
        except InputError as exc:
            aligner.close()
            raise InputError(f"the policy of {name!r}: {exc}") from None
    return aligner


class Service:
    """The loaded aligner and the policies.

    Args:
        settings: Of the service.
        aligner: The aligner that all clients share.

    Attributes:
        settings, aligner: As given.
        backlog: The answers that wait for the aligner.
        listeners: Called with every decision, in the event loop's thread; they must not block. Their errors are logged.
    """

    def __init__(self, settings: ServeSettings, aligner: Aligner) -> None:
        self.settings = settings
        self.aligner = aligner
        self.backlog = Backlog()
        self.listeners: list[Listener] = []
        self._clients = {key.name: self._client(key.name, key) for key in settings.keys}
        self._anonymous = self._client(ANONYMOUS, settings.policy)

    def client(self, authorization: str | None) -> Client:
        """Find the client of a request by its `Authorization` header.

        Raises:
            Problem: 401, if keys are set and this is none of them.
        """
        if not self._clients:
            return self._anonymous
        return self._clients[find_key(self.settings.keys, authorization).name]

    async def align(self, client: Client, route: str, question: str | MissingQuestionError, answer: str) -> Aligned:
        """Align one answer by the client's policy, and tell the listeners.

        Raises:
            Problem: If the correction fails, and the policy says `raise`.
        """
        start = time.perf_counter()
        with self.backlog.waiting():
            outcome = await client.alignment.aalign_pair(question, answer)
        return self.decided(client, route, question, answer, outcome, start)

    async def stream(
        self,
        client: Client,
        route: str,
        question: str | MissingQuestionError,
        answer: str,
        ahead: ReadAhead | None = None,
    ) -> AsyncGenerator[str | Aligned, None]:
        """Align one answer as `align` does, and give its text as soon as nothing can take it back. Close it at the end.

        Args:
            client: Whose answer it is.
            route: The route that it came by.
            question: The question, or why it is not known.
            answer: The whole answer.
            ahead: What has read it while it arrived. Text that it has released is not given again.

        Yields:
            Pieces, which joined are the rest of the aligned text; then what became of the answer.

        Raises:
            Problem: As of `align`.
        """
        start, sent = time.perf_counter(), len(ahead.released) if ahead else 0
        stream = client.alignment.stream_pair(question, answer, ahead)
        with self.backlog.waiting():
            async with aclosing(stream):
                async for piece in stream:
                    if piece:
                        sent += len(piece)
                        yield piece
        aligned = self.decided(client, route, question, answer, stream.outcome, start)
        if rest := aligned.text[sent:]:  # in shadow mode, of JSON and where errors pass, that is all
            yield rest
        yield aligned

    def decided(
        self,
        client: Client,
        route: str,
        question: str | MissingQuestionError,
        answer: str,
        outcome: Outcome,
        start: float,
    ) -> Aligned:
        """Tell the listeners of an outcome, and give it.

        Args:
            client: Whose answer it is.
            route: The route that it came by.
            question: The question, or why it is not known.
            answer: The answer as it came.
            outcome: The outcome.
            start: `time.perf_counter()` when the answer was whole.

        Raises:
            Problem: If the outcome is an error.
        """
        text, metadata = ("", {}) if isinstance(outcome, Exception) else (outcome.text, outcome.metadata)
        error = type(outcome).__name__ if isinstance(outcome, Exception) else None
        asked = question if isinstance(question, str) else ""
        seconds = time.perf_counter() - start
        self._tell(Decision(client, route, asked, answer, text, metadata, seconds, error))
        if isinstance(outcome, Exception):
            problem = Problem.of(outcome)
            if problem.status == 500 or isinstance(outcome, RemoteError):
                logger.error("a correction failed", exc_info=outcome)
            raise problem from outcome
        return outcome

    def _tell(self, decision: Decision) -> None:
        for listener in self.listeners:
            try:
                listener(decision)
            except Exception:  # a log must not break the answer that it is about
                logger.exception("a listener failed")

    def _client(self, name: str, policy: PolicySettings) -> Client:
        alignment = Alignment(
            aligner=self.aligner,
            strength=policy.strength,
            by_sentence=policy.by_sentence,
            mode=policy.mode,
            on_doubt=policy.on_doubt,
            instruction=policy.instruction,
            on_error=policy.on_error,
            on_missing_question="passthrough",
            on_long_answer="piecewise",
            timeout=self.settings.correction_timeout,
        )
        return Client(name, policy, alignment)
