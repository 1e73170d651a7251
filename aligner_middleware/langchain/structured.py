"""Was a model asked for an answer that a program reads: JSON, or text by a schema, grammar or pattern?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# How providers call it, without underscores and in small letters; on any level of what a model is given.
_NAMES = frozenset(
    (
        "responseformat",  # OpenAI and most that are like it
        "textformat",  # OpenAI's Responses API by its client; Bedrock's Converse API, in outputConfig
        "outputformat",  # Anthropic, before output_config
        "responsemimetype",  # Gemini
        "responseschema",
        "responsejsonschema",
        "structuredoutputs",  # vLLM
        "guidedjson",
        "guidedregex",
        "guidedchoice",
        "guidedgrammar",
        "structuraltag",
        "jsonmode",
        "jsonschema",  # SGLang, llama.cpp
        "regex",
        "ebnf",
        "grammar",
    )
)
# What a user says of a run, and LangChain of a model, is nothing that the model is asked for.
_NOT_ASKED = frozenset(("metadata", "profile", "tags"))


def asks_for_structure(*parameters: Mapping[str, Any] | None) -> bool:
    """Say whether a model is asked for a structured answer, in whatever place.

    Lists are not looked into: they hold tools, whose schemas are not of the answer.

    Args:
        *parameters: What a model is made with and called with; what comes later goes before what is called the same.
    """
    given: dict[str, Any] = {}
    for layer in parameters:
        given |= layer or {}
        more = given.pop("model_kwargs", None)  # LangChain's, for what a model's class has no name for
        given |= more if isinstance(more, Mapping) else {}
    return any(_asks(name, value) for name, value in given.items())


def _asks(name: object, value: Any) -> bool:
    key = str(name).replace("_", "").lower()
    if key in _NOT_ASKED or _is_plain(value):
        return False
    if key in _NAMES:
        return True
    if not isinstance(value, Mapping):
        return key == "format" and value == "json"  # Ollama; elsewhere it may be that of a picture or a sound
    kind = value.get("type")
    if key == "format" or (isinstance(kind, str) and kind.startswith("json")):  # Ollama, output_config, text
        return True
    return any(_asks(inner, one) for inner, one in value.items())


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping) and "type" in value:
        value = value["type"]
    if isinstance(value, (str, Mapping, list)):
        return not value or value in ("text", "text/plain")
    return value is None or value is False
