"""The outcome of an alignment: the text to show with its metadata, or the exception to raise.

Here the options are applied: `on_error`, `fallback`, `on_missing_question`, `on_doubt`, `mode`, `keep_original`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from aligner_middleware.errors import DoubtError, MissingQuestionError
from aligner_middleware.langchain.metadata import correction_metadata, new_metadata
from aligner_middleware.langchain.options import AlignmentOptions, call_options, raises

if TYPE_CHECKING:
    from aligner_middleware.correction import Correction

logger = logging.getLogger("aligner_middleware")

T = TypeVar("T")


@dataclass(frozen=True)
class Aligned:
    """An answer that the aligner has dealt with.

    Attributes:
        text: The text to show.
        metadata: For `response_metadata["aligner"]`: `aligned`, `changed`, `model`, a `digest` of the text, and either
            `finish_reason`, `usage`, the `device` that the aligner runs on, the verdict and its score, and the safeguards
            that objected, what was released early, or the `reason` why it was not aligned.
            In shadow mode also `mode`, whether the answer `would_change`, and the `proposed` text, if it differs; where
            `would_change` is false, a safeguard objected to that text.
        correction: The correction, where one was made.
    """

    text: str
    metadata: dict[str, Any]
    correction: Correction | None = None


Outcome = Aligned | Exception


def unwrap(result: T | Exception) -> T:
    """Give a result, or raise the exception that stands in its place."""
    if isinstance(result, Exception):
        raise result
    return result


def corrected(options: AlignmentOptions, answer: str, correction: Correction) -> Outcome:
    """Make the outcome of a correction, and report it to the log and to `on_correction`."""
    if correction.doubts and call_options(options)["on_doubt"] == "raise":
        return failed(options, answer, DoubtError(correction.doubts))
    _report(options, correction)
    if options.mode == "shadow":
        return Aligned(answer, correction_metadata(options, answer, correction), correction)
    metadata = correction_metadata(options, correction.corrected, correction) | _original(options, answer)
    return Aligned(correction.corrected, metadata, correction)


def failed(options: AlignmentOptions, answer: str, error: Exception) -> Outcome:
    """Make the outcome of a failed correction, by `on_error`, `fallback` and `mode`."""
    if raises(options):
        return error
    logger.warning("an answer was not aligned: %s", error)
    text = answer if options.fallback is None or options.mode == "shadow" else options.fallback
    reason = f"{type(error).__name__}: {error}"
    metadata = new_metadata(options, text, aligned=False, changed=text != answer, reason=reason)
    if isinstance(error, DoubtError):
        metadata |= {"doubts": list(error.doubts)}
    return Aligned(text, metadata | _original(options, answer))


def without_question(options: AlignmentOptions, answer: str, error: MissingQuestionError) -> Outcome:
    """Make the outcome of an answer whose question is not known, by `on_missing_question` and `mode`."""
    if options.on_missing_question == "raise" and options.mode == "correct":
        return error
    return unaligned(options, answer, f"question not known: {error.cause}")


def unaligned(options: AlignmentOptions, answer: str, reason: str) -> Aligned:
    """Make the outcome of an answer that is returned as it is, and say why."""
    return Aligned(answer, new_metadata(options, answer, aligned=False, changed=False, reason=reason))


def _report(options: AlignmentOptions, correction: Correction) -> None:
    changed = "would correct" if options.mode == "shadow" else "corrected"
    logger.info(
        "%s an answer (prompt of %d tokens) in %.0f ms, %d passes",
        changed if correction.changed else "kept",
        correction.usage.prompt_tokens,
        correction.usage.seconds * 1000,
        correction.usage.passes,
    )
    if options.on_correction is not None:
        try:
            options.on_correction(correction)
        except Exception:  # a user's counter must not break the answer that it counts
            logger.exception("on_correction failed")


def _original(options: AlignmentOptions, answer: str) -> dict[str, str]:
    return {"original": answer} if options.keep_original else {}
