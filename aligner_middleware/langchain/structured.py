"""Says whether a model is asked for a structured answer: JSON, or text by a schema, grammar or pattern."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# The providers' names for it, without underscores and in lower case; on any level of a model's parameters.
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
# A user's notes on a run, and LangChain's on a model, ask the model for nothing.
_IGNORED = frozenset(("metadata", "profile", "tags"))


def asks_for_structure(*parameters: Mapping[str, Any] | None) -> bool:
    """Say whether a model is asked for a structured answer, on any level of its parameters.

    Lists are skipped: they hold tools, whose schemas are not the answer's.

    Args:
        *parameters: The model's settings, then the call's; a later value replaces an earlier one of the same name.
    """
    given: dict[str, Any] = {}
    for layer in parameters:
        given |= layer or {}
        more = given.pop("model_kwargs", None)  # LangChain's, for parameters without a field
        given |= more if isinstance(more, Mapping) else {}
    return any(_asks(name, value) for name, value in given.items())


def _asks(name: object, value: Any) -> bool:
    key = str(name).replace("_", "").lower()
    if key in _IGNORED or _is_plain(value):
        return False
    if key in _NAMES:
        return True
    if not isinstance(value, Mapping):
        return key == "format" and value == "json"  # Ollama; elsewhere it may be that of a picture or a sound
    kind = value.get("type")
    if key == "format" or (isinstance(kind, str) and kind.startswith("json")):  # Ollama, output_config, text
        return True
    return any(_asks(inner, given) for inner, given in value.items())


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping) and "type" in value:
        value = value["type"]
    if isinstance(value, (str, Mapping, list)):
        return not value or value in ("text", "text/plain")
    return value is None or value is False
