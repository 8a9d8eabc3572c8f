"""Which tools the next reply calls: by `tool_choice`, and where it leaves that to the model, by number or by script. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fanmark.servers.body_fields import bad_value, extra_int


@dataclass(frozen=True, slots=True)
class Tooling:
    """Tools that a reply must call: the candidates (name, JSON Schema), how many calls, and whether one was named."""

    candidates: Sequence[tuple[str, Mapping[str, Any]]]
    calls: int
    named: bool


def tooling_of(
    body: Mapping[str, Any],
    tools: Sequence[Any],
    messages: Sequence[Mapping[str, Any]],
    auto_calls: int,
    *,
    scripted: bool,
) -> Tooling | None:
    """The calls of the next reply, or None: it answers. Raises ApiError where `tool_choice` and `tools` do not fit."""
    choice = body.get("tool_choice")
    if choice not in (None, "none") and not tools:
        raise bad_value("When using `tool_choice`, `tools` must be set. (parameter=tool_choice)", "tool_choice")
    known: list[tuple[str, Mapping[str, Any]]] = []
    for tool in tools:
        function = tool.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise bad_value("Each of `tools` must be a function with a name. (parameter=tools)", "tools")
        known.append((function["name"], function.get("parameters") or {"type": "object", "properties": {}}))
    if choice == "none" or not tools:
        return None
    if scripted and choice in (None, "auto", "required"):
        return _scripted(known, messages, must=choice == "required")
    per_turn = 1 if body.get("parallel_tool_calls") is False else max(1, extra_int(body, "tools_per_turn", 1))
    if choice == "required":
        return Tooling(known, per_turn, named=False)
    if choice in (None, "auto"):
        done = sum(message.get("role") == "tool" for message in messages)
        left = extra_int(body, "tool_calls", auto_calls) - done
        return Tooling(known, min(left, per_turn), named=False) if left > 0 else None
    function = choice.get("function") if isinstance(choice, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise bad_value(
            "`tool_choice` must be none, auto, required or a named function. (parameter=tool_choice)", "tool_choice"
        )
    named = [(name, schema) for name, schema in known if name == function["name"]]
    if not named:
        text = "The tool specified in `tool_choice` does not match any of the specified `tools` (parameter=tool_choice)"
        raise bad_value(text, "tool_choice")
    return Tooling(named, 1, named=True)


def _scripted(
    tools: Sequence[tuple[str, Mapping[str, Any]]], messages: Sequence[Mapping[str, Any]], *, must: bool
) -> Tooling | None:
    """The n-th turn calls the n-th tool from the end, with what it requires alone and a sentence for each text. After the first one of
    the list it answers, or calls that one again if it must: frameworks that ask for a call each time offer their end first."""
    turn = sum(message.get("role") == "assistant" for message in messages)
    if turn >= len(tools) and not must:
        return None
    name, schema = tools[max(0, len(tools) - 1 - turn)]
    required = schema.get("required") or []
    parts = {key: part for key, part in (schema.get("properties") or {}).items() if key in required}
    told = {key: {"minLength": 60, **part} if part.get("type") == "string" else part for key, part in parts.items()}
    return Tooling([(name, {**schema, "properties": told})], 1, named=False)
