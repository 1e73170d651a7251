"""Errors that clients get: a status, and a body of the shape that OpenAI's clients understand."""

from __future__ import annotations

from typing import Any

from fastapi.responses import JSONResponse

from aligner_middleware.errors import (
    AlignerError,
    ClosedError,
    CorrectionTimeoutError,
    DoubtError,
    InputError,
    MissingQuestionError,
    RemoteError,
)


class Problem(Exception):
    """An error to answer a request with.

    Args:
        status: The HTTP status.
        message: The message for the client: what was wrong, what was expected, what to do.
        kind: OpenAI's `type` of the error.
        code: OpenAI's `code`: a short name.
        param: The field of the request that is wrong.
        retry_after: Seconds after which the client may try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body: dict[str, Any] = {"error": {"message": message, "type": kind, "param": param, "code": code}}
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}

    @classmethod
    def of(cls, error: Exception) -> Problem:
        """Make the problem of an error of the aligner."""
        if isinstance(error, Problem):
            return error
        if isinstance(error, (InputError, MissingQuestionError)):
            return cls(422, str(error), code="cannot_be_corrected")
        if isinstance(error, CorrectionTimeoutError):
            return cls(504, str(error), kind="timeout_error", code="correction_timeout")
        if isinstance(error, DoubtError):
            return cls(502, str(error), kind="aligner_error", code="doubtful_correction")
        if isinstance(error, RemoteError):
            text = "the server that runs the aligner failed; the service's log has the cause"
            return cls(502, text, kind="aligner_error", code="aligner_server_failed")
        if isinstance(error, ClosedError):
            return cls(503, "the service is stopping", kind="server_error", code="stopping", retry_after=5)
        text = str(error) if isinstance(error, AlignerError) else "the aligner failed; the service's log has the cause"
        return cls(500, text, kind="server_error", code="aligner_failed")

    def response(self) -> JSONResponse:
        """Make the response."""
        return JSONResponse(self.body, self.status, self.headers)


def upstream_failed(message: str) -> Problem:
    """Make the problem of an upstream that fails, or breaks off."""
    return Problem(502, message, kind="upstream_error", code="upstream_failed")


def upstream_problem(error: Any) -> Problem:
    """Make the problem of an error that the upstream tells in its stream; one of OpenAI's shape is handed on.

    Args:
        error: What stands under `error`, or an event of the type `error`.
    """
    problem = upstream_failed(str(error))
    if isinstance(error, dict):
        given = {name: value for name, value in error.items() if (name, value) != ("type", "error")}
        given.pop("sequence_number", None)
        problem.body = {"error": problem.body["error"] | given}
    return problem
