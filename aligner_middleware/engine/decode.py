"""Greedy decoding of sequences that share passes, and begin and end between them.

Where a model gives verdicts, the pass over the prompt gives one, and a kept answer costs nothing more.

A draft is verified in the pass that prefills its prompt. Draft tokens are accepted up to the first that the model would not
have written; the rest is rejected. Then the decoder finds its place in the draft again (`draft.py`) as soon as it can, and
verifies from there. The result is that of greedy decoding without a draft, and a draft that is right costs one pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from operator import itemgetter

from aligner_middleware.engine.generation import Generation, Prefill
from aligner_middleware.engine.model import KVCache, Logits, Model

_ROWS = 16  # sequences that may share a pass
_SHORTEST_ROW = 2048  # tokens
_PROMPT_TOKENS = 1024  # of prompts that begin in one step
_SHARED = 0.18  # cost of a row in a shared pass, as a share of a pass of its own (int8 on a CPU)


class Decoder:
    """Sequences in the rows of one KV cache. For one thread.

    Args:
        model: The network that predicts tokens.
        stop: Tokens that end a sequence.
        cache_bytes: Most memory for keys and values; on the CPU it is taken as rows fill. A sequence that needs more gets
            it, and runs alone.
    """

    def __init__(self, model: Model, stop: frozenset[int], cache_bytes: int = 2**30) -> None:
        self._model = model
        self._stop = stop
        self._cache_bytes = cache_bytes
        self._cache: KVCache | None = None
        self._count = 0  # of rows
        self._held: dict[Generation | Prefill, int] = {}  # sequences and their rows, the oldest first
        self._stopped = False

    @property
    def running(self) -> list[Generation | Prefill]:
        """The sequences that have a row, the oldest first."""
        return list(self._held)

    def admit(self, sequence: Generation | Prefill, longest: int) -> bool:
        """Give a sequence a row, or say that there is none for it now.

        Args:
            sequence: A generation takes over the row of its `prefill`.
            longest: Most tokens that its row may have to hold.

        Raises:
            MemoryError: If there is no memory for its keys and values.
        """
        prefill = sequence.prefill if isinstance(sequence, Generation) else None
        if prefill is not None:
            if prefill in self._held and self._cache and longest <= self._cache.capacity:
                self._held[sequence] = self._held.pop(prefill)
                return True
            self.drop(prefill)
        if self._cache is None or longest > self._cache.capacity or self._too_few(sequence, longest):
            if any(isinstance(held, Generation) for held in self._held):
                return False
            for held in self.running:
                self.drop(held)
            self._make_cache(longest)
        if len(self._held) == self._count and isinstance(sequence, Generation):
            self._make_room()
        if len(self._held) == self._count:
            return False
        row = next(row for row in range(self._count) if row not in self._held.values())
        self._held[sequence] = row
        if isinstance(sequence, Prefill):
            sequence.cached_tokens = []
        assert self._cache is not None
        self._cache.trim(row, 0)
        return True

    def drop(self, sequence: Generation | Prefill) -> None:
        """Free a sequence's row, if it has one."""
        if isinstance(sequence, Prefill):
            sequence.cached_tokens = []
        self._held.pop(sequence, None)

    def stop(self) -> None:
        """Make the current pass fail as soon as possible, and all later ones at once. For any thread."""
        self._stopped = True
        if (cache := self._cache) is not None:
            cache.stop()

    def release(self) -> None:
        """Free the memory for keys and values, and all rows."""
        for held in self.running:
            self.drop(held)
        self._cache, self._count = None, 0

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return any(isinstance(held, Generation) or self._needs_prefill(held) for held in self._held)

    def step(self) -> list[Generation]:
        """Prefill new sequences, then make a pass for every other one.

        New sequences that wait for a verdict share a pass. Otherwise one of them is prefilled, together with its draft.

        Returns:
            The generations that had a pass. Those that ended or failed have freed their rows.
        """
        if self._cache is None:
            return []
        held = [(row, one) for one, row in self._held.items()]
        fresh = _next_to_begin([(row, one) for row, one in held if isinstance(one, Generation) and not one.started])
        old = [(row, one) for row, one in held if isinstance(one, Generation) and one.started]
        prefills = [(row, one) for row, one in held if isinstance(one, Prefill) and self._needs_prefill(one)]
        for row, prefill in [] if fresh else prefills[:1]:
            self._prefill(row, prefill)
            self._held[prefill] = self._held.pop(prefill)  # next time it is the turn of another
        if len(fresh) > 1:
            self._decide_together(fresh)
        else:
            self._advance_alone(fresh)
        if len(old) > 1 and len(old) > (1 - _SHARED) + _SHARED * (1 + max(row for row, _ in old)):
            self._advance_together(old)
        else:
            self._advance_alone(old)
        moved = [generation for _, generation in (*fresh, *old)]
        for generation in moved:
            if generation.done:
                self._leave(generation)
        return moved

    def _leave(self, generation: Generation) -> None:
        """Free the row of a generation that has ended; after a bare verdict its prompt goes on being prefilled there."""
        row, prefill = self._held.pop(generation), generation.prefill
        if prefill is None or prefill in self._held or prefill.abandoned:
            return
        if generation.verdict_only and generation.error is None:
            self._held[prefill] = row
            prefill.cached_tokens = list(generation.prompt)

    def _capacity(self, longest: int) -> int:
        return min(max(_SHORTEST_ROW, 1 << (longest - 1).bit_length()), max(longest, self._model.max_positions))

    def _too_few(self, sequence: Generation | Prefill, longest: int) -> bool:
        """Whether the cache still has the few long rows that an earlier sequence needed."""
        free = not self._held and isinstance(sequence, Generation)
        return free and self._cache is not None and self._capacity(longest) < self._cache.capacity

    def _make_cache(self, longest: int) -> None:
        capacity = self._capacity(longest)
        count = max(1, min(_ROWS, self._cache_bytes // (capacity * self._model.bytes_per_token)))
        self._cache, self._count = None, 0  # the old one is freed before the new one is made
        self._cache = self._model.new_cache(count, capacity)
        self._count = count
        if self._stopped:
            self._cache.stop()

    def _make_room(self) -> None:
        """Free the row of a prompt that is still being written: it can be prefilled again."""
        for held in self._held:
            if isinstance(held, Prefill):
                self.drop(held)
                return

    def _needs_prefill(self, prefill: Prefill) -> bool:
        assert self._cache is not None
        return len(prefill.cached_tokens) < len(prefill.prompt) <= self._cache.capacity

    def _prefill(self, row: int, prefill: Prefill) -> None:
        assert self._cache is not None
        prompt = list(prefill.prompt)
        common = prefill.common(prompt)
        self._cache.trim(row, common)
        try:
            for _ in self._cache.extend(row, prompt[common:], wanted=1):
                pass
        except Exception:  # the pass of its generation will fail in the same way, and be reported
            prompt = prompt[:common]
            self._cache.trim(row, common)
        prefill.cached_tokens = prompt

    def _advance_alone(self, group: Sequence[tuple[int, Generation]]) -> None:
        """Give each sequence a pass of its own, over the tokens that the cache lacks and the draft's proposal."""
        assert self._cache is not None
        for row, generation in group:
            try:
                tokens = [generation.latest] if generation.started else self._rest_of_prompt(row, generation)
                if generation.undecided:
                    for logits in self._cache.extend(row, tokens, 1):
                        generation.decide(logits[-1])
                    continue
                proposal = generation.propose()
                pieces = self._cache.extend(row, [*tokens, *proposal], 1 + len(proposal))
                generation.accept(_choices(generation, pieces), self._stop)
                self._rollback(row, generation)
            except Exception as exc:  # any error is reported to the caller
                generation.error = exc

    def _decide_together(self, group: Sequence[tuple[int, Generation]]) -> None:
        """Give all sequences their verdicts."""
        assert self._cache is not None
        try:
            logits = self._cache.begin({row: generation.prompt for row, generation in group})
            for at, (_, generation) in enumerate(group):
                generation.decide(logits[at])
        except Exception as exc:  # all of them shared the pass
            for _, generation in group:
                generation.error = exc

    def _advance_together(self, group: Sequence[tuple[int, Generation]]) -> None:
        """Give all sequences their next token in one pass, then verify the proposals that begin with that token."""
        assert self._cache is not None
        try:
            logits = self._cache.step({row: generation.latest for row, generation in group})
            next_tokens = []
            for at, (_, generation) in enumerate(group):
                generation.propose()
                next_tokens.append(generation.choose(logits[at : at + 1]))
            for (row, generation), choices in zip(group, next_tokens, strict=True):
                proposal = generation.proposal
                if proposal and proposal[0] == choices[0]:
                    pieces = self._cache.extend(row, proposal, len(proposal))
                    choices = _choices(generation, pieces, choices)
                generation.accept(choices, self._stop)
                self._rollback(row, generation)
        except Exception as exc:  # all of them shared the pass
            for _, generation in group:
                generation.error = exc

    def _rest_of_prompt(self, row: int, generation: Generation) -> Sequence[int]:
        """Give the prompt's tokens that the cache lacks; at least the last, whose pass predicts the first new token."""
        assert self._cache is not None
        if generation.prefill is None:
            return generation.prompt
        common = min(generation.prefill.common(generation.prompt), len(generation.prompt) - 1)
        self._cache.trim(row, common)
        return generation.prompt[common:]

    def _rollback(self, row: int, generation: Generation) -> None:
        if generation.proposal and self._cache is not None:
            self._cache.trim(row, generation.cached)


def _next_to_begin(fresh: list[tuple[int, Generation]]) -> list[tuple[int, Generation]]:
    """Choose the sequences that begin in this step: several if all wait for verdicts and none has been prefilled.

    Args:
        fresh: Rows and sequences, in the order in which they came.

    Returns:
        Some of them, in the order of their rows: neighbours can share a pass.
    """
    together: list[tuple[int, Generation]] = []
    tokens = 0
    for row, generation in fresh:
        tokens += len(generation.prompt)
        if not generation.undecided or generation.prefill is not None or tokens > _PROMPT_TOKENS:
            break
        together.append((row, generation))
    return sorted(together, key=itemgetter(0)) if len(together) > 1 else fresh[:1]


def _choices(generation: Generation, logits: Iterable[Logits], choices: Sequence[int] = ()) -> list[int]:
    """Choose tokens after those chosen already, up to the piece of logits in which the proposal is rejected."""
    chosen, proposal = list(choices), generation.proposal
    for piece in logits:
        chosen += generation.choose(piece, len(chosen))
        if chosen[: len(proposal)] != list(proposal[: len(chosen)]):
            break
    return chosen


def decode(model: Model, generations: Sequence[Generation], stop: frozenset[int]) -> Iterator[None]:
    """Run sequences to their ends, together, in the calling thread.

    Args:
        model: The network that predicts tokens.
        generations: The sequences; they are filled in place.
        stop: Tokens that end a sequence.

    Yields:
        Once after every step.

    Raises:
        Exception: The error of a pass.
    """
    decoder = Decoder(model, stop)
    waiting = list(generations)
    while waiting or decoder.running:
        while waiting and decoder.admit(waiting[0], waiting[0].longest):
            waiting.pop(0)
        for generation in decoder.step():
            if generation.error is not None:
                raise generation.error
        yield
