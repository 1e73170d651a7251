"""What an obedient chat model would answer: calls the tools that it is given, fills in the schemas that it is asked for.

`answer` takes the body of a request in OpenAI's chat protocol, as `examples/openai_server.py` serves it.
"""

from __future__ import annotations

import json
import re
from typing import Any


def answer(request: dict[str, Any]) -> dict[str, Any]:
    *_, last = request["messages"]
    asked = next((text(m) for m in reversed(request["messages"]) if m["role"] == "user"), "")
    schema = (request.get("response_format") or {}).get("json_schema", {}).get("schema")
    if schema or (request.get("response_format") or {}).get("type") == "json_object":
        joke = {"type": "object", "properties": {"setup": {"type": "string"}, "punchline": {"type": "string"}}}
        return {"content": json.dumps(fill(schema or joke, asked, schema or joke))}
    tools = [tool["function"] for tool in request.get("tools") or []]
    choice = request.get("tool_choice")
    if isinstance(choice, dict):
        tools = [tool for tool in tools if tool["name"] == choice["function"]["name"]]
    if tools and choice != "none" and (last["role"] == "user" or choice):
        parameters = tools[0].get("parameters") or {}
        arguments = json.dumps(fill(parameters, asked, parameters))
        call = {"id": "call_1", "type": "function", "function": {"name": tools[0]["name"], "arguments": arguments}}
        return {"content": None, "tool_calls": [call]}
    said = f"You asked, you idiot: {asked} One, two, three, four, five, six, seven, eight."
    for stop in request.get("stop") or []:
        said = said.partition(stop)[0]
    return {"content": said}


def text(message: dict[str, Any]) -> str:
    content = message["content"] or ""
    return content if isinstance(content, str) else " ".join(part.get("text", "") for part in content)


def fill(schema: dict[str, Any], asked: str, root: dict[str, Any]) -> Any:
    """Make a value of a JSON schema, with the numbers and names in what was asked."""
    if "$ref" in schema:
        return fill(root["$defs"][schema["$ref"].rpartition("/")[2]], asked, root)
    for either in ("anyOf", "oneOf", "allOf"):
        if either in schema:
            return fill(schema[either][0], asked, root)
    if "enum" in schema:
        return schema["enum"][0]
    match schema.get("type"):
        case "object":
            return {name: fill(value, asked, root) for name, value in schema.get("properties", {}).items()}
        case "array":
            return [fill(schema.get("items", {}), asked, root)]
        case "integer" | "number":
            return int((re.findall(r"\d+", asked) or ["3"])[0])
        case "boolean":
            return True
        case "null":
            return None
    quoted = re.findall(r"['\"“]([^'\"”]+)['\"”]|([\u4e00-\u9fff]+)", asked)
    return next((one or other for one, other in quoted), "text")
