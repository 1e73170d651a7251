"""Finds out which server an address is of, and what it serves."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aligner_middleware.errors import RemoteError
from aligner_middleware.remote.client import Client
from aligner_middleware.remote.dialect import Dialect
from aligner_middleware.remote.sglang import SGLang
from aligner_middleware.remote.vllm import VLLM

logger = logging.getLogger(__name__)

Speak = Callable[[str], Dialect]
"""Makes the dialect by which a model is asked, of its name; the same one for the same name."""

_KINDS = {"vllm": "vLLM", "sglang": "SGLang"}
_ABOUT = {"vllm": ("//version",), "sglang": ("//server_info", "//get_server_info")}  # older ones have the latter
_SOME = 8  # models that a message names


@dataclass(frozen=True)
class Served:
    """What a server serves.

    Attributes:
        kind: Its software, in words, with the version where it tells it.
        model: The name of the model.
        max_positions: Longest sequence, in tokens; `None` where it does not tell.
        dialect: How it is asked.
    """

    kind: str
    model: str
    max_positions: int | None
    dialect: Dialect


def at(url: str, path: str) -> str:
    """Give the address of a path: below the API's, or, after two slashes, below that of the server, without `/v1`."""
    base = url.rstrip("/")
    return base.removesuffix("/v1") + path[1:] if path.startswith("//") else base + path


async def detect(client: Client, url: str, model: str | None, speak: Speak | None = None) -> Served:
    """Ask a server what it is.

    Args:
        client: Asks.
        url: Address of its OpenAI API, such as `http://localhost:8000/v1`.
        model: The model that is wanted; `None` for the first that it serves.
        speak: For an aligner that every model can be, how it is asked; `None` for one whose own weights it must serve.

    Raises:
        RemoteError: If it cannot be reached, is no such server, or does not serve the model.
    """
    place = at(url, "/models")
    cards = _cards(await client.get(place), place)
    card = _any_card(cards, model, url) if speak else _own_card(cards, model, url)
    owner = str(card.get("owned_by"))
    about = await _about(client, url, owner)
    version = [str(about["version"])[:40]] if about.get("version") else []
    # SGLang takes no prompt of `max_req_input_len` tokens, which is less than its context.
    lengths = [card.get("max_model_len"), about.get("max_req_input_len")]
    longest = min((one for one in lengths if isinstance(one, int) and one > 1), default=None)
    own = SGLang() if owner == "sglang" else VLLM(card["id"])
    return Served(
        kind=" ".join([_KINDS.get(owner, "an OpenAI-compatible server"), *version]),
        model=card["id"],
        max_positions=None if speak else longest,  # of such an aligner the tokens are not the model's
        dialect=speak(card["id"]) if speak else own,
    )


def _own_card(cards: Sequence[Mapping[str, Any]], model: str | None, url: str) -> Mapping[str, Any]:
    names = [card["id"] for card in cards]
    if model is not None and model not in names:
        raise RemoteError(
            f"{url} does not serve the model {model!r}, but {', '.join(map(repr, names))}: name one of these"
        )
    return cards[0 if model is None else names.index(model)]


def _any_card(cards: Sequence[Mapping[str, Any]], model: str | None, url: str) -> Mapping[str, Any]:
    """Find the card of a model among all that a host has. A name that it does not list may be one all the same."""
    names = [card["id"] for card in cards]
    if model is None and len(names) > 1:
        some = ", ".join(map(repr, names[:_SOME])) + (", …" if len(names) > _SOME else "")
        raise RemoteError(f"{url} has {len(names)} models ({some}): name one by model=, or by --url-model")
    if model is None or model in names:
        return cards[0 if model is None else names.index(model)]
    logger.warning("%s does not list the model %r; its first answer will show whether it has it", url, model)
    return {"id": model, "owned_by": cards[0].get("owned_by")}


def _cards(content: Any, place: str) -> Sequence[Mapping[str, Any]]:
    cards = content.get("data") if isinstance(content, dict) else None
    named = [card for card in cards or () if isinstance(card, dict) and isinstance(card.get("id"), str)]
    if not named:
        raise RemoteError(f"{place} gives no list of models: is this the address of an OpenAI-compatible server?")
    return named


async def _about(client: Client, url: str, owner: str) -> Mapping[str, Any]:
    """Read a server's own description; empty behind a gateway, where there may be nothing but OpenAI's API."""
    for path in _ABOUT.get(owner, ()):
        with contextlib.suppress(RemoteError):
            content = await client.get(at(url, path))
            return content if isinstance(content, dict) else {}
    return {}


async def tokenize(client: Client, url: str, model: str, text: str) -> list[int] | None:
    """Let a server encode a text, special tokens by their names; `None` where it has no such service."""
    body = {"model": model, "prompt": text, "add_special_tokens": False}
    try:
        content = await client.post(at(url, "//tokenize"), body)
    except RemoteError as exc:
        if exc.temporary or exc.status in (401, 403):
            raise
        return None
    tokens = content.get("tokens") if isinstance(content, dict) else None
    return tokens if isinstance(tokens, list) and all(isinstance(token, int) for token in tokens) else None
