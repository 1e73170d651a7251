"""The facade: a question and an answer in, a `Correction` out."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import queue
import time
import weakref
import zlib
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Sequence
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self, overload

import numpy as np

from aligner_middleware.artifact import ARTIFACT_FILE, MODEL_FILE, TOKENIZER_FILE, Artifact, Precision, cached_folder
from aligner_middleware.diff import Diff
from aligner_middleware.engine import GREEDY, Generation, Model, Prefill, Sampler
from aligner_middleware.engine.model import log_probabilities
from aligner_middleware.engine.scheduler import Scheduler
from aligner_middleware.errors import (
    ArtifactError,
    CorrectionTimeoutError,
    InputError,
    MissingExtraError,
    PromptTooLongError,
)
from aligner_middleware.prompt import PromptTemplate, encode_continuation, encode_prompt, resolve_template
from aligner_middleware.tokenizer import Tokenizer

Engine = Literal["onnx", "torch"]

_AHEAD = 32  # characters of a streamed answer that go through together
_APART = 0.02  # seconds at least between two encodings of a streamed answer, which hold up who streams
_QUEUE_FULL = 0.005  # seconds between two attempts of a task to join a full queue
_UNSURE = 8  # its latest tokens may be cut another way once more text has come


@dataclass(frozen=True)
class Usage:
    """What a correction cost.

    Attributes:
        prompt_tokens: Length of the prompt, which holds question and answer.
        draft_tokens: Length of the answer, given to the model as a draft of its output.
        accepted_tokens: How many tokens of the correction were proposed by the answer, and agreed to.
        decoded_tokens: How many it wrote one by one.
        passes: Forward passes; 1 where nothing was corrected.
        seconds: Time in the engine.
    """

    prompt_tokens: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    decoded_tokens: int = 0
    passes: int = 0
    seconds: float = 0.0

    def __add__(self, other: Usage) -> Usage:
        """Add up what two corrections cost."""
        return Usage(*(one + two for one, two in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class Correction:
    """What became of an answer.

    Attributes:
        question, original: What was given.
        corrected: What the aligner makes of it: `original` itself, character by character, where it changes nothing.
        finish_reason: `stop`, or `length` where `max_new_tokens` cut the correction off.
        usage: What it cost.
    """

    question: str
    original: str
    corrected: str
    finish_reason: Literal["stop", "length"]
    usage: Usage

    @property
    def changed(self) -> bool:
        """Whether anything was corrected."""
        return self.corrected != self.original

    def diff(self) -> Diff:
        """Compare the corrected answer with the original, word by word."""
        return Diff.between(self.original, self.corrected)

    def __rich__(self) -> Any:
        """Show the answer in a terminal, with the words marked that went and that came."""
        return self.diff().__rich__()

    def _repr_html_(self) -> str:
        """Show it in a notebook."""
        return self.diff().html()


class ReadAhead:
    """Lets a prompt through the model while its answer is still being written. `Aligner.read_ahead` makes one.

    Attributes:
        prefill: What the engine has of it.
    """

    def __init__(self, scheduler: Scheduler, encode: Callable[[str], list[int]] | None) -> None:
        self.prefill = Prefill()
        self._scheduler = scheduler
        self._encode = encode
        self._answer = ""
        self._read = 0
        self._encoded = 0.0

    def feed(self, chunk: str) -> None:
        """Take in a piece of the answer."""
        self._answer += chunk
        now = time.monotonic()
        if self._encode is not None and len(self._answer) >= self._read + _AHEAD and now >= self._encoded + _APART:
            self._read, self._encoded = len(self._answer), now
            with contextlib.suppress(UnicodeEncodeError):  # half of a surrogate pair; what it is shows in the end
                self.prefill.prompt = self._encode(self._answer)
                self._scheduler.prefill(self.prefill)

    def close(self) -> None:
        """Free what it took, unless a correction has taken it over."""
        self._scheduler.abandon(self.prefill)


class Aligner:
    """A small model that corrects answers. `Aligner.load` makes one.

    It may be shared between threads and tasks: calls that run at the same time share passes of the model. `close`, or the
    end of a `with` block, ends its thread; so does the garbage collector.

    Args:
        model: What predicts tokens.
        tokenizer: Its tokenizer.
        template: The prompt it was trained with.
        eos_token_ids: Tokens that end a correction.
        name: What to call it in reports.
        max_new_tokens: Longest correction; `None` for twice the answer and 256 tokens more.
        draft: Whether the answer is verified as a draft, rather than decoded again. The result is the same.
        temperature: 0 takes the most likely token; above it tokens are drawn (the paper: 0.3).
        top_p: Of the most likely tokens only those that together have this probability are drawn (the paper: 0.95).
        seed: Of the draws: with it, a question and an answer always give the same.
        revision: What tells one build of `name` from another in cache keys.

    Attributes:
        name: As given.
        source: What `load` was given; `None` for one that was made in another way.
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
    ) -> None:
        if temperature < 0 or not 0 < top_p <= 1:
            raise InputError(
                f"temperature is {temperature}, expected at least 0; top_p is {top_p}, expected above 0, up to 1"
            )
        if max_new_tokens is not None and max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {max_new_tokens}, expected at least 1")
        self.name = name
        self.source: str | None = None
        self._model = model
        self._scheduler = Scheduler(model, frozenset(eos_token_ids))
        weakref.finalize(self, self._scheduler.close)
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
        precision: Precision = "int8",
        providers: Sequence[str] | None = None,
        prompt: str | PromptTemplate | None = None,
        max_new_tokens: int | None = None,
        draft: bool = True,
        engine: Engine = "onnx",
        threads: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> Aligner:
        """Load an aligner, building it first if it is not in the cache yet and `[build]` is installed.

        Args:
            model: `default`; an exported folder; or what `aligner export` takes: an adapter's or a checkpoint's folder,
                or a hub id.
            precision: Of the weights. `float16` is for a GPU, `int8` for the CPU. An exported folder has its own.
            providers: ONNX Runtime's execution providers, in order of preference; `None` for CUDA where this ONNX Runtime
                has it and it can run the graph, and the CPU.
            prompt: A template's name, or a text with `{question}` and `{answer}`; `None` for the one that belongs to it.
            max_new_tokens: Longest correction; `None` for twice the answer and 256 tokens more.
            draft: Whether the answer is verified as a draft. The result is the same without, only slower.
            engine: `torch` runs the checkpoint in PyTorch: the reference for tests and benchmarks.
            threads: Threads of one pass; `None` for all cores.
            temperature: 0 takes the most likely token; above it tokens are drawn (the paper: 0.3).
            top_p: Of the most likely tokens only those that together have this probability are drawn (the paper: 0.95).
            seed: Of the draws: with it, a question and an answer always give the same.

        Raises:
            ArtifactError: If an exported folder is incomplete or altered.
            BuildError: If the checkpoint cannot be had or exported.
            MissingExtraError: If it would have to be built and `[build]` is not installed.
        """
        model = str(model)
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "draft": draft}
        options |= {"temperature": temperature, "top_p": top_p, "seed": seed}
        if engine == "torch":
            return cls._load_torch(model, precision, prompt, options)
        if engine != "onnx":
            raise InputError(f"engine is {engine!r}, expected 'onnx' or 'torch'")
        from aligner_middleware.engine.onnx import OnnxModel

        folder = _exported_folder(model, precision, prompt)
        artifact = Artifact.load(folder)
        session = OnnxModel(folder / MODEL_FILE, artifact, providers=providers, threads=threads)
        tokenizer = Tokenizer.from_file(folder / TOKENIZER_FILE, tiktoken=artifact.tiktoken)
        template = artifact.template if prompt is None else resolve_template(prompt)
        revision = hashlib.sha256(repr(sorted(artifact.files.items())).encode()).hexdigest()[:12]
        end = artifact.eos_token_ids
        aligner = cls(session, tokenizer, template, end, name=artifact.name, revision=revision, **options)
        aligner.source = model
        return aligner

    @classmethod
    def _load_torch(
        cls, model: str, precision: Precision, prompt: str | PromptTemplate | None, options: Any
    ) -> Aligner:
        if (Path(model) / ARTIFACT_FILE).is_file():
            raise ArtifactError(
                f"{model} is an exported folder: engine='torch' runs the checkpoint that it was exported from, give that"
            )
        if not _can_build():
            raise MissingExtraError("engine='torch'", "build")
        from aligner_middleware.build.checkpoint import end_token_ids, open_checkpoint
        from aligner_middleware.engine.pytorch import TorchModel

        checkpoint = open_checkpoint(model, prompt)
        tokenizer = checkpoint.tokenizer()
        network = TorchModel(checkpoint.load("float16" if precision == "float16" else "float32"))
        end = end_token_ids(checkpoint.folder, tokenizer, checkpoint.template)
        return cls(network, tokenizer, checkpoint.template, end, name=model, **options)

    def close(self) -> None:
        """Give up what is under way, with `ClosedError`, and end the aligner's thread."""
        self._scheduler.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

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

    def count_tokens(self, text: str) -> int:
        """Count the tokens of a text, as this aligner reads it."""
        return len(self._tokenizer.encode(text))

    def longest_answer(self, question: str) -> int:
        """Say how many tokens an answer to this question may have: it must fit into the context twice."""
        return (self._model.max_positions - len(encode_prompt(self._tokenizer, self._template, question, "")) - 1) // 2

    def log_likelihood(self, question: str, answer: str, corrections: Sequence[str]) -> list[tuple[float, bool]]:
        """Say how likely each of some texts is as the correction of an answer: log μ(y_c | y_o, x), paper section 2.

        Args:
            question: The question, x.
            answer: The answer, y_o.
            corrections: The texts, y_c.

        Returns:
            For each the natural logarithm of its probability, its end included, and whether greedy decoding writes it.

        Raises:
            InputError: If the question is blank, or a text does not fit into the context.
        """
        if not question.strip():
            raise InputError("the question is blank: an answer can only be judged against what was asked")
        prompt = encode_prompt(self._tokenizer, self._template, question, answer)
        targets = [[*encode_continuation(self._tokenizer, self._template, text), self._end] for text in corrections]
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

    def correct(self, question: str, answer: str, *, timeout: float | None = None) -> Correction:
        """Correct one answer.

        A blank answer comes back as it is: an aligner corrects answers, it does not invent them.

        Args:
            question: What was asked.
            answer: What was answered.
            timeout: Seconds after which it is given up; `None` waits for as long as it takes.

        Raises:
            InputError: If the question is blank, or a text is not valid Unicode (it holds a lone surrogate).
            PromptTooLongError: If they do not fit into the aligner's context.
            CorrectionTimeoutError: If it took longer than `timeout`.
            ClosedError: If the aligner was closed.
        """
        return self.correct_batch([(question, answer)], timeout=timeout)[0]

    @overload
    def correct_batch(
        self,
        pairs: Iterable[tuple[str, str]],
        *,
        timeout: float | None = None,
        return_exceptions: Literal[False] = False,
    ) -> list[Correction]: ...

    @overload
    def correct_batch(
        self, pairs: Iterable[tuple[str, str]], *, timeout: float | None = None, return_exceptions: Literal[True]
    ) -> list[Correction | Exception]: ...

    def correct_batch(
        self, pairs: Iterable[tuple[str, str]], *, timeout: float | None = None, return_exceptions: bool = False
    ) -> list[Correction] | list[Correction | Exception]:
        """Correct several answers together, which costs less than one after the other.

        Args:
            pairs: Questions and answers.
            timeout: Seconds for all of them; what is not done by then is given up.
            return_exceptions: Whether a pair that cannot be corrected becomes its exception, instead of raising it.

        Returns:
            Corrections in the order of the pairs.

        Raises:
            InputError: As `correct` does, before anything is run.
            CorrectionTimeoutError: If they took longer than `timeout`.
        """
        pairs = list(pairs)
        deadline = _Deadline(timeout)
        started = [self._start_or_error(question, answer) for question, answer in pairs]
        if not return_exceptions:
            for outcome in started:
                if isinstance(outcome, InputError):
                    raise outcome
        futures: dict[int, Future[Generation]] = {}
        try:
            found: list[Correction | Exception] = []
            for at, outcome in enumerate(started):
                if isinstance(outcome, Generation):
                    with contextlib.suppress(CorrectionTimeoutError):  # it shows when this one is waited for
                        futures[at] = self._submit(outcome, deadline)
            for at, ((question, answer), outcome) in enumerate(zip(pairs, started, strict=True)):
                found.append(self._outcome(question, answer, outcome, futures.get(at), deadline))
                if isinstance(found[-1], Exception) and not return_exceptions:
                    raise found[-1]
            return found
        finally:  # after an error, or an interrupt from the keyboard, nobody waits for the others
            for future in futures.values():
                future.cancel()

    async def acorrect(self, question: str, answer: str, *, timeout: float | None = None) -> Correction:
        """Correct one answer; the event loop stays free, and a task that is cancelled leaves its place to others.

        Raises:
            AlignerError: As `correct` does.
        """
        deadline = _Deadline(timeout)
        generation = self._start(question, answer)
        if generation is not None:
            async with deadline.limit():
                await asyncio.wrap_future(await self._asubmit(generation))
        return self._correction(question, answer, generation)

    async def acorrect_batch(
        self, pairs: Iterable[tuple[str, str]], *, timeout: float | None = None
    ) -> list[Correction]:
        """Correct several answers together, in the order of the pairs; raises what the first of them raises."""
        calls = [asyncio.ensure_future(self.acorrect(*pair, timeout=timeout)) for pair in pairs]
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
    ) -> Generator[str, None, Correction]:
        """Correct one answer and give the corrected text as it is decided.

        Args:
            question: The question.
            answer: The answer, or its chunks as they arrive: what has arrived goes through the model while the rest is on its
                way.
            ahead: What has read the answer already, from `read_ahead`.
            timeout: Seconds, from when the answer is there, after which the correction is given up.

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
            generation = self._start(question, answer, ahead.prefill)
            rounds: queue.SimpleQueue[None] = queue.SimpleQueue()
            if generation is not None:
                future = self._submit(generation, deadline, lambda: rounds.put(None))
            steps = self._decided(question, answer, generation, future)
            while True:
                try:
                    piece = next(steps)
                except StopIteration as end:
                    correction: Correction = end.value
                    return correction
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
        on_end: Callable[[Correction], None] = lambda correction: None,
    ) -> AsyncIterator[str]:
        """Correct one answer and give the corrected text as it is decided; the event loop stays free.

        Args:
            question: The question.
            answer: The answer, or its chunks as they arrive.
            ahead: What has read the answer already, from `read_ahead`.
            timeout: Seconds, from when the answer is there, after which the correction is given up.
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
            generation = self._start(question, answer, ahead.prefill)
            if generation is not None:
                async with deadline.limit():
                    future = await self._asubmit(generation, on_round)
            steps = self._decided(question, answer, generation, future)
            while True:
                try:
                    piece = next(steps)
                except StopIteration as end:
                    on_end(end.value)
                    return
                if piece is not None:
                    yield piece
                    continue
                async with deadline.limit():
                    await moved.wait()
                moved.clear()  # before it is looked what there is: what comes from now on is not missed
        finally:
            if future is not None:
                future.cancel()
            ahead.close()

    def read_ahead(self, question: str) -> ReadAhead:
        """Get ready to read an answer that is still being written; `stream` takes it up when all is there.

        A wrong question costs time and nothing else.
        """

        def encode(answer: str) -> list[int]:
            return encode_prompt(self._tokenizer, self._template, question, answer)[: -self._tail - _UNSURE]

        return ReadAhead(self._scheduler, encode if question.strip() else None)

    def _decided(
        self, question: str, answer: str, generation: Generation | None, future: Future[Generation] | None
    ) -> Generator[str | None, None, Correction]:
        """Give the pieces of a correction as they are decided, and `None` where there is more to wait for."""
        if generation is None or future is None:
            yield from [answer] if answer else []
            return self._correction(question, answer, None)
        yield None
        if future.done():  # one pass was enough
            future.result()
            correction = self._correction(question, answer, generation)
            yield from [correction.corrected] if correction.corrected else []
            return correction
        text, pieces, sent, done = self._tokenizer.decode_stream(), [], 0, False
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
        return replace(self._correction(question, answer, generation), corrected="".join(pieces))

    def _submit(
        self, generation: Generation, deadline: _Deadline, on_round: Callable[[], None] = lambda: None
    ) -> Future[Generation]:
        try:
            return self._scheduler.submit(generation, on_round, timeout=deadline.left)
        except BlockingIOError:
            raise deadline.error from None

    async def _asubmit(self, generation: Generation, on_round: Callable[[], None] = lambda: None) -> Future[Generation]:
        while True:
            try:
                return self._scheduler.submit(generation, on_round, timeout=0)
            except BlockingIOError:
                await asyncio.sleep(_QUEUE_FULL)

    def _outcome(
        self,
        question: str,
        answer: str,
        started: Generation | InputError | None,
        future: Future[Generation] | None,
        deadline: _Deadline,
    ) -> Correction | Exception:
        """Wait for a pair's correction, or what was wrong with it."""
        if isinstance(started, InputError):
            return started
        if started is not None:
            if future is None or not wait_for([future], deadline.left).done:
                return deadline.error
            if (error := future.exception()) is not None:
                return error if isinstance(error, Exception) else RuntimeError(repr(error))
        return self._correction(question, answer, started)

    def _start_or_error(self, question: str, answer: str) -> Generation | InputError | None:
        try:
            return self._start(question, answer)
        except InputError as exc:
            return exc

    def _start(self, question: str, answer: str, prefill: Prefill | None = None) -> Generation | None:
        """Encode a pair; `None` where there is nothing to correct."""
        _check_text("question", question)
        _check_text("answer", answer)
        if not question.strip():
            raise InputError("the question is blank: an answer can only be judged against what was asked")
        if not answer.strip():
            return None
        prompt = encode_prompt(self._tokenizer, self._template, question, answer)
        draft = encode_continuation(self._tokenizer, self._template, answer)
        room = self._model.max_positions - len(prompt)
        if room <= len(draft):
            raise PromptTooLongError(len(prompt), self._model.max_positions)
        wanted = self._max_new_tokens or 2 * len(draft) + 256
        return Generation(
            prompt, draft if self._draft else (), min(wanted, room), self._sampler(question, answer), prefill
        )

    def _sampler(self, question: str, answer: str) -> Sampler:
        temperature, top_p, seed = self._sampling
        if temperature == 0:
            return GREEDY
        own = None if seed is None else zlib.crc32(f"{seed}\0{question}\0{answer}".encode())
        return Sampler(temperature, top_p, own)

    def _correction(self, question: str, answer: str, generation: Generation | None) -> Correction:
        if generation is None:
            return Correction(question, answer, answer, "stop", Usage())
        tokens = generation.tokens
        # A tokenizer may not give every text back as it was: what is not changed is not decoded either.
        given = generation.draft if self._draft else encode_continuation(self._tokenizer, self._template, answer)
        unchanged = tokens == list(given)
        usage = Usage(
            prompt_tokens=len(generation.prompt),
            draft_tokens=len(generation.draft),
            accepted_tokens=generation.accepted,
            decoded_tokens=len(tokens) - generation.accepted,
            passes=generation.passes,
            seconds=generation.seconds,
        )
        text = answer if unchanged else self._tokenizer.decode(tokens)
        return Correction(question, answer, text, generation.finish_reason or "stop", usage)


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


def _tail_length(tokenizer: Tokenizer, template: PromptTemplate) -> int:
    """Count the tokens of a prompt that follow its answer."""
    one, other = (encode_prompt(tokenizer, template, "q", answer)[::-1] for answer in ("a", "b"))
    return next(at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)


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


def _exported_folder(model: str, precision: Precision, prompt: str | PromptTemplate | None) -> Path:
    """Find or build the folder to serve from."""
    if (Path(model) / ARTIFACT_FILE).is_file():
        return Path(model)
    if not _can_build():
        return _already_built(model, precision, prompt)
    from aligner_middleware.build import build_cached

    return build_cached(model, precision, prompt)


def _already_built(model: str, precision: Precision, prompt: str | PromptTemplate | None) -> Path:
    folder = cached_folder(model, precision, prompt)
    if not folder.is_dir():
        raise MissingExtraError(
            f"aligner {model!r} has not been built for {precision} on this machine; building it "
            f"(aligner export {model} --precision {precision})",
            "build",
        )
    return folder


def _can_build() -> bool:
    from importlib.util import find_spec

    return all(find_spec(package) is not None for package in ("torch", "transformers", "optimum", "onnx"))
