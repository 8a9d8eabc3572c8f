"""Arguments drawn from a schema are valid by that schema, and are what real servers take."""

from __future__ import annotations

import random
import re
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]

from fanmark.loadgen.lanes.arguments import arguments_for
from fanmark.servers.tool_specs import TOOLS, ToolSpec


def is_valid(schema: dict[str, Any], arguments: Any) -> bool:
    return bool(Draft202012Validator(schema).is_valid(arguments))


@pytest.mark.parametrize("spec", TOOLS, ids=lambda spec: spec.name)
def test_embedded_tools_take_what_is_drawn_for_them(spec: ToolSpec) -> None:
    schema = dict(spec.input_schema)
    Draft202012Validator.check_schema(schema)
    drawn = [arguments_for(schema, random.Random(i)) for i in range(200)]
    assert all(is_valid(schema, arguments) for arguments in drawn)
    assert {frozenset(arguments) for arguments in drawn} == {frozenset(schema["required"])}


def test_the_same_seed_draws_the_same_arguments_and_others_differ() -> None:
    schema = dict(TOOLS[0].input_schema)
    drawn = [arguments_for(schema, random.Random(i))["query"] for i in (1, 1, 2, 3, 4)]
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) > 1


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        pytest.param({"const": 5}, "5", id="const"),
        pytest.param({"enum": ["only"]}, "only", id="enum"),
        pytest.param({"type": "string", "default": "d"}, "d", id="default before type"),
        pytest.param({"type": "string", "examples": ["e"]}, "e", id="example"),
        pytest.param({"type": ["null", "boolean"]}, "True|False", id="the first type that is not null"),
        pytest.param({"anyOf": [{"type": "null"}, {"const": "x"}]}, "x", id="the first choice that is not null"),
        pytest.param({"allOf": [{"type": "integer"}, {"minimum": 4, "maximum": 4}]}, "4", id="all parts hold"),
        pytest.param({"$ref": "#/$defs/zone"}, "UTC", id="reference"),
        pytest.param({"type": "integer", "minimum": 7}, r"[7-9]|1[0-6]", id="only a minimum"),
        pytest.param({"type": "integer", "maximum": -2}, r"-([2-9]|1[01])", id="only a maximum"),
        pytest.param({"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 2}, "1", id="exclusive bounds"),
        pytest.param({"type": "number", "multipleOf": 0.25, "minimum": 0.3, "maximum": 0.6}, "0.5", id="multiple"),
        pytest.param({"type": "string", "maxLength": 3}, ".{3}", id="cut to the greatest length"),
        pytest.param({"type": "string", "minLength": 90}, "(?s).{90}", id="filled to the least length"),
        pytest.param({"type": "string", "pattern": r"^\d{4}$"}, "1234", id="pattern"),
        pytest.param({"type": "string", "format": "date"}, r"2026-03-\d\d", id="date"),
        pytest.param({"type": "array", "items": {"const": 1}, "minItems": 2}, r"\[1, 1\]", id="array"),
        pytest.param({"type": "array", "maxItems": 0}, r"\[\]", id="array that must be empty"),
        pytest.param({"properties": {"a": {"const": 1}}, "required": ["a"]}, r"\{'a': 1\}", id="nested object"),
        pytest.param({}, r"\w+ \w+ \w+", id="anything goes"),
        pytest.param(True, r"\w+ \w+ \w+", id="boolean schema"),
    ],
)
def test_value_of_one_property(schema: Any, expected: str) -> None:
    whole = {
        "type": "object",
        "properties": {"it": schema, "optional": {"type": "string"}},
        "required": ["it"],
        "$defs": {"zone": {"const": "UTC"}},
    }
    arguments = arguments_for(whole, random.Random(3))
    assert list(arguments) == ["it"]
    assert re.fullmatch(expected, str(arguments["it"])), arguments
    assert is_valid(whole, arguments)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("timezone", "UTC"),
        ("source_timezone", "UTC"),
        ("timeZone", "UTC"),
        ("time", r"([01]\d|2[0-3]):[0-5]\d"),
        ("startDate", r"2026-03-\d\d"),
        ("url", r"https://example\.com/.*"),
        ("filePath", r"\."),
        ("expression", r"\d+ \* \d+"),
        ("lifetime", r"\w+ \w+ \w+"),
    ],
)
def test_strings_look_like_what_their_name_says(name: str, expected: str) -> None:
    schema = {"type": "object", "properties": {name: {"type": "string"}}, "required": [name]}
    assert re.fullmatch(expected, arguments_for(schema, random.Random(1))[name])
    assert ZoneInfo("UTC").key == "UTC"


@pytest.mark.parametrize("schema", [{}, {"type": "object"}, {"type": "object", "properties": {}}, {"type": "string"}])
def test_a_tool_without_arguments_gets_none(schema: dict[str, Any]) -> None:
    assert arguments_for(schema, random.Random(1)) == {}


def test_a_schema_that_contains_itself_ends() -> None:
    node = {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}, "required": ["next"]}
    schema = {"$ref": "#/$defs/node", "$defs": {"node": node}}
    assert "next" in arguments_for(schema, random.Random(1))
    assert arguments_for({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, random.Random(1)) == {}


def bounded(kind: str, low_key: str, high_key: str, low: int, width: int) -> dict[str, Any]:
    return {"type": kind, low_key: low, high_key: low + width}


LEAVES = st.one_of(
    st.builds(lambda a, w: bounded("integer", "minimum", "maximum", a, w), st.integers(-500, 500), st.integers(0, 50)),
    st.builds(lambda a, w: bounded("number", "minimum", "maximum", a, w), st.integers(-500, 500), st.integers(0, 50)),
    st.builds(lambda a, w: bounded("string", "minLength", "maxLength", a, w), st.integers(0, 80), st.integers(0, 80)),
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.lists(st.integers() | st.text(max_size=5), min_size=1, max_size=3).map(lambda values: {"enum": values}),
)
NAMES = st.sampled_from(["a", "time", "timezone", "path", "url", "date", "query"])


def objects(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    properties = st.dictionaries(NAMES, inner, max_size=4)
    return properties.map(
        lambda p: {"type": "object", "properties": p, "required": list(p), "additionalProperties": False}
    )


def arrays(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.builds(
        lambda items, low, width: {**bounded("array", "minItems", "maxItems", low, width), "items": items},
        inner,
        st.integers(0, 3),
        st.integers(0, 2),
    )


@given(objects(st.recursive(LEAVES, lambda inner: objects(inner) | arrays(inner), max_leaves=8)), st.integers())
def test_any_schema_of_these_parts_is_met(schema: dict[str, Any], seed: int) -> None:
    arguments = arguments_for(schema, random.Random(seed))
    assert is_valid(schema, arguments), arguments
