"""A name to a model that can run, with its tokenizer and its template.

An exported folder, the cache, or a build that makes one; in PyTorch the checkpoint itself. Only a build imports
`aligner_middleware.export`, and only when it is needed.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

from aligner_middleware.artifact import MODEL_FILE, Artifact, Precision
from aligner_middleware.calibration import Calibration
from aligner_middleware.data.files import is_folder
from aligner_middleware.engine import Model
from aligner_middleware.engine.runner import RemoteModel
from aligner_middleware.engine.threads import refuse_green_threads
from aligner_middleware.errors import ArtifactError, InputError, MissingExtraError, did_you_mean
from aligner_middleware.locations import PROMPTED, cached_folder, exported_folder
from aligner_middleware.settings import check_choice
from aligner_middleware.text.published import resolve_template
from aligner_middleware.text.template import PromptTemplate
from aligner_middleware.text.tokenizer import Tokenizer

Engine = Literal["onnx", "torch"]


@dataclass(frozen=True)
class Loaded:
    """The parts of an aligner.

    Attributes:
        model: What predicts tokens.
        tokenizer: Its tokenizer.
        template: The prompt that it is asked with.
        eos_token_ids: Tokens that end a correction.
        name: What it is called in reports.
        precision: Of its weights; `None` where a server has them.
        revision: What tells one build of `name` from another; `None` in PyTorch.
        calibration: Its levels of strength; `None` where nobody has calibrated.
    """

    model: Model | RemoteModel
    tokenizer: Tokenizer
    template: PromptTemplate
    eos_token_ids: Sequence[int]
    name: str
    precision: Precision | None
    revision: str | None
    calibration: Calibration | None


def load(
    model: str,
    *,
    precision: Precision | None,
    providers: Sequence[str] | None,
    prompt: str | PromptTemplate | None,
    engine: Engine,
    threads: int | None,
) -> Loaded:
    """Load what a name stands for, and build it first where it has to be. `Aligner.load` has arguments and errors."""
    refuse_green_threads()
    if model == PROMPTED:
        raise InputError(
            f"the aligner {model!r} is a prompt for a chat model, which a server has: connect to it by "
            f"Aligner.connect(url, {model!r}), --url or --aligner-url (a folder of this name is ./{model})"
        )
    if threads is not None and threads < 1:
        raise InputError(f"threads is {threads}, expected at least 1, or None for all cores")
    if precision is not None:
        check_choice("precision", precision, get_args(Precision))
    if engine not in get_args(Engine):
        raise InputError(f"engine is {engine!r}, expected 'onnx' or 'torch'")
    if engine == "onnx":
        return _load_onnx(model, precision, prompt, providers, threads)
    if providers is not None or threads is not None:
        raise InputError("providers and threads are ONNX Runtime's: engine='torch' takes neither")
    return _load_torch(model, precision or "int8", prompt)


def absolute(model: str) -> str:
    """Give a name that means the same in another working folder."""
    if model == PROMPTED:
        return model
    path = Path(model)
    named = exported_folder(model) is not None or (model != "default" and is_folder(path))
    return str(path.absolute()) if named else model


def refuse_unknown(unknown: Iterable[str], function: Callable[..., Any]) -> None:
    """Refuse arguments that a function takes only to correct their names.

    Raises:
        TypeError: If there are any; the message names the nearest argument.
    """
    parameters = inspect.signature(function).parameters.values()
    known = [one.name for one in parameters if one.kind is not one.VAR_KEYWORD]
    for name in unknown:
        hint = did_you_mean(name, known)
        raise TypeError(f"{function.__qualname__} got an unexpected keyword argument {name!r}{hint}")


def _load_onnx(
    model: str,
    precision: Precision | None,
    prompt: str | PromptTemplate | None,
    providers: Sequence[str] | None,
    threads: int | None,
) -> Loaded:
    from aligner_middleware.engine.onnx import OnnxModel

    folder, artifact = _exported(model, precision or "int8", prompt)
    if precision not in (None, artifact.precision):
        raise ArtifactError(
            f"{folder} holds weights in {artifact.precision}, not in {precision}: leave precision out, or export them "
            f"again with --precision {precision}"
        )
    content = repr((sorted(artifact.files.items()), artifact.calibration))
    return Loaded(
        model=OnnxModel(folder / MODEL_FILE, artifact, providers=providers, threads=threads),
        tokenizer=artifact.tokenizer(folder),
        template=artifact.template if prompt is None else resolve_template(prompt),
        eos_token_ids=artifact.eos_token_ids,
        name=artifact.name,
        precision=artifact.precision,
        revision=hashlib.sha256(content.encode()).hexdigest()[:12],
        calibration=artifact.calibration,
    )


def _load_torch(model: str, precision: Precision, prompt: str | PromptTemplate | None) -> Loaded:
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
    return Loaded(
        model=TorchModel(checkpoint.load(used)),
        tokenizer=tokenizer,
        template=checkpoint.template,
        eos_token_ids=end_token_ids(checkpoint.folder, tokenizer, checkpoint.template),
        name=model,
        precision=used,
        revision=None,
        calibration=checkpoint.calibration(),
    )


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
    return all(find_spec(package) is not None for package in ("torch", "transformers", "optimum", "onnx"))
