"""What is drawn by a schema is valid by that schema, judged by the jsonschema package."""

import json
import re
from random import Random
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fanmark.servers.json_schema import SchemaError, draw_matching, draw_value

WORDS = ["ocean", "tree", "of", "the", "machine", "seven"]

SCHEMAS: list[dict[str, Any]] = [
    {"type": "object", "properties": {"city": {"enum": ["Oslo", "Bern"]}, "days": {"type": "integer", "minimum": 0, "maximum": 9}},
     "required": ["city", "days"], "additionalProperties": False},
    {"type": "object", "properties": {"q": {"type": "string", "maxLength": 3}}, "required": ["q"]},
    {"type": "array", "items": {"type": "number", "exclusiveMinimum": 0, "maximum": 1}, "minItems": 3, "maxItems": 5},
    {"type": "array", "items": {"enum": [1, 2, 3]}, "minItems": 3, "uniqueItems": True},
    {"anyOf": [{"type": "null"}, {"type": "string", "minLength": 30}]},
    {"type": ["integer", "null"], "minimum": 1000},
    {"type": "integer", "multipleOf": 7, "minimum": 15},
    {"type": "number", "multipleOf": 0.5, "minimum": 0.2, "maximum": 0.9},
    {"type": "integer", "maximum": -5},
    {"type": "integer", "exclusiveMinimum": 3, "exclusiveMaximum": 5},
    {"type": "string", "pattern": "^[A-Z]{2}-\\d{3,4}(x|y)?$"},
    {"type": "string", "format": "date"},
    {"$defs": {"node": {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
                        "required": ["next"]}}, "$ref": "#/$defs/node"},
    {"allOf": [{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
               {"properties": {"b": {"const": 4}}, "required": ["b"]}]},
    {"type": "object", "minProperties": 3},
    {"type": "object", "required": ["x"], "additionalProperties": {"type": "boolean"}},
    {"prefixItems": [{"const": 1}, {"type": "string"}], "type": "array", "minItems": 2, "maxItems": 2},
    {"const": {"a": [1]}},
    {"type": "boolean"},
    {},
]  # fmt: skip


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: json.dumps(schema)[:50])
def test_every_drawn_value_is_valid(schema: dict[str, Any]) -> None:
    for seed in range(40):
        jsonschema.validate(draw_value(schema, Random(seed), WORDS), schema)


BROKEN: list[tuple[Any, str]] = [
    ({"type": "nonsense"}, 'Unsupported type "nonsense"'),
    ({"enum": []}, "enum must be a list that is not empty"),
    ({"$ref": "#/$defs/gone"}, "the reference '#/$defs/gone' leads nowhere"),
    ({"$ref": "#"}, "the schema has no finite value: its references go round"),
    ({"type": "string", "pattern": "["}, "is not a regular expression"),
    ({"type": "string", "minLength": 3, "maxLength": 2}, "minLength 3 is above maxLength 2"),
    ({"type": "integer", "minimum": 3, "maximum": 2}, "no integer lies between"),
    (False, "no value is valid by false"),
]


@pytest.mark.parametrize(("schema", "why"), BROKEN)
def test_what_cannot_be_drawn_says_why(schema: Any, why: str) -> None:
    with pytest.raises(SchemaError, match=re.escape(why)):
        draw_value(schema, Random(1), WORDS)


@given(st.integers(0, 10_000))
def test_text_matches_its_pattern(seed: int) -> None:
    for pattern in (r"[a-c]{5}", r"(ab|cd)+\d*", r"[^\s\"]{2,}", r"(\w)x\1", r"a?b+?.\."):
        assert re.fullmatch(pattern, draw_matching(pattern, Random(seed)))


def test_equal_seeds_draw_equal_values() -> None:
    assert draw_value(SCHEMAS[0], Random(5), WORDS) == draw_value(SCHEMAS[0], Random(5), WORDS)
