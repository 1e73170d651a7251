"""An aligner on disk: the only contract between building and serving.

A folder with `model.onnx` (its weights beside it), `tokenizer.json` and `aligner.json`, which is an `Artifact`. Building
writes one, serving reads one, and nothing is guessed from file names.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
from pathlib import Path
from typing import Literal

import platformdirs
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from aligner_middleware.errors import ArtifactError
from aligner_middleware.prompt import PromptTemplate, resolve_template

logger = logging.getLogger(__name__)

FORMAT_VERSION = 3
_READABLE = (2, 3)  # version 2 has neither verdicts nor levels; such folders are served as before
MODEL_FILE = "model.onnx"
TOKENIZER_FILE = "tokenizer.json"
ARTIFACT_FILE = "aligner.json"
CALIBRATION_FILE = "calibration.json"  # beside an adapter, for the exports made of it

Precision = Literal["float32", "float16", "int8", "int4"]
GraphKind = Literal["fused", "standard"]
Weights = Literal["floats", "products", "blocks"]
Level = Literal["low", "medium", "high"]
LEVELS: tuple[Level, ...] = ("low", "medium", "high")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BaseWeights(_Frozen):
    """Which weights an aligner was made from.

    Attributes:
        source: A hub id, `NAME VERSION` of a wheel, or the name of a local folder.
        revision: Commit on the hub, where there is one.
        sha256: Of each weight file, by its name.
        adapter_sha256: Of the LoRA adapter merged into them, if any.
    """

    source: str
    revision: str | None = None
    sha256: dict[str, str]
    adapter_sha256: str | None = None


class Parity(_Frozen):
    """How far the exported graph is from the PyTorch model, on real text under teacher forcing.

    Attributes:
        max_logit_difference: Largest absolute difference of two logits.
        same_argmax: Share of positions, 0 to 1, at which both would decode the same token.
        perplexity: Of the exported graph.
        reference_perplexity: Of the PyTorch model, in float32.
        tokens: Number of positions compared.
    """

    max_logit_difference: float
    same_argmax: float
    perplexity: float
    reference_perplexity: float
    tokens: int


class Probe(_Frozen):
    """What the graph said where it was built: another CPU's kernels must say the same.

    Attributes:
        tokens: A short text.
        top: The likeliest tokens after it.
        logits: Their logits.
    """

    tokens: tuple[int, ...]
    top: tuple[int, ...]
    logits: tuple[float, ...]


class Calibration(_Frozen):
    """How willingly an aligner corrects at each level, found by `aligner calibrate` on rows that it was not trained on.

    Attributes:
        scale, bias: The score is `sigmoid(scale * log_odds + bias)`, of the log odds of not keeping (Platt's scaling).
        levels: For aligners with verdicts: an answer is corrected where its score is above this.
        tolerances: For copies: a token of the answer stays where its log probability is within so many nats of the best.
        rows: Number of rows that it was found on; 0 where nobody has calibrated.
    """

    scale: float = Field(default=1.0, gt=0)
    bias: float = 0.0
    levels: dict[Level, float] = {"low": 0.9, "medium": 0.5, "high": 0.2}
    tolerances: dict[Level, float] = {"low": 6.0, "medium": 3.0, "high": 1.0}
    rows: int = Field(default=0, ge=0)

    def score(self, log_odds: float) -> float:
        """Give the probability, 0 to 1, that an answer is not to be kept."""
        return 1 / (1 + math.exp(-min(max(self.scale * log_odds + self.bias, -700.0), 700.0)))

    def log_odds(self, score: float) -> float:
        """Give the log odds that have this score; infinite for 0 and 1."""
        if score <= 0 or score >= 1:
            return math.copysign(math.inf, score - 0.5)
        return (math.log(score / (1 - score)) - self.bias) / self.scale


class Artifact(_Frozen):
    """What `aligner.json` says of the folder it lies in.

    Attributes:
        name: What was exported: `default`, a hub id, or a folder's name.
        template: The prompt that this aligner was trained with.
        graph: `fused` (GroupQueryAttention with buffers shared between passes) or `standard` (as optimum exports it).
        weights: How they are stored (`build/quantize.py`).
        eos_token_ids: Tokens that end a correction.
        layers, kv_heads, head_size: Shape of the KV cache: `2 * layers` arrays of `[B, kv_heads, S, head_size]`.
        max_positions: Context, in tokens.
        tiktoken: Whether tiktoken encodes text as the tokenizer does.
        files: sha256 of every other file in the folder, by name.
        built_with: Version of each tool that built it.
        verdict_ids: Tokens of the verdicts keep, edit and rewrite; `None` for an aligner without.
        calibration: Levels of strength; `None` where nobody has calibrated.
    """

    format_version: int = FORMAT_VERSION
    name: str
    template: PromptTemplate
    precision: Precision
    graph: GraphKind
    weights: Weights
    base: BaseWeights
    eos_token_ids: tuple[int, ...]
    layers: int
    kv_heads: int
    head_size: int
    vocab_size: int
    max_positions: int
    tiktoken: bool = False
    files: dict[str, str]
    built_with: dict[str, str]
    parity: Parity | None = None
    probe: Probe | None = None
    verdict_ids: tuple[int, int, int] | None = None
    calibration: Calibration | None = None

    @classmethod
    def load(cls, folder: Path) -> Artifact:
        """Read `aligner.json` and check every file that it names against its sha256.

        Raises:
            ArtifactError: If the folder, `aligner.json` or a named file is missing, unreadable, of another format
                version, or altered. The message names the file and what to do.
        """
        path = folder / ARTIFACT_FILE
        if not path.is_file():
            raise ArtifactError(
                f"{folder} is not an aligner folder: it has no {ARTIFACT_FILE}; `aligner export` makes one"
            )
        try:
            artifact = cls.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as exc:
            reason = exc.errors()[0] if isinstance(exc, ValidationError) else exc
            where = f"{'.'.join(map(str, reason['loc']))}: {reason['msg']}" if isinstance(reason, dict) else str(reason)
            raise ArtifactError(f"{path} cannot be used ({where}): export the aligner again") from exc
        if artifact.format_version not in _READABLE:
            raise ArtifactError(
                f"{path} has format version {artifact.format_version}, this package reads {FORMAT_VERSION}: export it again"
            )
        if artifact.format_version != FORMAT_VERSION:
            logger.warning(
                "%s has format version %d, without verdicts: it is served as before; train and export it again for them",
                path,
                artifact.format_version,
            )
        artifact._check_files(folder)
        return artifact

    def _check_files(self, folder: Path) -> None:
        for name in {MODEL_FILE, TOKENIZER_FILE} - self.files.keys():
            raise ArtifactError(f"{folder / ARTIFACT_FILE} does not name {name}: export the aligner again")
        for name, expected in self.files.items():
            path = folder / name
            if Path(name).name != name:
                raise ArtifactError(f"{folder / ARTIFACT_FILE} names {name!r}, which lies outside the folder")
            if not path.is_file():
                raise ArtifactError(f"{path} is missing: export the aligner again")
            if sha256(path) != expected:
                raise ArtifactError(f"{path} was altered after its export (sha256 differs): export the aligner again")

    def save(self, folder: Path) -> None:
        """Write `aligner.json`, whole or not at all."""
        temporary = folder / f".{ARTIFACT_FILE}.tmp"
        temporary.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")
        temporary.replace(folder / ARTIFACT_FILE)


def sha256(path: Path) -> str:
    """Hash a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def home() -> Path:
    """Where built aligners are kept: `ALIGNER_HOME`, or else the user's cache folder."""
    override = os.environ.get("ALIGNER_HOME")
    return Path(override).expanduser() if override else Path(platformdirs.user_cache_dir("aligner-middleware"))


DEFAULT_FOLDER = Path(__file__).parent / "assets" / "default"


def cached_folder(model: str, precision: Precision, template: str | PromptTemplate | None = None) -> Path:
    """Where the built form of a model is kept, whether it is there yet or not.

    The name changes with whatever would change the result: the adapter or checkpoint files, the prompt, the precision and
    the format.
    """
    folder = DEFAULT_FOLDER if model == "default" else Path(model).expanduser()
    parts = [str(FORMAT_VERSION), precision, resolve_template(template, model).model_dump_json()]
    if folder.is_dir():
        for path in sorted(folder.glob("*.json")):
            parts += [path.name, sha256(path)]
        for path in sorted(folder.glob("*.safetensors")):
            parts += [path.name, _identity(path)]
    key = hashlib.sha256("\0".join([str(folder if folder.is_dir() else model), *parts]).encode()).hexdigest()[:12]
    label = "".join(char if char.isalnum() else "-" for char in (folder.name if folder.is_dir() else model))
    return home() / f"{label}-{precision}-{key}"


def _identity(path: Path) -> str:
    """A file's hash while it is small (an adapter), its size and time of change when it is not (a checkpoint)."""
    status = path.stat()
    return sha256(path) if status.st_size < 2**26 else f"{status.st_size} {status.st_mtime_ns}"
