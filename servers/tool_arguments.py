"""Whether arguments fit a tool's schema: as much of JSON Schema as the schemas of our own tools use, in the usual words. Pure."""

from collections.abc import Mapping
from typing import Any

_TYPES: Mapping[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "object": (dict,),
}


def mistake_in(schema: Mapping[str, Any], value: Any, path: str = "$") -> str | None:
    """Where and how `value` does not fit `schema`, or None. Knows type, properties, required, additionalProperties, enum, minimum,
    maximum, minLength and maxLength."""
    said = _own_mistake(schema, value)
    if said is not None:
        return f"{path}: {said}"
    if isinstance(value, dict):
        known = schema.get("properties", {})
        for name, part in value.items():
            if name in known and (found := mistake_in(known[name], part, f"{path}.{name}")) is not None:
                return found
    return None


def _own_mistake(schema: Mapping[str, Any], value: Any) -> str | None:
    kind = schema.get("type")
    if kind is not None and (not isinstance(value, _TYPES[kind]) or isinstance(value, bool)):
        whole = kind == "integer" and isinstance(value, float) and value.is_integer()  # as JSON Schema has it
        if not whole:
            return f"{value!r} is not of type {kind!r}"
    if "enum" in schema and value not in schema["enum"]:
        return f"{value!r} is not one of {schema['enum']!r}"
    if isinstance(value, int | float):
        if value < schema.get("minimum", value):
            return f"{value!r} is less than the minimum of {schema['minimum']!r}"
        if value > schema.get("maximum", value):
            return f"{value!r} is greater than the maximum of {schema['maximum']!r}"
    if isinstance(value, str):
        if len(value) < schema.get("minLength", 0):
            return f"{value!r} is too short"
        if len(value) > schema.get("maxLength", len(value)):
            return f"{value!r} is too long"
    if isinstance(value, dict):
        for name in schema.get("required", ()):
            if name not in value:
                return f"{name!r} is a required property"
        extra = [name for name in value if name not in schema.get("properties", {})]
        if extra and schema.get("additionalProperties") is False:
            return f"Additional properties are not allowed ({', '.join(map(repr, extra))} was unexpected)"
    return None
