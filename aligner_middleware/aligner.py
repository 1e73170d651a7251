"""The facade: a question and an answer in, a `Correction` out.

Here are its parts and its life; the calls that correct are in `corrector.py`, those that measure in `measuring.py`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Never, Self

from aligner_middleware import loading
from aligner_middleware.artifact import Precision
from aligner_middleware.calibration import Calibration
from aligner_middleware.codec import Codec
from aligner_middleware.engine import Model
from aligner_middleware.engine.runner import RemoteModel
from aligner_middleware.engine.scheduler import Scheduler
from aligner_middleware.loading import Engine
from aligner_middleware.measuring import Measuring
from aligner_middleware.settings import Settings
from aligner_middleware.text.template import PromptTemplate
from aligner_middleware.text.tokenizer import Tokenizer


class Aligner(Measuring):
    """A small model that corrects answers. `Aligner.load` makes one.

    It may be shared between threads and tasks. `close`, or the end of a `with` block, ends its thread; so do the garbage
    collector and the end of Python. A copy, deep or not, is the aligner itself; a pickled one is loaded again.

    Args:
        model: What predicts tokens: a network that a thread of this process runs, or one that is run elsewhere.
        tokenizer: Its tokenizer.
        template: The prompt it was trained with.
        eos_token_ids: Tokens that end a correction.
        name: What to call it in reports.
        max_new_tokens: Longest correction; `None` for the answer and 256 tokens more, or twice the answer for copies.
        draft: Whether the answer is verified as a draft, rather than decoded again. The result is the same.
        temperature: 0 takes the most likely token; above it tokens are drawn (the paper: 0.3).
        top_p: Of the most likely tokens only those that together have this probability are drawn (the paper: 0.95).
        seed: Of the draws: with it, a question and an answer always give the same.
        instruction: How it corrects where a call gives no instruction of its own; see `correct`.
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
        model: Model | RemoteModel,
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
        instruction: str | None = None,
        revision: str | None = None,
        calibration: Calibration | None = None,
    ) -> None:
        settings = Settings(max_new_tokens, draft, temperature, top_p, seed, instruction)
        if instruction:
            settings.instruction_for(None, template)
        self.name = name
        self.calibration = calibration or Calibration()
        self.source: str | None = None
        self.precision: Precision | None = None
        self._load_again: Callable[[], Aligner] | None = None
        self._revision = revision
        self._model = model
        codec = Codec(tokenizer, template, eos_token_ids, model.max_positions, settings, self.calibration)
        super().__init__(codec, model if isinstance(model, RemoteModel) else Scheduler(model, codec.eos_token_ids))
        weakref.finalize(self, self._scheduler.close, wait=False)

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
        instruction: str | None = None,
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
            instruction: How it corrects where a call gives no instruction of its own; see `correct`.
            **unknown: Nothing: a misspelt name is set right in the error.

        Raises:
            InputError: If an option is out of range, the engine has no such option, or the aligner was not trained with
                instructions.
            ArtifactError: If an exported folder is incomplete, altered, or of another precision; or if ONNX Runtime lacks a
                provider, or cannot start any.
            BuildError: If the checkpoint cannot be had or exported, or the cache not written.
            MissingExtraError: If it would have to be built and `[build]` is not installed.
        """
        loading.refuse_unknown(unknown, cls.load)
        asked: dict[str, Any] = {"precision": precision, "prompt": prompt, "providers": providers}
        asked |= {"threads": threads, "engine": engine}
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "draft": draft}
        options |= {"temperature": temperature, "top_p": top_p, "seed": seed, "instruction": instruction}
        Settings(**options)  # before anything is built
        aligner = cls._of(loading.load(str(model), **asked), options)
        aligner.source = str(model)
        aligner._load_again = partial(cls.load, loading.absolute(str(model)), **asked, **options)
        return aligner

    @classmethod
    def connect(
        cls,
        url: str | Sequence[str],
        aligner: str | Path = "default",
        *,
        template: str | PromptTemplate | None = None,
        model: str | None = None,
        api_key: str | None = None,
        concurrency: int = 64,
        patience: float = 30.0,
        silence: float = 60.0,
        max_new_tokens: int | None = None,
        draft: bool = True,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        instruction: str | None = None,
        **unknown: Never,
    ) -> Aligner:
        """Connect to a server that runs an aligner: vLLM, SGLang, or one that takes the same requests (docs/remote.md).

        An aligner that is only a prompt, `prompted`, can be any chat model behind OpenAI's chat completions.

        Args:
            url: Address of its OpenAI API, such as `http://localhost:8000/v1`; or of several that run the same.
            aligner: The same aligner here, for tokenizer, template and thresholds, as of `load`; no weights are read. Or
                `prompted`, of which there is nothing here.
            template: As `prompt` of `load`.
            model: Name that the server gives the model; `None` for the first that it serves, and of `prompted` for the only
                one.
            api_key: Its key; `None` for that of `ALIGNER_API_KEY`, if any.
            concurrency: Most requests to a server at once; more wait here.
            patience: Seconds for which a request is repeated that fails in passing, as while a server restarts.
            silence: Seconds that a server may take for a reply, or be silent in a stream.
            max_new_tokens: As of `load`.
            draft: As of `load`; of `prompted`, whether the answer is sent as `prediction`.
            temperature: As of `load`.
            top_p: As of `load`.
            seed: As of `load`; the server draws with it.
            instruction: As of `load`.
            **unknown: As of `load`.

        Raises:
            RemoteError: If no server can be reached, or one is none, serves another model, or has another tokenizer.
            InputError: If an option is out of range.
            ArtifactError: If a file of the aligner here cannot be used.
            BuildError: If there is no such aligner here.
        """
        from aligner_middleware import connecting

        loading.refuse_unknown(unknown, cls.connect)
        asked: dict[str, Any] = {"template": template, "model": model, "api_key": api_key}
        asked |= {"concurrency": concurrency, "patience": patience, "silence": silence}
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "draft": draft}
        options |= {"temperature": temperature, "top_p": top_p, "seed": seed, "instruction": instruction}
        Settings(**options)
        connected = cls._of(connecting.connect(url, str(aligner), **asked, draft=draft), options)
        connected._load_again = partial(cls.connect, url, loading.absolute(str(aligner)), **asked, **options)
        return connected

    @classmethod
    def _of(cls, parts: loading.Loaded, options: dict[str, Any]) -> Self:
        own: dict[str, Any] = {"name": parts.name, "revision": parts.revision, "calibration": parts.calibration}
        aligner = cls(parts.model, parts.tokenizer, parts.template, parts.eos_token_ids, **own, **options)
        aligner.precision = parts.precision
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
        return self._codec.verdict_ids is not None

    @property
    def identity(self) -> dict[str, Any]:
        """All that a correction depends on beside question and answer; for cache keys and traces."""
        own = {"name": self.name, "revision": self._revision, "template": self._codec.template.name}
        return own | self._codec.settings.identity
