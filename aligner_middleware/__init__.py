"""Correct every answer of a LangChain model: `chain = llm | AlignerRunnable()`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aligner_middleware.aligner import Aligner
    from aligner_middleware.correction import Correction, Usage
    from aligner_middleware.diff import Diff
    from aligner_middleware.errors import (
        AlignerError,
        ArtifactError,
        BuildError,
        ClosedError,
        ConfigError,
        CorrectionTimeoutError,
        DataError,
        DoubtError,
        InputError,
        JobError,
        MissingExtraError,
        MissingQuestionError,
        PromptTooLongError,
        UpstreamError,
    )
    from aligner_middleware.langchain.chat_model import AlignedChatModel
    from aligner_middleware.langchain.middleware import AlignerMiddleware
    from aligner_middleware.langchain.question_record import RECORD as question_record
    from aligner_middleware.langchain.runnable import AlignerRunnable

__version__ = "0.2.0"

# Where each public name is defined; it is imported when it is first used, so that importing the package costs nothing.
_HOMES = {
    "AlignedChatModel": "langchain.chat_model",
    "Aligner": "aligner",
    "AlignerError": "errors",
    "AlignerMiddleware": "langchain.middleware",
    "AlignerRunnable": "langchain.runnable",
    "ArtifactError": "errors",
    "BuildError": "errors",
    "ClosedError": "errors",
    "ConfigError": "errors",
    "Correction": "correction",
    "CorrectionTimeoutError": "errors",
    "DataError": "errors",
    "Diff": "diff",
    "DoubtError": "errors",
    "InputError": "errors",
    "JobError": "errors",
    "MissingExtraError": "errors",
    "MissingQuestionError": "errors",
    "PromptTooLongError": "errors",
    "UpstreamError": "errors",
    "Usage": "correction",
    "question_record": "langchain.question_record",
}

__all__ = [
    "AlignedChatModel",
    "Aligner",
    "AlignerError",
    "AlignerMiddleware",
    "AlignerRunnable",
    "ArtifactError",
    "BuildError",
    "ClosedError",
    "ConfigError",
    "Correction",
    "CorrectionTimeoutError",
    "DataError",
    "Diff",
    "DoubtError",
    "InputError",
    "JobError",
    "MissingExtraError",
    "MissingQuestionError",
    "PromptTooLongError",
    "UpstreamError",
    "Usage",
    "__version__",
    "question_record",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{_HOMES[name]}")
    return getattr(module, "RECORD" if name == "question_record" else name)


def __dir__() -> list[str]:
    return __all__
