"""vLLM's form of OpenAI's completions API: prompts are token ids, and so are the tokens of a reply.

Other servers behind OpenAI's API are asked in this form too: those that take its fields can be used.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from aligner_middleware.engine import Sampler
from aligner_middleware.remote.dialect import UNLIKELY, Dialect, Logs, Piece, Written, finish_of, unusable

_PATH = "/completions"
# A model's own settings (generation_config.json) would otherwise change what greedy decoding gives.
_PLAIN = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "top_k": 0, "min_p": 0.0}
_IDS = {"return_tokens_as_token_ids": True, "skip_special_tokens": False}
_INTERVAL = 4  # tokens of one event: each event has some 250 bytes
_PREFIX = "token_id:"


class VLLM(Dialect):
    """Makes vLLM's requests, and reads its replies.

    Args:
        model: The name under which it serves the model.
    """

    def __init__(self, model: str) -> None:
        self._model = model

    def verify(self, ids: Sequence[int], count: int, tokens: Sequence[int]) -> tuple[str, dict[str, Any]]:
        """See `Dialect`."""
        body = self._body(ids, 1, Sampler()) | {"logprobs": max(1, len(tokens))}
        if tokens:
            body["logprob_token_ids"] = list(tokens)
        if count:
            body["prompt_logprobs"] = 1
        return _PATH, body

    def verified(self, content: Any, ids: Sequence[int], count: int) -> list[Logs]:
        """See `Dialect`."""
        choice = _choice(content)
        given: list[Logs] = []
        if count:
            positions = choice.get("prompt_logprobs")
            if not isinstance(positions, list) or len(positions) != len(ids):
                raise unusable("it has no log probabilities of the prompt (`prompt_logprobs`)")
            given = [_entries(position) for position in positions[-count:]]
        last = _top_logs(choice)
        if len(last) != 1:
            raise unusable("it has no log probabilities (`logprobs`)")
        return given + last

    def write(
        self, ids: Sequence[int], most: int, stop: Iterable[int], sampler: Sampler, top: int
    ) -> tuple[str, dict[str, Any]]:
        """See `Dialect`."""
        body = self._body(ids, most, sampler) | {
            "stop_token_ids": sorted(stop),
            "stream": True,
            "stream_interval": _INTERVAL,
            "return_token_ids": True,
        }
        return _PATH, body | ({"logprobs": top} if top else {})

    def written(self, content: Any, so_far: Written) -> Piece:
        """See `Dialect`."""
        if isinstance(content, dict) and content.get("choices") == []:  # the last event may hold usage alone
            return Piece(())
        choice = _choice(content)
        logs = _top_logs(choice)
        tokens = choice.get("token_ids")
        if tokens is None and (choice.get("logprobs") or choice.get("text")):
            tokens = [_id(token) for token in (choice.get("logprobs") or {}).get("tokens") or ()]
            if not tokens:
                raise unusable("it has text without token ids (`return_token_ids`)")
        so_far.tokens += len(tokens or ())
        return Piece(tokens or (), logs, finish_of(choice.get("finish_reason")))

    def _body(self, ids: Sequence[int], most: int, sampler: Sampler) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self._model, "prompt": list(ids), "max_tokens": most}
        body |= {"temperature": sampler.temperature, "top_p": sampler.top_p} | _PLAIN | _IDS
        return body | ({} if sampler.seed is None else {"seed": sampler.seed})


def _choice(content: Any) -> Mapping[str, Any]:
    choices = content.get("choices") if isinstance(content, dict) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise unusable("it is not that of OpenAI's completions, with one choice")
    return choices[0]


def _top_logs(choice: Mapping[str, Any]) -> list[Logs]:
    positions = (choice.get("logprobs") or {}).get("top_logprobs") or []
    return [{_id(token): _finite(value) for token, value in (position or {}).items()} for position in positions]


def _entries(position: Any) -> Logs:
    """Read a position of `prompt_logprobs`."""
    if not isinstance(position, dict) or not position:
        raise unusable("it has no log probabilities of a token of the prompt")
    return {int(token): _finite(entry["logprob"]) for token, entry in position.items()}


def _id(token: str) -> int:
    if not token.startswith(_PREFIX):
        raise unusable(f"it names a token by its text, {token[:40]!r}, not by its id (`return_tokens_as_token_ids`)")
    return int(token[len(_PREFIX) :])


def _finite(value: float | None) -> float:
    return UNLIKELY if value is None else max(float(value), UNLIKELY)
