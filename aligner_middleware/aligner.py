"""The facade: a question and an answer in, a `Correction` out."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, overload

import anyio.to_thread

from aligner_middleware.artifact import ARTIFACT_FILE, MODEL_FILE, TOKENIZER_FILE, Artifact, Precision, cached_folder
from aligner_middleware.engine import Generation, Model, decode
from aligner_middleware.errors import ArtifactError, InputError, MissingExtraError, PromptTooLongError
from aligner_middleware.prompt import PromptTemplate, encode_continuation, encode_prompt, resolve_template
from aligner_middleware.tokenizer import Tokenizer

Engine = Literal["onnx", "torch"]

_BATCH_TOKENS = 4096  # prompts and drafts that go through together; more would only cost memory


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


class Aligner:
    """A small model that corrects answers. `Aligner.load` makes one; it may be shared between threads.

    Args:
        model: What predicts tokens.
        tokenizer: Its tokenizer.
        template: The prompt it was trained with.
        eos_token_ids: Tokens that end a correction.
        name: What to call it in reports.
        max_new_tokens: Longest correction; `None` for twice the answer and 256 tokens more.
        draft: Whether the answer is verified as a draft, rather than decoded again. The result is the same.
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
    ) -> None:
        if max_new_tokens is not None and max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {max_new_tokens}, expected at least 1")
        self.name = name
        self._model = model
        self._tokenizer = tokenizer
        self._template = template
        self._stop = frozenset(eos_token_ids)
        self._max_new_tokens = max_new_tokens
        self._draft = draft

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
    ) -> Aligner:
        """Load an aligner, building it first if it is not in the cache yet and `[build]` is installed.

        Args:
            model: `default`; an exported folder; or what `aligner export` takes: an adapter's or a checkpoint's folder,
                or a hub id.
            precision: Of the weights. `float16` wants a GPU. An exported folder has its own.
            providers: ONNX Runtime's execution providers, in order of preference; `None` for CUDA where this ONNX Runtime
                has it, and the CPU.
            prompt: A template's name, or a text with `{question}` and `{answer}`; `None` for the one that belongs to it.
            max_new_tokens: Longest correction; `None` for twice the answer and 256 tokens more.
            draft: Whether the answer is verified as a draft. The result is the same without, only slower.
            engine: `torch` runs the checkpoint in PyTorch: the reference for tests and benchmarks.
            threads: Threads of one pass; `None` for all cores.

        Raises:
            ArtifactError: If an exported folder is incomplete or altered.
            BuildError: If the checkpoint cannot be had or exported.
            MissingExtraError: If it would have to be built and `[build]` is not installed.
        """
        model = str(model)
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "draft": draft}
        if engine == "torch":
            return cls._load_torch(model, precision, prompt, options)
        if engine != "onnx":
            raise InputError(f"engine is {engine!r}, expected 'onnx' or 'torch'")
        from aligner_middleware.engine.onnx import OnnxModel

        folder = _exported_folder(model, precision, prompt)
        artifact = Artifact.load(folder)
        session = OnnxModel(folder / MODEL_FILE, artifact, providers=providers, threads=threads)
        tokenizer = Tokenizer.from_file(folder / TOKENIZER_FILE)
        template = artifact.template if prompt is None else resolve_template(prompt)
        return cls(session, tokenizer, template, artifact.eos_token_ids, name=artifact.name, **options)

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

    def correct(self, question: str, answer: str) -> Correction:
        """Correct one answer.

        A blank answer comes back as it is: an aligner corrects answers, it does not invent them.

        Raises:
            InputError: If the question is blank, or a text is not valid Unicode (it holds a lone surrogate).
            PromptTooLongError: If they do not fit into the aligner's context.
        """
        return self.correct_batch([(question, answer)])[0]

    @overload
    def correct_batch(
        self, pairs: Iterable[tuple[str, str]], *, return_exceptions: Literal[False] = False
    ) -> list[Correction]: ...

    @overload
    def correct_batch(
        self, pairs: Iterable[tuple[str, str]], *, return_exceptions: Literal[True]
    ) -> list[Correction | InputError]: ...

    def correct_batch(
        self, pairs: Iterable[tuple[str, str]], *, return_exceptions: bool = False
    ) -> list[Correction] | list[Correction | InputError]:
        """Correct several answers together, which costs less than one after the other.

        Args:
            pairs: Questions and answers.
            return_exceptions: Whether a pair that cannot be corrected becomes its exception, instead of raising it.

        Returns:
            Corrections in the order of the pairs.

        Raises:
            InputError: As `correct` does, before anything is run.
        """
        pairs = list(pairs)
        started = [self._start_or_error(question, answer) for question, answer in pairs]
        if not return_exceptions:
            for outcome in started:
                if isinstance(outcome, InputError):
                    raise outcome
        for group in _batches([outcome for outcome in started if isinstance(outcome, Generation)]):
            for _ in decode(self._model, group, self._stop):
                pass
        return [
            outcome if isinstance(outcome, InputError) else self._correction(question, answer, outcome)
            for (question, answer), outcome in zip(pairs, started, strict=True)
        ]

    async def acorrect(self, question: str, answer: str) -> Correction:
        """Correct one answer in a worker thread, so that the event loop stays free."""
        return await anyio.to_thread.run_sync(self.correct, question, answer)

    def stream(self, question: str, answer: str | Iterable[str]) -> Generator[str, None, Correction]:
        """Correct one answer and give the corrected text as it is decided.

        Args:
            question: The question.
            answer: The answer, or its chunks as they arrive.

        Yields:
            Pieces of the corrected text; joined they are the whole of it.

        Returns:
            The correction, as the value of `yield from`.

        Raises:
            InputError: As `correct` does.
        """
        answer = answer if isinstance(answer, str) else "".join(answer)
        generation = self._start(question, answer)
        if generation is None:
            yield from [answer] if answer else []
            return self._correction(question, answer, None)
        passes = decode(self._model, [generation], self._stop)
        next(passes)
        if generation.finish_reason is not None:  # one pass was enough
            correction = self._correction(question, answer, generation)
            yield from [correction.corrected] if correction.corrected else []
            return correction
        pieces = []
        for piece in self._tokenizer.decode_stream(_tokens_as_decided(generation, passes)):
            pieces.append(piece)
            yield piece
        return replace(self._correction(question, answer, generation), corrected="".join(pieces))

    def _start_or_error(self, question: str, answer: str) -> Generation | InputError | None:
        try:
            return self._start(question, answer)
        except InputError as exc:
            return exc

    def _start(self, question: str, answer: str) -> Generation | None:
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
        return Generation(prompt, draft if self._draft else (), min(wanted, room))

    def _correction(self, question: str, answer: str, generation: Generation | None) -> Correction:
        if generation is None:
            return Correction(question, answer, answer, "stop", Usage())
        tokens = generation.tokens
        # A tokenizer may not give every text back as it was: what is not changed is not decoded either.
        unchanged = tokens == encode_continuation(self._tokenizer, self._template, answer)
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


def _tokens_as_decided(generation: Generation, passes: Iterator[None]) -> Iterator[int]:
    sent = 0
    while True:
        yield from generation.tokens[sent:]
        sent = len(generation.tokens)
        if next(passes, passes) is passes:
            return


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


def _batches(generations: list[Generation]) -> Iterable[list[Generation]]:
    """Group sequences of like length, so that little is padded and a batch stays within `_BATCH_TOKENS`."""
    batch: list[Generation] = []
    for generation in sorted(generations, key=lambda g: len(g.prompt) + len(g.draft)):
        if batch and (len(batch) + 1) * (len(generation.prompt) + len(generation.draft)) > _BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(generation)
    if batch:
        yield batch


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
