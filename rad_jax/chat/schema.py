"""JSON that a model wrote: found in its answer, and checked against a schema."""

from __future__ import annotations

import json
import re
from typing import Any

from rad_jax.chat.client import UnusableError

_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "boolean": (bool,),
    "null": (type(None),),
}
_FENCE = re.compile(r"```(?:json)?\s*(.*?)\s*```", re.DOTALL)


def read(text: str, schema: dict[str, Any]) -> Any:
    """The JSON value of an answer, alone or in a code fence.

    Raises:
        UnusableError: there is none, or it is not as `schema` says. The reason names places in the schema, never a value.
    """
    fenced = _FENCE.search(text)
    try:
        value = json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        raise UnusableError("not JSON") from None
    fault = _fault(value, schema, "")
    if fault:
        raise UnusableError("not of the schema", fault)
    return value


def _fault(value: Any, schema: dict[str, Any], place: str) -> str | None:
    """What is wrong with a value, or None. Of JSON Schema: type, enum, minimum, properties, required, additionalProperties, items."""
    names = schema.get("type", [])
    names = [names] if isinstance(names, str) else names
    fits = [isinstance(value, _TYPES[name]) and not (name == "integer" and isinstance(value, bool)) for name in names]
    if names and not any(fits):
        return f"{place or 'the answer'} must be {' or '.join(names)}"
    if "enum" in schema and value not in schema["enum"]:
        return f"{place} must be one of {', '.join(map(str, schema['enum']))}"
    if "minimum" in schema and isinstance(value, int) and value < schema["minimum"]:
        return f"{place} must be at least {schema['minimum']}"
    if isinstance(value, dict):
        known = schema.get("properties", {})
        if missing := [name for name in schema.get("required", []) if name not in value]:
            return f"{place or 'the answer'} lacks {', '.join(missing)}"
        if schema.get("additionalProperties") is False and value.keys() - known.keys():
            return f"{place or 'the answer'} has more than {', '.join(known)}"
        found = [
            _fault(value[name], inner, f"{place}.{name}".strip(".")) for name, inner in known.items() if name in value
        ]
        return next(filter(None, found), None)
    if isinstance(value, list) and "items" in schema:
        return next(filter(None, (_fault(item, schema["items"], f"{place}[]") for item in value)), None)
    return None
