"""Values and texts that obey a JSON Schema or a regular expression, drawn from a seeded generator.

Rules of the file:
1. What is drawn is valid by JSON Schema 2020-12, for schemas made of the keywords below; `not`, `if` and `dependent...` are not known.
2. Sizes are the smallest that the schema allows, plus a little chance, so that calls stay as short as a model would write them.
3. A schema that cannot be met, or a type that does not exist, raises `SchemaError` with what is wrong.
"""

import json
import math
import re
import re._constants as ops  # type: ignore[import-not-found]  # the parser of `re` has no public name
import re._parser as parser  # type: ignore[import-not-found]
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any

_DEPTH = 6
_FORMATS = {
    "date": "2026-01-31",
    "date-time": "2026-01-31T12:00:00Z",
    "time": "12:00:00Z",
    "duration": "P1D",
    "email": "ada@example.org",
    "hostname": "example.org",
    "ipv4": "192.0.2.1",
    "ipv6": "2001:db8::1",
    "uri": "https://example.org/a",
    "uuid": "123e4567-e89b-42d3-a456-426614174000",
    "json-pointer": "/a",
    "regex": "a+",
}


class SchemaError(Exception):
    """A schema or pattern that no value can be drawn for; the message says why."""


def draw_value(schema: Any, rng: Random, words: Sequence[str]) -> Any:
    """A JSON value that is valid by `schema`; texts are made of `words`. Raises SchemaError."""
    return _Draw(schema, rng, words).value(schema, 0)


def draw_matching(pattern: str, rng: Random) -> str:
    """A text that the whole regular expression matches. Raises SchemaError where the pattern is broken or too clever."""
    try:
        tree = parser.parse(pattern)
    except (re.error, OverflowError) as error:
        raise SchemaError(f"the pattern {pattern!r} is not a regular expression: {error}") from None
    return _match(tree, rng, {})


class _Draw:
    def __init__(self, root: Any, rng: Random, words: Sequence[str]) -> None:
        self.root, self.rng, self.words = root, rng, words
        self._by_type: dict[str, Callable[[Mapping[str, Any], int], Any]] = {
            "object": self._object,
            "array": self._array,
            "string": self._string,
            "integer": self._integer,
            "number": self._number,
            "boolean": lambda schema, depth: self.rng.random() < 0.5,
            "null": lambda schema, depth: None,
        }

    def value(self, schema: Any, depth: int) -> Any:
        if schema is True or schema == {}:
            return self.rng.choice(self.words)
        if not isinstance(schema, dict):
            raise SchemaError(f"no value is valid by {json.dumps(schema)}")
        if depth > 4 * _DEPTH:
            raise SchemaError("the schema has no finite value: its references go round")
        schema = self._merged(schema)
        if "const" in schema:
            return schema["const"]
        if "enum" in schema:
            return self.rng.choice(self._nonempty(schema["enum"], "enum"))
        for key in ("anyOf", "oneOf"):
            if key in schema:
                branches = self._nonempty(schema[key], key)
                branch = branches[-1] if depth > _DEPTH else self.rng.choice(branches)
                rest = {name: value for name, value in schema.items() if name != key}
                return self.value(_both(rest, self._merged(branch)) if isinstance(branch, dict) else branch, depth + 1)
        kind = schema.get("type", _guessed(schema))
        if isinstance(kind, list):
            kind = self.rng.choice(self._nonempty(kind, "type"))
        draw = self._by_type.get(kind) if isinstance(kind, str) else None
        if draw is None:
            raise SchemaError(f"Unsupported type {json.dumps(kind)}")
        return draw(schema, depth)

    @staticmethod
    def _nonempty(options: Any, key: str) -> list[Any]:
        if not isinstance(options, list) or not options:
            raise SchemaError(f"{key} must be a list that is not empty")
        return options

    def _merged(self, schema: Mapping[str, Any]) -> dict[str, Any]:
        """`$ref` followed and `allOf` folded in."""
        merged = dict(schema)
        for _ in range(64):
            ref = merged.pop("$ref", None)
            if ref is not None:
                merged = _both(merged, self._resolved(str(ref)))
                continue
            parts = merged.pop("allOf", None)
            if parts is None:
                return merged
            for part in parts:
                merged = _both(merged, part)
        raise SchemaError("the schema has no finite value: its references go round")

    def _resolved(self, ref: str) -> dict[str, Any]:
        here: Any = self.root
        for step in ref.removeprefix("#").strip("/").split("/") if ref != "#" else ():
            step = step.replace("~1", "/").replace("~0", "~")
            here = here.get(step) if isinstance(here, dict) else None
        if not isinstance(here, dict) or not ref.startswith("#"):
            raise SchemaError(f"the reference {ref!r} leads nowhere")
        return here

    def _object(self, schema: Mapping[str, Any], depth: int) -> dict[str, Any]:
        known = schema.get("properties", {})
        required = list(schema.get("required", ()))
        chance = 0.0 if depth >= _DEPTH else 0.5
        drawn: dict[str, Any] = {}
        for name, part in known.items():
            if name in required or self.rng.random() < chance:
                drawn[name] = self.value(part, depth + 1)
        more = schema.get("additionalProperties", True)
        at_least = schema.get("minProperties", 0)
        spare = (name for name in (*required, *known, *self.words) if name not in drawn)
        for name in [name for name in required if name not in drawn]:
            drawn[name] = self.value(known.get(name, more), depth + 1)
        while len(drawn) < at_least:
            name = next(spare, "")
            if name not in drawn:
                drawn[name] = self.value(known.get(name, more), depth + 1)
        return drawn

    def _array(self, schema: Mapping[str, Any], depth: int) -> list[Any]:
        first, more = schema.get("prefixItems", ()), schema.get("items", True)
        low = schema.get("minItems", 0)
        high = min(schema.get("maxItems", max(low, 2)), max(low, 2))
        count = low if depth >= _DEPTH else max(low, self.rng.randint(min(low, high), high))
        drawn: list[Any] = []
        for _ in range(20 * count + 20):
            if len(drawn) == count:
                return drawn
            place = len(drawn)
            part = self.value(first[place] if place < len(first) else more, depth + 1)
            if not schema.get("uniqueItems") or part not in drawn:
                drawn.append(part)
        if len(drawn) >= low:
            return drawn
        raise SchemaError("uniqueItems asks for more different items than there are")

    def _string(self, schema: Mapping[str, Any], depth: int) -> str:
        low, high = schema.get("minLength", 0), schema.get("maxLength", math.inf)
        if low > high:
            raise SchemaError(f"minLength {low} is above maxLength {high}")
        if "pattern" in schema:
            for _ in range(100):
                text = draw_matching(schema["pattern"], self.rng)
                if low <= len(text) <= high:
                    return text
            raise SchemaError(
                f"no text found for the pattern {schema['pattern']!r} between {low} and {high} characters"
            )
        known = _FORMATS.get(schema.get("format", ""))
        if known is not None and low <= len(known) <= high:
            return known
        text = self.rng.choice(self.words)
        while len(text) < low:
            text += " " + self.rng.choice(self.words)
        return text if len(text) <= high else text[: int(high)]

    def _bounds(self, schema: Mapping[str, Any], step: float) -> tuple[float, float]:
        low, high = schema.get("minimum", -math.inf), schema.get("maximum", math.inf)
        if not isinstance(schema.get("exclusiveMinimum", False), bool):
            low = max(low, schema["exclusiveMinimum"] + step)
        if not isinstance(schema.get("exclusiveMaximum", False), bool):
            high = min(high, schema["exclusiveMaximum"] - step)
        if low == -math.inf:
            low = min(0, high if high == math.inf else high - 100) if high != math.inf else 0
        return low, min(high, low + 100)

    def _integer(self, schema: Mapping[str, Any], depth: int) -> int:
        unit = schema.get("multipleOf", 1)
        low, high = self._bounds(schema, 1)
        first, last = math.ceil(low / unit), math.floor(high / unit)
        if first > last and schema.get("maximum", math.inf) >= first * unit:
            last = first
        if first > last:
            raise SchemaError(f"no integer lies between {low} and {high}")
        return int(self.rng.randint(first, last) * unit)

    def _number(self, schema: Mapping[str, Any], depth: int) -> float:
        if "multipleOf" in schema:
            return float(self._integer(schema, depth)) if schema["multipleOf"] % 1 == 0 else self._multiple(schema)
        low, high = self._bounds(schema, 0)
        if low > high:
            raise SchemaError(f"no number lies between {low} and {high}")
        drawn = round(self.rng.uniform(low, high), 2)
        if low < drawn < high or (low == drawn == high):
            return drawn
        return low + (high - low) / 2

    def _multiple(self, schema: Mapping[str, Any]) -> float:
        unit = schema["multipleOf"]
        low, high = self._bounds(schema, unit)
        first = math.ceil(low / unit)
        if first * unit > high:
            raise SchemaError(f"no multiple of {unit} lies between {low} and {high}")
        return float(first * unit)


def _guessed(schema: Mapping[str, Any]) -> str:
    for key, kind in (("properties", "object"), ("items", "array"), ("minimum", "number"), ("maximum", "number")):
        if key in schema:
            return kind
    return "string"


def _both(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """The schema that asks what both ask, for what is usual in allOf: properties and required of both, the tighter bounds."""
    merged = {**one, **other}
    for key in ("properties", "$defs"):
        if key in one and key in other:
            merged[key] = {**one[key], **other[key]}
    if "required" in one and "required" in other:
        merged["required"] = list(dict.fromkeys([*one["required"], *other["required"]]))
    for key in ("minimum", "minLength", "minItems", "exclusiveMinimum"):
        if key in one and key in other:
            merged[key] = max(one[key], other[key])
    for key in ("maximum", "maxLength", "maxItems", "exclusiveMaximum"):
        if key in one and key in other:
            merged[key] = min(one[key], other[key])
    return merged


_CLASSES = {
    ops.CATEGORY_DIGIT: "0123456789",
    ops.CATEGORY_WORD: "abcdefghijklmnopqrstuvwxyz0123456789_",
    ops.CATEGORY_SPACE: " ",
    ops.CATEGORY_NOT_DIGIT: "abcdefgh",
    ops.CATEGORY_NOT_WORD: "-. ",
    ops.CATEGORY_NOT_SPACE: "abcdefgh0123",
}
_PRINTABLE = "".join(map(chr, range(32, 127)))


def _match(tree: Any, rng: Random, groups: dict[int, str]) -> str:
    """One text for a parsed pattern: every node draws its part, in order."""
    text = ""
    for op, argument in tree:
        if op is ops.LITERAL:
            text += chr(argument)
        elif op is ops.NOT_LITERAL:
            text += rng.choice([c for c in "abcxyz019" if ord(c) != argument])
        elif op is ops.ANY:
            text += rng.choice("abcdefgh")
        elif op is ops.IN:
            text += _one_of(argument, rng)
        elif op in (ops.MAX_REPEAT, ops.MIN_REPEAT, ops.POSSESSIVE_REPEAT):
            low, high, part = argument
            for _ in range(rng.randint(low, min(int(high), low + 4))):
                text += _match(part, rng, groups)
        elif op is ops.SUBPATTERN:
            inside = _match(argument[-1], rng, groups)
            if argument[0] is not None:
                groups[argument[0]] = inside
            text += inside
        elif op is ops.BRANCH:
            text += _match(rng.choice(argument[1]), rng, groups)
        elif op is ops.GROUPREF:
            text += groups.get(argument, "")
        elif op is not ops.AT:
            raise SchemaError(f"the pattern uses {str(op).lower()}, which is not known here")
    return text


def _one_of(parts: Any, rng: Random) -> str:
    negated = parts[0][0] is ops.NEGATE
    chosen: list[str] = []
    for op, argument in parts[1:] if negated else parts:
        if op is ops.LITERAL:
            chosen.append(chr(argument))
        elif op is ops.RANGE:
            chosen += map(chr, range(argument[0], min(argument[1], argument[0] + 127) + 1))
        elif op is ops.CATEGORY:
            chosen += _CLASSES[argument]
    if negated:
        barred = set(chosen)
        chosen = [c for c in _PRINTABLE if c not in barred]
    if not chosen:
        raise SchemaError("the pattern holds a set without characters")
    return rng.choice(chosen)
