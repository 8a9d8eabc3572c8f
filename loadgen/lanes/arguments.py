"""Valid arguments for a tool out of its JSON Schema, so that a real server accepts a scripted call. Pure."""

import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

MAX_DEPTH = 12
_WORDS = ("annual", "report", "summary", "battery", "storage", "cost", "harbour", "traffic", "river", "level", "crop")

# What a string has to look like, by its format or, where there is none, by its property's name. First match wins.
_FORMATS: Mapping[str, Callable[[random.Random], str]] = {
    "date-time": lambda rng: f"2026-03-{rng.randint(1, 28):02}T{rng.randint(0, 23):02}:30:00Z",
    "date": lambda rng: f"2026-03-{rng.randint(1, 28):02}",
    "time": lambda rng: f"{rng.randint(0, 23):02}:{rng.randint(0, 59):02}",
    "uri": lambda rng: f"https://example.com/page/{rng.randint(1, 9999)}",
    "email": lambda rng: f"user{rng.randint(1, 9999)}@example.com",
    "uuid": lambda rng: f"{rng.getrandbits(128):032x}",
    "ipv4": lambda rng: f"192.0.2.{rng.randint(1, 254)}",
    "hostname": lambda rng: "example.com",
    "timezone": lambda rng: "UTC",
    "expression": lambda rng: f"{rng.randint(1, 999)} * {rng.randint(1, 999)}",
    "statement": lambda rng: f"SELECT {rng.randint(1, 9999)}",
    "path": lambda rng: ".",
}
_NAMES: Sequence[tuple[str, str]] = (
    (r"time_?zone|(^|_)tz$", "timezone"),
    (r"date_?time|timestamp", "date-time"),
    (r"(^|_)date$|(^|_)day$", "date"),
    (r"(^|_)time$", "time"),
    (r"ur[il]$", "uri"),
    (r"e_?mail", "email"),
    (r"uuid|guid", "uuid"),
    (r"host(name)?$", "hostname"),
    (r"path$|dir(ectory)?$|folder$", "path"),
    (r"expression|formula", "expression"),
    (r"sql|statement", "statement"),
)
_PATTERN_TRIES = (
    "a",
    "A",
    "1",
    "0",
    "abc",
    "ABC",
    "a1",
    "12",
    "123",
    "1234",
    "12:00",
    "2026-03-01",
    "a-b",
    "a_b",
    "a.b",
)


def arguments_for(schema: Mapping[str, Any], rng: random.Random) -> dict[str, Any]:
    """Arguments that fit `schema`, a tool's inputSchema: its required properties, drawn from `rng`.

    Takes a value that the schema itself names before one that it only describes: const, enum, default, examples, then
    type with its bounds, format or name. A `pattern` is met by a few tries, not by solving it. `$ref` works within the
    schema.
    """
    drawn = _draw(schema, "", rng, schema, 0)
    return drawn if isinstance(drawn, dict) else {}


def _referred(reference: str, root: Mapping[str, Any]) -> Mapping[str, Any]:
    """What `#/a/b` points to in `root`; an empty schema where it points to nothing."""
    found: Any = root
    for part in reference.removeprefix("#/").split("/"):
        found = found.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(found, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def _resolved(schema: Any, root: Mapping[str, Any]) -> Mapping[str, Any]:
    """`schema` with its $ref followed, and allOf and the first of anyOf or oneOf that is not null merged into it."""
    for _ in range(MAX_DEPTH):
        if not isinstance(schema, Mapping):
            return {}
        reference = schema.get("$ref")
        if isinstance(reference, str) and reference.startswith("#/"):
            schema = {**_referred(reference, root), **{k: v for k, v in schema.items() if k != "$ref"}}
            continue
        choices = schema.get("anyOf") or schema.get("oneOf") or []
        taken = [c for c in choices if not (isinstance(c, Mapping) and c.get("type") == "null")][:1]
        parts = [*schema.get("allOf", []), *taken]
        if not parts:
            return schema
        schema = {k: v for k, v in schema.items() if k not in ("allOf", "anyOf", "oneOf")}
        for part in parts:
            more = _resolved(part, root)
            properties = {**more.get("properties", {}), **schema.get("properties", {})}
            required = [*more.get("required", ()), *schema.get("required", ())]
            schema = {**more, **schema, "properties": properties, "required": required}
    return schema if isinstance(schema, Mapping) else {}


def _draw(schema: Any, name: str, rng: random.Random, root: Mapping[str, Any], depth: int) -> Any:
    spec = _resolved(schema, root)
    if "const" in spec:
        return spec["const"]
    if spec.get("enum"):
        return rng.choice(list(spec["enum"]))
    if depth and "default" in spec and spec["default"] is not None:
        return spec["default"]
    if depth and spec.get("examples"):
        return rng.choice(list(spec["examples"]))
    kind = spec.get("type")
    if isinstance(kind, list):
        kind = next((k for k in kind if k != "null"), "null")
    if kind is None:
        kind = "object" if spec.get("properties") or not depth else "array" if "items" in spec else "string"
    if kind == "object" and depth < MAX_DEPTH:
        properties = spec.get("properties", {})
        required = dict.fromkeys(spec.get("required", ()))
        return {key: _draw(properties.get(key, {}), key, rng, root, depth + 1) for key in required}
    if kind == "array" and depth < MAX_DEPTH:
        first = spec.get("prefixItems", [])
        count = max(int(spec.get("minItems", 0)), min(1, int(spec.get("maxItems", 1))))
        items = [first[i] if i < len(first) else spec.get("items", {}) for i in range(count)]
        return [_draw(item, name, rng, root, depth + 1) for item in items]
    if kind in ("integer", "number"):
        return _number(spec, rng, whole=kind == "integer")
    if kind == "string":
        return _string(spec, name, rng)
    return {"object": {}, "array": [], "boolean": rng.random() < 0.5}.get(kind)


def _number(spec: Mapping[str, Any], rng: random.Random, *, whole: bool) -> float:
    """A number within minimum and maximum, exclusive ones too, on a multiple of multipleOf; small where unbounded."""
    step = spec.get("multipleOf", 1 if whole else 0.5)
    low, high = spec.get("minimum"), spec.get("maximum")
    if isinstance(edge := spec.get("exclusiveMinimum"), int | float) and not isinstance(edge, bool):
        low = edge + step if low is None else max(low, edge + step)
    if isinstance(edge := spec.get("exclusiveMaximum"), int | float) and not isinstance(edge, bool):
        high = edge - step if high is None else min(high, edge - step)
    if low is None:
        low = 1 if high is None or high >= 1 else high - 9 * step
    high = low + 9 * step if high is None else min(high, low + 99 * step)
    first, last = -(-low // step), high // step
    if last < first:  # the bounds hold no multiple of the step: a number between them will do
        return low if not whole else int(-(-low // 1))
    drawn = rng.randint(int(first), int(last)) * step
    return int(drawn) if whole else float(drawn)


def _string(spec: Mapping[str, Any], name: str, rng: random.Random) -> str:
    """A string of the length allowed: by format, by the property's name, else a few words."""
    kind = spec.get("format")
    snake = re.sub(r"(?<=[a-z0-9])([A-Z])", r"_\1", name).lower()
    if kind not in _FORMATS:
        kind = next((form for pattern, form in _NAMES if re.search(pattern, snake)), None)
    text = _FORMATS[kind](rng) if kind else " ".join(rng.sample(_WORDS, 3))
    low, high = int(spec.get("minLength", 0)), spec.get("maxLength")
    text = (text + " " + " ".join(rng.choices(_WORDS, k=low)))[:low] if len(text) < low else text
    text = text if high is None else text[: int(high)]
    pattern = spec.get("pattern")
    if isinstance(pattern, str):
        fits = (t for t in (text, *_PATTERN_TRIES) if low <= len(t) <= (high or len(t)) and re.search(pattern, t))
        text = next(fits, text)
    return text
