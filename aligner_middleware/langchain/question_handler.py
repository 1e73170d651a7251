"""Feeds the question record: a callback handler that LangChain calls at the start and the end of every run."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any
from uuid import UUID

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import BaseMessage
from langchain_core.outputs import ChatGeneration, LLMResult

from aligner_middleware.forks import Lock
from aligner_middleware.langchain.messages import question_of, question_or_error
from aligner_middleware.langchain.question_record import RECORD, QuestionRecord, RecordedQuestion
from aligner_middleware.langchain.structured import asks_for_structure


class QuestionHandler(BaseCallbackHandler):
    """Records the question and the answers of each model run, and the chain and tool runs around it.

    Args:
        record: Where they are recorded.
    """

    run_inline = True  # stay in the caller's thread: this is a dict lookup, and order matters
    raise_error = False
    ignore_retry = True
    ignore_agent = True
    ignore_retriever = True
    ignore_custom_event = True

    def __init__(self, record: QuestionRecord) -> None:
        self._record = record

    def on_chat_model_start(
        self,
        serialized: dict[str, Any],
        messages: list[list[BaseMessage]],
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        **kwargs: Any,
    ) -> None:
        """Record the question of a chat model."""
        last = question_or_error(messages[0])
        whole = question_of(messages[0], dialogue=True) if self._record.dialogues else None
        text, cause = (last, "") if isinstance(last, str) else ("", last.cause)
        question = RecordedQuestion(text, whole or text, _asks_for_structure(serialized, kwargs), cause)
        self._record.start(run_id, parent_run_id, question)

    def on_llm_start(
        self,
        serialized: dict[str, Any],
        prompts: list[str],
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        **kwargs: Any,
    ) -> None:
        """Record the question of a text model: its whole prompt."""
        question = RecordedQuestion(prompts[0], prompts[0], _asks_for_structure(serialized, kwargs))
        self._record.start(run_id, parent_run_id, question)

    def on_llm_end(self, response: LLMResult, *, run_id: UUID, **kwargs: Any) -> None:
        """Record the answers of a model."""
        generations = [generation for candidates in response.generations for generation in candidates]
        self._record.end(
            run_id,
            [
                (generation.message.id if isinstance(generation, ChatGeneration) else None, generation.text)
                for generation in generations
            ],
        )

    def on_llm_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        """Forget a model run that failed."""
        self._record.end(run_id)

    def on_chain_start(
        self,
        serialized: dict[str, Any],
        inputs: dict[str, Any],
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        **kwargs: Any,
    ) -> None:
        """Follow a chain run, in which answers may turn up."""
        self._record.start(run_id, parent_run_id)

    def on_chain_end(self, outputs: dict[str, Any], *, run_id: UUID, **kwargs: Any) -> None:
        """Forget a chain run."""
        self._record.end(run_id)

    def on_chain_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        """Forget a chain run."""
        self._record.end(run_id)

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
        self._record.start(run_id, parent_run_id)

    def on_tool_end(self, output: Any, *, run_id: UUID, **kwargs: Any) -> None:
        """Forget a tool run."""
        self._record.end(run_id)

    def on_tool_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        """Forget a tool run."""
        self._record.end(run_id)


def _asks_for_structure(serialized: dict[str, Any] | None, run: dict[str, Any]) -> bool:
    """Say whether a model run asks for a structured answer: by the model's settings, or by the call's parameters."""
    return asks_for_structure((serialized or {}).get("kwargs"), run.get("invocation_params"))


_HANDLER = QuestionHandler(RECORD)
# A default, not `.set()`: it is seen in every thread and context, whoever imports this first.
_handler: ContextVar[QuestionHandler | None] = ContextVar("aligner_question_record", default=_HANDLER)
_listening = False
_listening_lock = Lock()


def listen(dialogues: bool = False) -> None:
    """Record every model run of this process from now on; LangChain offers no way to stop that.

    Args:
        dialogues: Whether whole conversations are recorded too.
    """
    from langchain_core.tracers.context import register_configure_hook  # late: it imports much

    global _listening
    RECORD.dialogues |= dialogues
    with _listening_lock:
        if not _listening:
            register_configure_hook(_handler, inheritable=True)
            _listening = True
