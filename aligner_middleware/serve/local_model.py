"""SmolLM2-135M-Instruct through transformers: conversations in, pieces of text out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

from aligner_middleware.checkpoints.base import base_folder
from aligner_middleware.serve.problems import Problem


@dataclass(frozen=True)
class Asked:
    """A request to the model.

    Attributes:
        messages: The conversation: `role` and `content` of each message.
        max_tokens: Longest answer.
        temperature: Of sampling; 0 takes the likeliest token.
        stops: Texts before which the answer ends.
    """

    messages: list[dict[str, str]]
    max_tokens: int
    temperature: float
    stops: tuple[str, ...] = ()


@dataclass(frozen=True)
class Usage:
    """The end of an answer: tokens of prompt and answer, and OpenAI's reason for its end."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish_reason: str = "stop"


Generate = Callable[[Asked, threading.Event], Iterator[str | Usage]]
"""Gives the pieces of an answer and then its usage; ends early where the event is set. It may block."""


class SmallModel:
    """Generates answers. The model is loaded with the first; use it from one thread at a time."""

    def __init__(self) -> None:
        self._loaded: tuple[Any, Any] | None = None

    def __call__(self, asked: Asked, stop: threading.Event) -> Iterator[str | Usage]:
        """See `Generate`.

        Raises:
            Problem: 400, if the conversation is longer than the model's context.
            BuildError: If the weights cannot be found.
        """
        from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

        class Stopped(StoppingCriteria):
            def __call__(self, ids: Any, scores: Any, **options: Any) -> Any:
                return stop.is_set() or over.is_set()

        over = threading.Event()
        model, tokenizer = self._load()
        prompt = tokenizer.apply_chat_template(asked.messages, add_generation_prompt=True, return_tensors="pt")
        length, room = prompt.shape[1], model.config.max_position_embeddings - asked.max_tokens
        if length > room:
            reason = f"the conversation has {length} tokens, and the local model takes {room}"
            raise Problem(400, reason, code="context_length_exceeded", param="messages")
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        sampling = {"do_sample": True, "temperature": asked.temperature} if asked.temperature else {"do_sample": False}
        options = {"max_new_tokens": asked.max_tokens, "streamer": streamer, **sampling}
        worker = _Worker(
            lambda: model.generate(
                prompt,
                attention_mask=prompt.new_ones(prompt.shape),
                pad_token_id=tokenizer.pad_token_id,
                stopping_criteria=StoppingCriteriaList([Stopped()]),
                **options,
            ),
            streamer.end,
        )
        worker.start()
        found = yield from _until(streamer, asked.stops)
        over.set()
        worker.join()
        if worker.error is not None:
            raise worker.error
        tokens = worker.result.shape[1] - length
        cut = tokens >= asked.max_tokens and not found and int(worker.result[0, -1]) != tokenizer.eos_token_id
        yield Usage(length, tokens, "length" if cut else "stop")

    def _load(self) -> tuple[Any, Any]:
        if self._loaded is None:
            import torch
            from transformers import AutoModelForCausalLM, AutoTokenizer

            folder = str(base_folder()[0])
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            self._loaded = model.eval(), AutoTokenizer.from_pretrained(folder)  # type: ignore[no-untyped-call]
        return self._loaded


class _Worker(threading.Thread):
    """Runs the model; its end, or its error, ends the stream of text."""

    def __init__(self, run: Callable[[], Any], end: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self._run, self._end = run, end
        self.result: Any = None
        self.error: Exception | None = None

    def run(self) -> None:
        """Generate."""
        try:
            self.result = self._run()
        except Exception as exc:
            self.error = exc
            self._end()


def _until(pieces: Iterator[str], stops: tuple[str, ...]) -> Generator[str, None, bool]:
    """Give pieces up to the first of some texts, and tell whether there was one; its possible beginning is held back."""
    held = ""
    longest = max(map(len, stops), default=1)
    for piece in pieces:
        held += piece
        places = [place for stop in stops if (place := held.find(stop)) >= 0]
        if places:
            if before := held[: min(places)]:
                yield before
            return True
        ready = len(held) - (longest - 1)
        if ready > 0:
            yield held[:ready]
            held = held[ready:]
    if held:
        yield held
    return False
