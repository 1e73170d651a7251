"""Correct every answer of a LangChain model: `chain = llm | AlignerRunnable()`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aligner_middleware.lazy import on_first_use

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
        RemoteError,
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
    "RemoteError": "errors",
    "UpstreamError": "errors",
    "Usage": "correction",
    "question_record": "langchain.question_record:RECORD",
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
    "RemoteError",
    "UpstreamError",
    "Usage",
    "__version__",
    "question_record",
]


__getattr__ = on_first_use(__name__, _HOMES)


def __dir__() -> list[str]:
    return __all__
