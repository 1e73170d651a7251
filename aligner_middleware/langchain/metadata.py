"""The metadata of an aligned answer: what goes into `response_metadata["aligner"]`, and how to read it back.

Its fields are listed in docs/langchain.md. A `digest` ties the metadata to the text that it is about.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from langchain_core.messages import BaseMessage

from aligner_middleware.langchain.options import AlignmentOptions

if TYPE_CHECKING:
    from aligner_middleware.correction import Correction

KEY = "aligner"


def aligner_metadata(message: BaseMessage | None) -> dict[str, Any]:
    """Give the metadata that an aligner has left on a message; empty where there is none."""
    metadata = message.response_metadata.get(KEY) if message else None
    return metadata if isinstance(metadata, dict) else {}


def is_about(metadata: Mapping[str, Any], answer: str) -> bool:
    """Say whether metadata is about an answer as it is now."""
    return metadata.get("digest") == _digest(answer)


def new_metadata(options: AlignmentOptions, text: str, **fields: Any) -> dict[str, Any]:
    """Make the metadata of a text, with the fields that every outcome has, and more."""
    metadata = {"model": options.aligner.name, "digest": _digest(text)} | fields
    return metadata | ({"mode": "shadow"} if options.mode == "shadow" else {})


def correction_metadata(options: AlignmentOptions, text: str, correction: Correction) -> dict[str, Any]:
    """Make the metadata of a text that is shown after a correction.

    Args:
        options: The aligner, and whether it only shadows.
        text: The text to show.
        correction: The correction; where only shadowing, the metadata says whether it would change the answer.
    """
    shadow = options.mode == "shadow"
    metadata = new_metadata(
        options,
        text,
        aligned=not shadow,
        changed=correction.changed and not shadow,
        finish_reason=correction.finish_reason,
        usage=asdict(correction.usage),
        device=options.aligner.device,
    )
    if correction.verdict is not None:
        metadata |= {"verdict": correction.verdict, "score": correction.score}
    if correction.instruction is not None:
        metadata |= {"instruction": correction.instruction}
    if correction.doubts:
        metadata |= {"doubts": list(correction.doubts)}
    if correction.released:
        metadata |= {"released": correction.released, "late": correction.late}
    if shadow:
        proposed = correction.corrected if correction.proposed is None else correction.proposed
        metadata |= {"would_change": correction.changed}
        metadata |= {"proposed": proposed} if proposed != correction.original else {}
    return metadata


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
