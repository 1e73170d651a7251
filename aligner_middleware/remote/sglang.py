"""SGLang's own API, `/generate`: log probabilities of the answer alone, and its prefix cache is read for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from aligner_middleware.engine import Sampler
from aligner_middleware.errors import RemoteError
from aligner_middleware.remote.dialect import UNLIKELY, Dialect, Logs, Piece, Written, finish_of, unusable

_PATH = "//generate"  # beside the path of OpenAI's API, not below it
_INTERVAL = 4  # tokens of one event: by default each event repeats all tokens so far


class SGLang(Dialect):
    """Makes SGLang's requests, and reads its replies."""

    def verify(self, ids: Sequence[int], count: int, tokens: Sequence[int]) -> tuple[str, dict[str, Any]]:
        """See `Dialect`."""
        body = _body(ids, 1, Sampler()) | {"return_logprob": True, "top_logprobs_num": 1}
        body["logprob_start_len"] = len(ids) - count - 1 if count else -1
        return _PATH, body | ({"token_ids_logprob": list(tokens)} if tokens else {})

    def verified(self, content: Any, ids: Sequence[int], count: int) -> list[Logs]:
        """See `Dialect`."""
        meta = _meta(content)
        _finish(meta)
        given: list[Logs] = []
        if count:
            # The first entry is that of the token before, which has no log probability.
            pairs = zip(
                _last(meta, "input_token_logprobs", count), _last(meta, "input_top_logprobs", count), strict=True
            )
            given = [_logs([token, *(top or ())]) for token, top in pairs]
        last = _last(meta, "output_top_logprobs", 1)[0]
        asked = (meta.get("output_token_ids_logprobs") or [()])[0]
        return [*given, _logs([*last, *(asked or ())])]

    def write(
        self, ids: Sequence[int], most: int, stop: Iterable[int], sampler: Sampler, top: int
    ) -> tuple[str, dict[str, Any]]:
        """See `Dialect`."""
        body = _body(ids, most, sampler) | {"stream": True}
        body["sampling_params"] |= {"stop_token_ids": sorted(stop), "stream_interval": _INTERVAL}
        wanted = {"return_logprob": True, "logprob_start_len": -1, "top_logprobs_num": top}
        return _PATH, body | (wanted if top else {})

    def written(self, content: Any, so_far: Written) -> Piece:
        """See `Dialect`."""
        meta = _meta(content)
        finish = _finish(meta)
        ids, total = content.get("output_ids"), meta.get("completion_tokens")
        if not isinstance(ids, list) or not isinstance(total, int):
            raise unusable("it has no `output_ids`")
        fresh = total - so_far.tokens  # an event holds all tokens so far, or, by a setting of the server, the new ones
        so_far.tokens = total
        tops = (meta.get("output_top_logprobs") or [])[-fresh:] if fresh else []
        return Piece(ids[-fresh:] if fresh else (), [_logs(top) for top in tops], finish)


def _body(ids: Sequence[int], most: int, sampler: Sampler) -> dict[str, Any]:
    settings = {"max_new_tokens": most, "temperature": sampler.temperature, "top_p": sampler.top_p, "top_k": -1}
    settings |= {"min_p": 0.0, "repetition_penalty": 1.0, "skip_special_tokens": False}
    settings |= {} if sampler.seed is None else {"sampling_seed": sampler.seed}
    return {"input_ids": list(ids), "sampling_params": settings}


def _meta(content: Any) -> Mapping[str, Any]:
    meta = content.get("meta_info") if isinstance(content, dict) else None
    if not isinstance(meta, dict):
        raise unusable("it is not that of SGLang's /generate")
    return meta


def _finish(meta: Mapping[str, Any]) -> Literal["stop", "length"] | None:
    """Read why a request ended.

    Raises:
        RemoteError: If the server gave it up. It may be asked again, unless the request was at fault.
    """
    reason = meta.get("finish_reason")
    if not isinstance(reason, dict):
        return finish_of(reason)
    if reason.get("type") == "abort" and reason.get("status_code") == 400:
        raise RemoteError(f"the server refuses the request (status 400): {reason.get('message')}", status=400)
    return finish_of(reason.get("type"))


def _last(meta: Mapping[str, Any], name: str, count: int) -> list[Any]:
    entries = meta.get(name)
    if not isinstance(entries, list) or len(entries) < count:
        raise unusable(f"it has no log probabilities ({name})")
    return entries[-count:]


def _logs(entries: Iterable[Sequence[Any]]) -> Logs:
    """Read entries of log probability, token and text."""
    return {int(token): UNLIKELY if value is None else max(float(value), UNLIKELY) for value, token, *_ in entries}
