"""Chat completions of OpenAI's API, of which every chat model is an aligner by its prompt alone.

Such a server reads messages and writes text. It says nothing of a draft's tokens and goes on from none, but some, such as
OpenAI's, take the answer as `prediction` of the correction, and so write faster what stays of it.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from pydantic import BaseModel, FiniteFloat, ValidationError

from aligner_middleware.checkpoints.prompted import (
    ASK_CORRECTION,
    ASK_VERDICT,
    EDIT,
    LONGEST_TAG,
    VERDICTS,
    Parts,
    repeats_tags,
)
from aligner_middleware.engine import Sampler
from aligner_middleware.errors import RemoteError
from aligner_middleware.remote.dialect import UNLIKELY, Dialect, Logs, Piece, Written, finish_of, unusable

logger = logging.getLogger(__name__)

_PATH = "/chat/completions"
_REFUSALS = (400, 403, 422)  # statuses of a request with a field that the model does not take
_OPTIONAL = frozenset(["prediction", "logprobs", "top_logprobs", "temperature", "max_tokens", "top_p", "seed"])
_WORD = 8  # most tokens of a verdict
_TOP = 20  # log probabilities of the verdict's first token; OpenAI gives no more


class _Likely(BaseModel):
    token: str
    logprob: FiniteFloat | None


class _Position(_Likely):
    top_logprobs: list[_Likely] | None = None


class _Logprobs(BaseModel):
    content: list[_Position] | None = None


class _Text(BaseModel):
    content: str | None = None


class _Choice(BaseModel):
    message: _Text = _Text()
    delta: _Text = _Text()
    logprobs: _Logprobs | None = None
    finish_reason: str | None = None


class _Reply(BaseModel):
    choices: list[_Choice]


class Chat(Dialect):
    """Makes requests for chat completions, and reads the replies.

    Args:
        model: The name under which the server has the model.
        predicts: Whether the answer is sent as `prediction`.
    """

    by_tokens: ClassVar[bool] = False

    def __init__(self, model: str, *, predicts: bool) -> None:
        self._model = model
        self.without = frozenset() if predicts else frozenset({"prediction"})

    def verify(self, ids: Sequence[int], count: int, tokens: Sequence[int]) -> tuple[str, dict[str, Any]]:
        """See `Dialect`; only the verdict can be asked for.

        Raises:
            RemoteError: If it is not that.
        """
        if count:
            raise RemoteError(
                "a chat model gives no log probabilities of a given text: a likelihood needs an aligner whose own weights "
                "are loaded here or served by token ids"
            )
        return self._request(
            Parts.of(ids), ASK_VERDICT, max_tokens=_WORD, temperature=0, logprobs=True, top_logprobs=_TOP
        )

    def verified(self, content: Any, ids: Sequence[int], count: int) -> list[Logs]:
        """See `Dialect`."""
        choice = next(iter(_reply(content).choices), _Choice())
        said = choice.message.content or ""
        word = re.search("[a-z]+", said.casefold())
        chosen = next((token for token, name in VERDICTS.items() if word and word[0] == name), None)
        if chosen is None:
            raise unusable(
                f"the model {self._model!r} writes {said[:60]!r} (finish reason {choice.finish_reason}) where it was asked "
                f"for one word, {' or '.join(VERDICTS.values())}: choose a model that does so, and does not reason before"
            )
        given = (choice.logprobs and choice.logprobs.content) or ()
        first = next((one for one in given if _letters(one.token)), None)
        sure = dict.fromkeys(VERDICTS, UNLIKELY) | {chosen: 0.0}
        return [(sure if first is None else _weighed(first, sure)) | {EDIT: -math.inf}]

    def write(
        self, ids: Sequence[int], most: int, stop: Iterable[int], sampler: Sampler, top: int
    ) -> tuple[str, dict[str, Any]]:
        """See `Dialect`. No limit is sent, as OpenAI takes none beside `prediction`: whoever reads the stream ends it."""
        parts = Parts.of(ids)
        wanted: dict[str, Any] = {"stream": True, "temperature": sampler.temperature}
        wanted |= {"top_p": sampler.top_p} if sampler.top_p < 1 else {}
        wanted |= {} if sampler.seed is None else {"seed": sampler.seed}
        return self._request(parts, ASK_CORRECTION, **wanted, prediction={"type": "content", "content": parts.answer})

    def written(self, content: Any, so_far: Written) -> Piece:
        """See `Dialect`; a token is a byte.

        Raises:
            RemoteError: If the model repeats its prompt's tags, which no reader must see; or as `Dialect` says.
        """
        choice = next(iter(_reply(content).choices), _Choice())  # the last event may hold usage alone
        text = so_far.held + (choice.delta.content or "")
        so_far.held = text[-1:] if "\ud800" <= text[-1:] < "\udc00" else ""  # its other half comes with the next event
        whole = text.removesuffix(so_far.held).encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()
        so_far.tokens += len(whole)
        so_far.latest += text
        if repeats_tags(so_far.latest, so_far.context):
            raise unusable(
                f"the model {self._model!r} repeats the tags of its prompt: choose one that does as it is told"
            )
        so_far.latest = so_far.latest[-LONGEST_TAG:]
        return Piece(list(whole), (), finish_of(choice.finish_reason))

    def adapt(self, error: RemoteError) -> None:
        """See `Dialect`. Not every model takes every field; the message of the refusal names the one that it does not."""
        if error.status not in _REFUSALS:
            return
        said = str(error).partition("(status")[2]
        refused = {name for name in _OPTIONAL - self.without if re.search(rf"(?i)\b{name}\b", said)}
        if refused:
            logger.info("%r is asked without %s from now on: %s", self._model, ", ".join(sorted(refused)), error)
        self.without |= refused | ({"top_logprobs"} if "logprobs" in refused else set())

    def _request(self, parts: Parts, request: str, **wanted: Any) -> tuple[str, dict[str, Any]]:
        asked = {name: value for name, value in wanted.items() if name not in self.without}
        return _PATH, {"model": self._model, "messages": parts.messages(request)} | asked


def _reply(content: Any) -> _Reply:
    try:
        return _Reply.model_validate(content)
    except ValidationError as exc:
        raise unusable(f"it is not that of OpenAI's chat completions ({exc.errors()[0]['msg']})") from exc


def _letters(token: str) -> str:
    return "".join(re.findall("[a-z]", token.casefold()))


def _weighed(position: _Position, sure: Logs) -> Logs:
    """Give the log probability of each verdict: that of all tokens its word can begin with, such as " Keep" and "KE".

    Args:
        position: The place of the word's first letters.
        sure: What holds where the tokens there tell of no verdict.
    """
    listed = [*(position.top_logprobs or ()), position]
    found = {one.token: 0.0 if one.logprob is None else math.exp(min(one.logprob, 0.0)) for one in listed}
    begun = {
        verdict: sum(share for token, share in found.items() if _letters(token) and word.startswith(_letters(token)))
        for verdict, word in VERDICTS.items()
    }
    if not any(begun.values()):
        return sure
    left = max(0.0, 1.0 - sum(found.values()))  # one that is not among them has this at most
    return {verdict: math.log(share or left) if share or left else UNLIKELY for verdict, share in begun.items()}
