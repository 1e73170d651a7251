"""The facade: a question and an answer in, a `Correction` out."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import inspect
import math
import os
import queue
import threading
import time
import weakref
import zlib
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Never, Self, TypeVar, get_args, overload

import numpy as np

from aligner_middleware.artifact import (
    LEVELS,
    MODEL_FILE,
    Artifact,
    Calibration,
    Level,
    Precision,
    cached_folder,
    exported_folder,
)
from aligner_middleware.correction import Correction, Usage
from aligner_middleware.data.files import is_folder
from aligner_middleware.engine import GREEDY, Generation, Model, Prefill, Sampler, VerdictRule
from aligner_middleware.engine.model import log_probabilities
from aligner_middleware.engine.scheduler import Scheduler, refuse_green_threads
from aligner_middleware.errors import (
    ArtifactError,
    CorrectionTimeoutError,
    DoubtError,
    InputError,
    MissingExtraError,
    PromptTooLongError,
    did_you_mean,
)
from aligner_middleware.text.edits import apply
from aligner_middleware.text.safeguards import doubts, set_aside
from aligner_middleware.text.targets import encode_target
from aligner_middleware.text.template import (
    VERDICTS,
    PromptTemplate,
    decode_operations,
    encode_continuation,
    encode_prompt,
    resolve_template,
    verdict_ids,
)
from aligner_middleware.text.tokenizer import Tokenizer

Engine = Literal["onnx", "torch"]
Strength = Level | float
OnDoubt = Literal["passthrough", "raise", "keep"]
T = TypeVar("T")

_AHEAD, _AHEAD_SHARE = 32, 1 / 32  # characters of a streamed answer that go through together; at least this share of it
_APART = 0.02  # seconds at least between two encodings of a streamed answer
_ROOM = 256  # tokens that a correction may take beyond the answer, or beyond twice the answer where it is a copy
_CHARACTERS = 32  # for each token of the context: a longer text is refused without counting its tokens
_UNSURE = 8  # its latest tokens may be cut another way once more text has come


@dataclass(frozen=True)
class _Call:
    """A pair on its way through the engine.

    Attributes:
        question, answer: What was given.
        aside: A block of reasoning at the answer's beginning, which is kept as it is.
        text: The rest, which is corrected.
        generation: Its sequence; `None` where there is nothing to correct.
        on_doubt: What becomes of a doubtful correction.
    """

    question: str
    answer: str
    aside: str
    text: str
    generation: Generation | None
    on_doubt: OnDoubt


class ReadAhead:
    """Lets a prompt through the model while its answer is still being written. `Aligner.read_ahead` makes one.

    Args:
        scheduler: What runs the model.
        encode: Makes a prompt of the answer so far; `None` for one that reads nothing.
        longest: Characters of an answer after which it is not read any further.

    Attributes:
        prefill: What the engine has of it.
    """

    def __init__(self, scheduler: Scheduler, encode: Callable[[str], list[int]] | None, longest: int) -> None:
        self.prefill = Prefill()
        self._scheduler = scheduler
        self._encode = encode
        self._longest = longest
        self._chunks: list[str] = []
        self._length = 0
        self._read = 0
        self._encoded = 0.0
        self._reading = False
        self._lock = threading.Lock()
        self._taken = False

    def feed(self, chunk: str) -> None:
        """Take in a piece of the answer. It is encoded in another thread."""
        self._chunks.append(chunk)
        self._length += len(chunk)
        now = time.monotonic()
        new = self._length - self._read >= max(_AHEAD, self._read * _AHEAD_SHARE) and now >= self._encoded + _APART
        if self._encode is None or self._reading or not new or self._length > self._longest:
            return
        self._read, self._encoded, self._reading = self._length, now, True
        self._chunks = ["".join(self._chunks)]
        _texts.submit(self._look, self._encode, self._chunks[0])

    def _look(self, encode: Callable[[str], list[int]], answer: str) -> None:
        try:
            prompt = encode(answer)  # what it raises, such as for half of a surrogate pair, shows in the end
            with self._lock:
                if prompt and not self._taken:
                    self.prefill.prompt = prompt
                    self._scheduler.prefill(self.prefill)
        finally:
            self._reading = False

    def take(self) -> Prefill:
        """Read no further, and give what the engine has; a correction takes it over."""
        with self._lock:
            self._taken = True
        return self.prefill

    def close(self) -> None:
        """Free what it took, unless a correction has taken it over."""
        self._scheduler.abandon(self.take())


class Aligner:
    """A small model that corrects answers. `Aligner.load` makes one.

    It may be shared between threads and tasks: calls that run at the same time share passes of the model. `close`, or the
    end of a `with` block, ends its thread; so do the garbage collector and the end of Python. A copy, deep or not, is the
    aligner itself; a pickled one is loaded again.

    Args:
        model: What predicts tokens.
        tokenizer: Its tokenizer.
        template: The prompt it was trained with.
        eos_token_ids: Tokens that end a correction.
        name: What to call it in reports.
        max_new_tokens: Longest correction; `None` for the answer and 256 tokens more, or twice the answer for copies.
        draft: Whether the answer is verified as a draft, rather than decoded again. The result is the same.
        temperature: 0 takes the most likely token; above it tokens are drawn (the paper: 0.3).
        top_p: Of the most likely tokens only those that together have this probability are drawn (the paper: 0.95).
        seed: Of the draws: with it, a question and an answer always give the same.
        revision: What tells one build of `name` from another in cache keys.
        calibration: Its levels of strength; `None` for those of an aligner that nobody has calibrated.

    Attributes:
        name: As given.
        calibration: As given.
        source: What `load` was given; `None` for one that was made in another way.
        precision: Of its weights, where it was loaded.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        template: PromptTemplate,
        eos_token_ids: Sequence[int],
        *,
        name: str = "custom",
        max_new_tokens: int | None = None,
        draft: bool = True,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        revision: str | None = None,
        calibration: Calibration | None = None,
    ) -> None:
        if temperature < 0 or not 0 < top_p <= 1:
            raise InputError(
                f"temperature is {temperature}, expected at least 0; top_p is {top_p}, expected above 0, up to 1"
            )
        if max_new_tokens is not None and max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {max_new_tokens}, expected at least 1")
        self.name = name
        self.calibration = calibration or Calibration()
        self.source: str | None = None
        self.precision: Precision | None = None
        self._load_again: Callable[[], Aligner] | None = None
        self._verdict_ids = verdict_ids(tokenizer, template)
        self._model = model
        self._scheduler = Scheduler(model, frozenset(eos_token_ids))
        weakref.finalize(self, self._scheduler.close, wait=False)
        self._tokenizer = tokenizer
        self._template = template
        self._max_new_tokens = max_new_tokens
        self._draft = draft
        self._sampling = (temperature, top_p, seed)
        self._revision = revision
        self._tail = _tail_length(tokenizer, template)
        self._end = eos_token_ids[0]

    @classmethod
    def load(
        cls,
        model: str | Path = "default",
        *,
        precision: Precision | None = None,
        providers: Sequence[str] | None = None,
        prompt: str | PromptTemplate | None = None,
        max_new_tokens: int | None = None,
        draft: bool = True,
        engine: Engine = "onnx",
        threads: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        **unknown: Never,
    ) -> Aligner:
        """Load an aligner, building it first if it is not in the cache yet and `[build]` is installed.

        Args:
            model: `default`; an exported folder; or what `aligner export` takes: an adapter's or a checkpoint's folder,
                or a hub id.
            precision: Of the weights. `float16` is for a GPU, `int8` for the CPU; `None` for `int8`, and for that of an
                exported folder.
            providers: ONNX Runtime's execution providers, in order of preference; `None` for CUDA where this ONNX Runtime
                has it and it can run the graph, and the CPU. `Aligner.device` says which is used.
            prompt: A template's name, or a text with `{question}` and `{answer}`; `None` for the one that belongs to it.
            max_new_tokens: Longest correction; `None` for the answer and 256 tokens more, or twice the answer for copies.
            draft: Whether the answer is verified as a draft. The result is the same without, only slower.
            engine: `torch` runs the checkpoint in PyTorch: the reference for tests and benchmarks.
            threads: Threads of one pass; `None` for all cores.
            temperature: 0 takes the most likely token; above it tokens are drawn (the paper: 0.3).
            top_p: Of the most likely tokens only those that together have this probability are drawn (the paper: 0.95).
            seed: Of the draws: with it, a question and an answer always give the same.
            **unknown: Nothing: a misspelt name is set right in the error.

        Raises:
            InputError: If an option is out of range, or the engine has no such option.
            ArtifactError: If an exported folder is incomplete, altered, or of another precision; or if ONNX Runtime lacks a
                provider, or cannot start any.
            BuildError: If the checkpoint cannot be had or exported, or the cache not written.
            MissingExtraError: If it would have to be built and `[build]` is not installed.
        """
        _refuse(unknown, cls.load)
        refuse_green_threads()
        if threads is not None and threads < 1:
            raise InputError(f"threads is {threads}, expected at least 1, or None for all cores")
        if precision is not None:
            _check_choice("precision", precision, get_args(Precision))
        if engine not in get_args(Engine):
            raise InputError(f"engine is {engine!r}, expected 'onnx' or 'torch'")
        model = str(model)
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "draft": draft}
        options |= {"temperature": temperature, "top_p": top_p, "seed": seed}
        asked: dict[str, Any] = {
            "precision": precision,
            "prompt": prompt,
            "providers": providers,
            "threads": threads,
            "engine": engine,
        }
        if engine == "torch":
            if providers is not None or threads is not None:
                raise InputError("providers and threads are ONNX Runtime's: engine='torch' takes neither")
            aligner = cls._load_torch(model, precision or "int8", prompt, options)
        else:
            aligner = cls._load_onnx(model, precision, prompt, providers, threads, options)
        aligner.source = model
        aligner._load_again = partial(cls.load, _absolute(model), **asked, **options)
        return aligner

    @classmethod
    def _load_onnx(
        cls,
        model: str,
        precision: Precision | None,
        prompt: str | PromptTemplate | None,
        providers: Sequence[str] | None,
        threads: int | None,
        options: dict[str, Any],
    ) -> Aligner:
        from aligner_middleware.engine.onnx import OnnxModel

        folder, artifact = _exported(model, precision or "int8", prompt)
        if precision not in (None, artifact.precision):
            raise ArtifactError(
                f"{folder} holds weights in {artifact.precision}, not in {precision}: leave precision out, or export them "
                f"again with --precision {precision}"
            )
        session = OnnxModel(folder / MODEL_FILE, artifact, providers=providers, threads=threads)
        tokenizer = artifact.tokenizer(folder)
        template = artifact.template if prompt is None else resolve_template(prompt)
        content = repr((sorted(artifact.files.items()), artifact.calibration))
        revision = hashlib.sha256(content.encode()).hexdigest()[:12]
        own: dict[str, Any] = {"name": artifact.name, "revision": revision, "calibration": artifact.calibration}
        aligner = cls(session, tokenizer, template, artifact.eos_token_ids, **own, **options)
        aligner.precision = artifact.precision
        return aligner

    @classmethod
    def _load_torch(
        cls, model: str, precision: Precision, prompt: str | PromptTemplate | None, options: dict[str, Any]
    ) -> Aligner:
        if exported_folder(model) is not None:
            raise ArtifactError(
                f"{model} is an exported folder: engine='torch' runs the checkpoint that it was exported from, give that"
            )
        if not _can_build():
            raise MissingExtraError("engine='torch'", "build")
        from aligner_middleware.checkpoints.checkpoint import end_token_ids, open_checkpoint
        from aligner_middleware.engine.pytorch import TorchModel

        checkpoint = open_checkpoint(model, prompt)
        tokenizer = checkpoint.tokenizer()
        used: Precision = "float16" if precision == "float16" else "float32"
        end = end_token_ids(checkpoint.folder, tokenizer, checkpoint.template)
        own: dict[str, Any] = {"name": model, "calibration": checkpoint.calibration()}
        aligner = cls(TorchModel(checkpoint.load(used)), tokenizer, checkpoint.template, end, **own, **options)
        aligner.precision = used
        return aligner

    def __repr__(self) -> str:
        return f"Aligner({self.name!r}, {self.precision or 'precision unknown'}, on {self.device})"

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce__(self) -> Any:
        if self._load_again is None:
            raise TypeError(f"{self!r} was made of parts, which cannot be pickled: make it by Aligner.load")
        return self._load_again, ()

    @property
    def device(self) -> str:
        """What its passes run on, such as `CPUExecutionProvider`."""
        return self._model.device

    def close(self) -> None:
        """Give up what is under way, with `ClosedError`, and end the aligner's thread.

        A pass that is under way is stopped and waited for.
        """
        self._scheduler.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def has_verdicts(self) -> bool:
        """Whether it says keep, edit or rewrite before it writes."""
        return self._verdict_ids is not None

    @property
    def identity(self) -> dict[str, Any]:
        """All that a correction depends on beside question and answer; for cache keys and traces."""
        temperature, top_p, seed = self._sampling
        drawn = {"temperature": temperature, "top_p": top_p, "seed": seed} if temperature else {}
        return {
            "name": self.name,
            "revision": self._revision,
            "template": self._template.name,
            "max_new_tokens": self._max_new_tokens,
        } | drawn

    def count_tokens(self, text: str, at_most: int | None = None) -> int:
        """Count the tokens of a text, as this aligner reads it.

        Args:
            text: The text.
            at_most: A text that must have more than these is not counted: some number above is given.
        """
        if at_most is not None and len(text) > at_most * _CHARACTERS:
            return max(at_most + 1, len(text) // _CHARACTERS)
        return len(self._tokenizer.encode(text))

    def longest_answer(self, question: str) -> int:
        """Say how many tokens an answer to this question may have: a copy must fit into the context beside it.

        Raises:
            PromptTooLongError: If the question leaves no room for any.
        """
        limit = self._model.max_positions
        self._check_length(question)
        room = limit - len(encode_prompt(self._tokenizer, self._template, question, "")) - 1
        # Marks and numbers take up to a third of an answer's tokens.
        longest = room // 2 if self._copies else (room - self._least_room) * 3 // 4
        if longest < 1:
            raise PromptTooLongError(self.count_tokens(question), limit, what="the question is")
        return longest

    def log_likelihood(self, question: str, answer: str, corrections: Sequence[str]) -> list[tuple[float, bool]]:
        """Say how likely each of some texts is as the correction of an answer: log μ(y_c | y_o, x), paper section 2.

        An aligner with verdicts can write some texts in several forms; the one that it is trained on counts.

        Args:
            question: The question, x.
            answer: The answer, y_o.
            corrections: The texts, y_c.

        Returns:
            For each the natural logarithm of its probability, its end included, and whether greedy decoding writes it.

        Raises:
            InputError: If the question is blank, or a text does not fit into the context.
        """
        _check_question(question)
        self._check_length(question, max(corrections, key=len, default=""))
        self._check_length(question, answer)
        prompt = encode_prompt(self._tokenizer, self._template, question, answer)
        targets = [encode_target(self._tokenizer, self._template, self._end, answer, text).ids for text in corrections]
        longest = len(prompt) + max(map(len, targets), default=0)
        if longest > self._model.max_positions:
            raise PromptTooLongError(longest, self._model.max_positions)
        rows = self._model.new_rows(1, longest)
        first = np.concatenate([piece.copy() for piece in rows.extend(0, prompt, 1)])
        found = []
        for target in targets:
            parts = [first]
            if len(target) > 1:
                parts += [piece.copy() for piece in rows.extend(0, target[:-1], len(target) - 1)]
                rows.trim(0, len(prompt))
            logits, tokens = np.concatenate(parts), np.array(target)
            greedy = bool((logits.argmax(axis=-1) == tokens).all())
            found.append((float(log_probabilities(logits, tokens).sum()), greedy))
        return found

    def evidence(self, question: str, answer: str) -> float:
        """Measure how much speaks for correcting an answer, for calibration.

        Returns:
            The log odds of not keeping it, in nats. Of an aligner without verdicts: how far the log probability of one of
            the answer's tokens is below the best token's, at most, in nats; infinite where one is not even expected.

        Raises:
            InputError: As `correct` does.
        """
        call = self._start(question, answer, strength=1.0 if self.has_verdicts else math.inf)
        generation = call.generation
        if generation is None:
            return -math.inf
        generation.sampler = GREEDY  # a drawn token says nothing of how far the answer's is below the best
        self._scheduler.submit(generation).result()
        if generation.log_odds is not None:
            return generation.log_odds
        return generation.surprise

    def correct(
        self,
        question: str,
        answer: str,
        *,
        timeout: float | None = None,
        strength: Strength = "medium",
        on_doubt: OnDoubt = "passthrough",
    ) -> Correction:
        """Correct one answer.

        A blank answer comes back as it is: an aligner corrects answers, it does not invent them. A block of reasoning at
        its beginning (`<think>…</think>`) stays as it is.

        Args:
            question: What was asked.
            answer: What was answered.
            timeout: Seconds after which it is given up; `None` waits for as long as it takes.
            strength: How willingly it corrects: a level, or the score above which it does. Of an aligner without verdicts a
                number is a tolerance: a token of the answer stays where its log probability is within so many nats of the
                best one's.
            on_doubt: What becomes of a correction that a safeguard objects to: `passthrough` gives the original answer,
                `raise` a `DoubtError`, `keep` the correction.

        Raises:
            InputError: If the question is blank, or a text is not valid Unicode (it holds a lone surrogate).
            PromptTooLongError: If they do not fit into the aligner's context.
            CorrectionTimeoutError: If it took longer than `timeout`.
            DoubtError: If a safeguard objects and `on_doubt` is `raise`.
            ClosedError: If the aligner was closed.
        """
        return self.correct_batch([(question, answer)], timeout=timeout, strength=strength, on_doubt=on_doubt)[0]

    @overload
    def correct_batch(
        self,
        pairs: Iterable[tuple[str, str]],
        *,
        timeout: float | None = None,
        strength: Strength = "medium",
        on_doubt: OnDoubt = "passthrough",
        return_exceptions: Literal[False] = False,
    ) -> list[Correction]: ...

    @overload
    def correct_batch(
        self,
        pairs: Iterable[tuple[str, str]],
        *,
        timeout: float | None = None,
        strength: Strength = "medium",
        on_doubt: OnDoubt = "passthrough",
        return_exceptions: Literal[True],
    ) -> list[Correction | Exception]: ...

    def correct_batch(
        self,
        pairs: Iterable[tuple[str, str]],
        *,
        timeout: float | None = None,
        strength: Strength = "medium",
        on_doubt: OnDoubt = "passthrough",
        return_exceptions: bool = False,
    ) -> list[Correction] | list[Correction | Exception]:
        """Correct several answers together, which costs less than one after the other.

        Args:
            pairs: Questions and answers.
            timeout: Seconds for all of them; what is not done by then is given up.
            strength: As `correct` takes it.
            on_doubt: As `correct` takes it.
            return_exceptions: Whether a pair that cannot be corrected becomes its exception, instead of raising it.

        Returns:
            Corrections in the order of the pairs.

        Raises:
            InputError: As `correct` does, before anything is run.
            CorrectionTimeoutError: If they took longer than `timeout`.
        """
        deadline = _Deadline(timeout)
        calls = [self._start_or_error(*pair, strength=strength, on_doubt=on_doubt) for pair in pairs]
        if not return_exceptions:
            for call in calls:
                if isinstance(call, InputError):
                    raise call
        futures: dict[int, Future[Generation]] = {}
        try:
            found: list[Correction | Exception] = []
            for at, call in enumerate(calls):
                if isinstance(call, _Call) and call.generation is not None:
                    futures[at] = self._scheduler.submit(call.generation)
            for at, call in enumerate(calls):
                found.append(call if isinstance(call, InputError) else self._outcome(call, futures.get(at), deadline))
                if isinstance(found[-1], Exception) and not return_exceptions:
                    raise found[-1]
            return found
        finally:  # after an error, or an interrupt from the keyboard, nobody waits for the others
            for future in futures.values():
                future.cancel()

    async def acorrect(
        self,
        question: str,
        answer: str,
        *,
        timeout: float | None = None,
        strength: Strength = "medium",
        on_doubt: OnDoubt = "passthrough",
    ) -> Correction:
        """Correct one answer; the event loop stays free, and a task that is cancelled leaves its place to others.

        Raises:
            AlignerError: As `correct` does.
        """
        async with _Deadline(timeout).limit():
            call = await _beside(partial(self._start, question, answer, strength=strength, on_doubt=on_doubt))
            if call.generation is not None:
                await asyncio.wrap_future(self._scheduler.submit(call.generation))
            return await _beside(partial(self._correction, call))

    async def acorrect_batch(
        self,
        pairs: Iterable[tuple[str, str]],
        *,
        timeout: float | None = None,
        strength: Strength = "medium",
        on_doubt: OnDoubt = "passthrough",
    ) -> list[Correction]:
        """Correct several answers together, in the order of the pairs; raises what the first of them raises."""
        options: dict[str, Any] = {"timeout": timeout, "strength": strength, "on_doubt": on_doubt}
        calls = [asyncio.ensure_future(self.acorrect(*pair, **options)) for pair in pairs]
        try:
            return list(await asyncio.gather(*calls))
        finally:  # after an error nobody waits for the others
            for call in calls:
                call.cancel()

    def stream(
        self,
        question: str,
        answer: str | Iterable[str],
        *,
        ahead: ReadAhead | None = None,
        timeout: float | None = None,
        strength: Strength = "medium",
        on_doubt: OnDoubt = "passthrough",
    ) -> Generator[str, None, Correction]:
        """Correct one answer and give the corrected text as soon as nothing can take it back.

        An answer that is kept is given at once. A correction is given when it is whole and no safeguard objects; where
        `on_doubt` is `keep`, a copy is given as it is decided.

        Args:
            question: The question.
            answer: The answer, or its chunks as they arrive: what has arrived goes through the model while the rest is on its
                way.
            ahead: What has read the answer already, from `read_ahead`.
            timeout: Seconds, from when the answer is there, after which the correction is given up.
            strength: As `correct` takes it.
            on_doubt: As `correct` takes it.

        Yields:
            Pieces of the corrected text; joined they are the whole of it.

        Returns:
            The correction, as the value of `yield from`.

        Raises:
            AlignerError: As `correct` does.
        """
        ahead = ahead or self.read_ahead(question)
        future: Future[Generation] | None = None
        try:
            if not isinstance(answer, str):
                chunks, answer = answer, ""
                for chunk in chunks:
                    ahead.feed(chunk)
                    answer += chunk
            deadline = _Deadline(timeout)
            call = self._start(question, answer, ahead.take(), strength=strength, on_doubt=on_doubt)
            rounds: queue.SimpleQueue[None] = queue.SimpleQueue()
            if call.generation is not None:
                future = self._scheduler.submit(call.generation, lambda: rounds.put(None))
            pieces = self._decided(call, future)
            while True:
                piece = next(pieces)
                if isinstance(piece, Correction):
                    return piece
                if piece is not None:
                    yield piece
                    continue
                try:
                    rounds.get(timeout=deadline.left)
                except queue.Empty:
                    raise deadline.error from None
        finally:
            if future is not None:
                future.cancel()
            ahead.close()

    async def astream(
        self,
        question: str,
        answer: str | AsyncIterator[str],
        *,
        ahead: ReadAhead | None = None,
        timeout: float | None = None,
        strength: Strength = "medium",
        on_doubt: OnDoubt = "passthrough",
        on_end: Callable[[Correction], None] = lambda correction: None,
    ) -> AsyncIterator[str]:
        """Do as `stream` does; the event loop stays free.

        Args:
            question: The question.
            answer: The answer, or its chunks as they arrive.
            ahead: What has read the answer already, from `read_ahead`.
            timeout: Seconds, from when the answer is there, after which the correction is given up.
            strength: As `correct` takes it.
            on_doubt: As `correct` takes it.
            on_end: Told the correction when all of it was given.

        Yields:
            Pieces of the corrected text.

        Raises:
            AlignerError: As `correct` does.
        """
        ahead = ahead or self.read_ahead(question)
        future: Future[Generation] | None = None
        loop = asyncio.get_running_loop()
        moved = asyncio.Event()

        def on_round() -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed; nobody waits any more
                loop.call_soon_threadsafe(moved.set)

        try:
            if not isinstance(answer, str):
                chunks, answer = answer, ""
                async for chunk in chunks:
                    ahead.feed(chunk)
                    answer += chunk
            deadline = _Deadline(timeout)
            start = partial(self._start, question, answer, ahead.take(), strength=strength, on_doubt=on_doubt)
            async with deadline.limit():
                call = await _beside(start)
            if call.generation is not None:
                future = self._scheduler.submit(call.generation, on_round)
                if not self._streams(call):
                    async with deadline.limit():
                        await asyncio.wrap_future(future)
            pieces = self._decided(call, future)
            while True:
                async with deadline.limit():
                    piece = await _beside(partial(next, pieces))
                    if piece is None:
                        await moved.wait()
                        moved.clear()  # before it is looked what there is: what comes from now on is not missed
                if isinstance(piece, Correction):
                    on_end(piece)
                    return
                if piece is not None:
                    yield piece
        finally:
            if future is not None:
                future.cancel()
            ahead.close()

    def read_ahead(self, question: str) -> ReadAhead:
        """Get ready to read an answer that is still being written; `stream` takes it up when all is there.

        A wrong question costs time and nothing else.
        """

        def encode(answer: str) -> list[int]:
            text = set_aside(answer)[1]
            if not text.strip():
                return []
            return encode_prompt(self._tokenizer, self._template, question, text)[: -self._tail - _UNSURE]

        return ReadAhead(self._scheduler, encode if question.strip() else None, self._most_characters - len(question))

    def _decided(self, call: _Call, future: Future[Generation] | None) -> Iterator[str | Correction | None]:
        """Give the pieces of a correction as they are decided, `None` where there is more to wait for, and the correction."""
        generation = call.generation
        yield None if future is not None and not future.done() else ""
        if generation is None or future is None or future.done() or not self._streams(call):  # or one pass was enough
            while future is not None and not future.done():
                yield None
            if future is not None:
                future.result()
            correction = self._correction(call)
            yield from [correction.corrected] if correction.corrected else []
            yield correction
            return
        text, pieces, sent, done = self._tokenizer.decode_stream(), [call.aside], 0, False
        yield from [call.aside] if call.aside else []
        while not done:
            done = future.done()
            tokens = generation.tokens[sent:]
            sent += len(tokens)
            if done:
                future.result()
            piece = text.add(tokens) + (text.rest() if done else "")
            pieces.append(piece)
            if piece:
                yield piece
            if not done:
                yield None
        correction = self._correction(call)
        yield correction if correction.verdict == "keep" else replace(correction, corrected="".join(pieces))

    def _streams(self, call: _Call) -> bool:
        """Whether what is decided is text that nothing can take back."""
        return call.on_doubt == "keep" and not self.has_verdicts

    def _outcome(self, call: _Call, future: Future[Generation] | None, deadline: _Deadline) -> Correction | Exception:
        """Wait for a pair's correction, or what was wrong with it."""
        if future is not None:
            if not wait_for([future], deadline.left).done:
                return deadline.error
            if (error := future.exception()) is not None:
                return error if isinstance(error, Exception) else RuntimeError(repr(error))
        try:
            return self._correction(call)
        except DoubtError as exc:
            return exc

    def _start_or_error(self, question: str, answer: str, **options: Any) -> _Call | InputError:
        try:
            return self._start(question, answer, **options)
        except InputError as exc:
            return exc

    def _start(
        self,
        question: str,
        answer: str,
        prefill: Prefill | None = None,
        *,
        strength: Strength = "medium",
        on_doubt: OnDoubt = "passthrough",
    ) -> _Call:
        """Encode a pair."""
        threshold, tolerance = self._limits(strength)
        _check_choice("on_doubt", on_doubt, get_args(OnDoubt))
        _check_question(question)
        _check_text("answer", answer)
        aside, text = set_aside(answer)
        if not text.strip():
            return _Call(question, answer, aside, text, None, on_doubt)
        self._check_length(question, text)
        prompt = encode_prompt(self._tokenizer, self._template, question, text)
        draft = encode_continuation(self._tokenizer, self._template, text)
        room = self._model.max_positions - len(prompt) - self.has_verdicts
        if room <= (len(draft) if self._copies else self._least_room):
            self.longest_answer(question)  # where that is what is too long, it says so
            raise PromptTooLongError(len(prompt), self._model.max_positions)
        wanted = self._max_new_tokens or (2 if self._copies else 1) * len(draft) + _ROOM
        generation = Generation(
            prompt,
            draft,
            min(wanted, room),
            self._sampler(question, answer),
            prefill,
            rule=VerdictRule(*self._verdict_ids, threshold, self._copies) if self._verdict_ids else None,
            tolerance=tolerance,
            verify=self._draft,
            end=self._end,
            stop_loops=True,
        )
        return _Call(question, answer, aside, text, generation, on_doubt)

    @property
    def _copies(self) -> bool:
        """Whether an edit is written as a copy of the answer."""
        return self._template.mark is None

    @property
    def _least_room(self) -> int:
        """How many tokens an edit that is no copy must have room for."""
        return min(_ROOM, self._model.max_positions // 4)

    @property
    def _most_characters(self) -> int:
        return self._model.max_positions * _CHARACTERS

    def _check_length(self, question: str, text: str = "") -> None:
        """Refuse what cannot fit into the context, before it is encoded."""
        both = len(question) + len(text)
        for characters, what in ((len(question), "the question is"), (both, "question and answer are")):
            if characters > self._most_characters:
                least = characters // _CHARACTERS
                raise PromptTooLongError(least, self._model.max_positions, what=what, characters=characters)

    def _limits(self, strength: Strength) -> tuple[float, float]:
        """Give the threshold on the log odds and the tolerance of a strength, both in nats."""
        calibration = self.calibration
        if isinstance(strength, str):
            _check_choice("strength", strength, LEVELS)
            return calibration.log_odds(calibration.levels[strength]), calibration.tolerances[strength]
        if not isinstance(strength, (int, float)) or math.isnan(strength) or strength < 0:
            raise InputError(f"strength is {strength!r}, expected {', '.join(LEVELS)}, or a number of at least 0")
        if not self.has_verdicts:
            return 0.0, float(strength)
        if strength > 1:
            raise InputError(f"strength is {strength}, expected a score from 0 to 1, or {', '.join(LEVELS)}")
        return calibration.log_odds(strength), calibration.tolerances["medium"]

    def _sampler(self, question: str, answer: str) -> Sampler:
        temperature, top_p, seed = self._sampling
        if temperature == 0:
            return GREEDY
        own = None if seed is None else zlib.crc32(f"{seed}\0{question}\0{answer}".encode())
        return Sampler(temperature, top_p, own)

    def _correction(self, call: _Call) -> Correction:
        generation = call.generation
        if generation is None:
            return Correction(call.question, call.answer, call.answer, "stop", Usage())
        tokens = generation.tokens
        verdict = None
        if generation.verdict is not None and self._verdict_ids is not None:
            verdict = VERDICTS[self._verdict_ids.index(generation.verdict)]
        drafted = self._draft and (verdict is None or (verdict == "edit" and self._copies))
        usage = Usage(
            prompt_tokens=len(generation.prompt),
            draft_tokens=len(generation.draft) if drafted else 0,
            accepted_tokens=generation.accepted,
            decoded_tokens=len(tokens) - generation.accepted,
            passes=generation.passes,
            seconds=generation.seconds,
        )
        found: tuple[str, ...] = ()
        text = call.text
        if verdict != "keep":
            try:
                text = self._text(call, generation, as_operations=verdict == "edit" and not self._copies)
            except ValueError:
                found = ("operations",)
            cut_off = generation.finish_reason == "length"
            found += doubts(call.text, text, cut_off=cut_off, question=call.question)
            if generation.finish_reason == "loop" and "repeats" not in found:
                found += ("repeats",)
        if found and call.on_doubt == "raise":
            raise DoubtError(found)
        proposed = call.aside + text
        passed = bool(found) and call.on_doubt == "passthrough"
        return Correction(
            question=call.question,
            original=call.answer,
            corrected=call.answer if passed else proposed,
            finish_reason=generation.finish_reason or "stop",
            usage=usage,
            verdict=verdict,
            score=None if generation.log_odds is None else self.calibration.score(generation.log_odds),
            doubts=found,
            proposed=proposed if passed else None,
        )

    def _text(self, call: _Call, generation: Generation, *, as_operations: bool) -> str:
        """Give the text that a generation stands for.

        Raises:
            ValueError: If it should be operations on the answer's sentences and is not.
        """
        if as_operations:
            return apply(call.text, decode_operations(self._tokenizer, self._template, generation.tokens))
        # A tokenizer may not give every text back as it was: what is not changed is not decoded either.
        if generation.tokens == list(encode_continuation(self._tokenizer, self._template, call.text)):
            return call.text
        text = self._tokenizer.decode(generation.tokens)
        rewritten = self._verdict_ids is not None and generation.verdict == self._verdict_ids[-1]
        return text.strip() if rewritten else text  # after its verdict a new text may begin with a space


class _Deadline:
    """A moment after which nobody waits any more; never, for `None` seconds."""

    def __init__(self, seconds: float | None) -> None:
        if seconds is not None and seconds <= 0:
            raise InputError(f"timeout is {seconds}, expected more than 0 seconds, or None")
        self._seconds = seconds
        self._end = None if seconds is None else time.monotonic() + seconds

    @property
    def left(self) -> float | None:
        """Seconds until then."""
        return None if self._end is None else max(0.0, self._end - time.monotonic())

    @property
    def error(self) -> CorrectionTimeoutError:
        return CorrectionTimeoutError(self._seconds or 0.0)

    @contextlib.asynccontextmanager
    async def limit(self) -> AsyncIterator[None]:
        """Raise `CorrectionTimeoutError` then."""
        limit = asyncio.timeout(self.left)
        try:
            async with limit:
                yield
        except TimeoutError:
            if not limit.expired():
                raise
            raise self.error from None


def _new_text_thread() -> None:
    """Make the thread that texts are encoded and compared in, so that no event loop is held up; a forked process has none."""
    global _texts
    _texts = ThreadPoolExecutor(1, "aligner-texts")


_texts: ThreadPoolExecutor
_new_text_thread()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_text_thread)


async def _beside(work: Callable[[], T]) -> T:
    """Await what is done in that thread."""
    return await asyncio.get_running_loop().run_in_executor(_texts, work)


def _tail_length(tokenizer: Tokenizer, template: PromptTemplate) -> int:
    """Count the tokens of a prompt that follow its answer."""
    one, other = (encode_prompt(tokenizer, template, "q", answer)[::-1] for answer in ("a", "b"))
    return next(at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise InputError(f"{name} is {value!r}, expected one of {', '.join(choices)}{did_you_mean(value, choices)}")


def _refuse(unknown: Iterable[str], function: Callable[..., Any]) -> None:
    """Refuse arguments that a function has only taken to set their names right."""
    parameters = inspect.signature(function).parameters.values()
    known = [one.name for one in parameters if one.kind is not one.VAR_KEYWORD]
    for name in unknown:
        hint = did_you_mean(name, known)
        raise TypeError(f"{function.__qualname__} got an unexpected keyword argument {name!r}{hint}")


def _absolute(model: str) -> str:
    """Give what `load` takes so that it names the same in another folder, or in a process that runs in one."""
    path = Path(model)
    named = exported_folder(model) is not None or (model != "default" and is_folder(path))
    return str(path.absolute()) if named else model


def _check_question(question: str) -> None:
    _check_text("question", question)
    if not question.strip():
        raise InputError("the question is blank: an answer can only be judged against what was asked")


def _check_text(what: str, text: str) -> None:
    if not isinstance(text, str):
        raise InputError(f"the {what} is a {type(text).__name__}, expected text")
    try:
        text.encode()
    except UnicodeEncodeError as exc:
        raise InputError(
            f"the {what} holds a lone surrogate, {text[exc.start]!r} at character {exc.start}, which is not valid text: "
            "replace it, for example by text.encode('utf-8', 'replace').decode()"
        ) from exc


def _exported(model: str, precision: Precision, prompt: str | PromptTemplate | None) -> tuple[Path, Artifact]:
    """Find or build the folder to serve from."""
    folder = exported_folder(model)
    if folder is None and not _can_build():
        folder = _already_built(model, precision, prompt)
    if folder is not None:
        return folder, Artifact.load(folder)
    from aligner_middleware.export.store import export_model

    return export_model(model, None, precision, prompt)


def _already_built(model: str, precision: Precision, prompt: str | PromptTemplate | None) -> Path:
    folder = cached_folder(model, precision, prompt)
    if not is_folder(folder):
        raise MissingExtraError(
            f"aligner {model!r} has not been built for {precision} on this machine; building it "
            f"(aligner export {model} --precision {precision})",
            "build",
        )
    return folder


def _can_build() -> bool:
    from importlib.util import find_spec

    return all(find_spec(package) is not None for package in ("torch", "transformers", "optimum", "onnx"))
