"""The interface between an aligner and what runs its generations: a thread of this process, or a server elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Protocol, runtime_checkable

from aligner_middleware.engine.generation import Generation, Prefill


class Runner(Protocol):
    """Runs the generations of all calls."""

    def submit(self, generation: Generation, on_step: Callable[[], None] = ...) -> Future[Generation]:
        """Queue a generation. It does not block.

        Args:
            generation: The sequence; it is filled in place.
            on_step: Called in the runner's thread after each step that brought the generation on, and when it ends.

        Returns:
            The generation when it is done, or the error that ended it. May be cancelled at any time.

        Raises:
            ClosedError: If `close` was called, or Python is ending.
        """

    def prefill(self, prefill: Prefill) -> None:
        """Prefill the known part of a prompt, where there is room. Call it again when more of the prompt is known."""

    def abandon(self, prefill: Prefill) -> None:
        """Give up a prompt that no generation will follow."""

    def log_likelihoods(self, prompt: Sequence[int], targets: Sequence[Sequence[int]]) -> list[tuple[float, bool]]:
        """Give for each target the log probability after a prompt, and whether greedy decoding writes it; it blocks."""

    def close(self, *, wait: bool = True) -> None:
        """End all calls with `ClosedError`, and the runner's thread; `wait` until it has ended."""


@runtime_checkable
class RemoteModel(Runner, Protocol):
    """A network behind a runner of its own, in place of a `Model`."""

    max_positions: int
    """Longest sequence, in tokens."""

    device: str
    """Where it runs, in words."""
