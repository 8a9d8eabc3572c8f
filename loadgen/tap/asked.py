"""What a request says, whichever of four APIs it is written in: its messages one by one, and the ids that group it. Pure.

A message is a text by somebody, or a tool's result, or a reply with the tool calls that it asked for. What is of no known form is passed
over: the request is the client's, and its server will say what is wrong with it.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import msgspec

from fanmark.agents.runtime import ToolAsk

_BODY_IDS = ("litellm_session_id", "prompt_cache_key", "user")
_METADATA_IDS = ("session_id", "session", "litellm_session_id", "conversation_id", "thread_id", "user_id")


class Said(NamedTuple):
    """One message of a prompt. `role` is system, user, assistant or tool, and "tools" for the tools' schemas; `answers` is the id of the
    tool call that a result belongs to."""

    role: str
    text: str
    asks: tuple[ToolAsk, ...] = ()
    answers: str | None = None

    @property
    def content(self) -> str:
        """All of it that is in the prompt: ids of tool calls, which some agents make anew, are not."""
        return (
            "\n".join([self.text, *(f"{ask.name}({ask.arguments})" for ask in self.asks)]) if self.asks else self.text
        )


class Asked(NamedTuple):
    """One request. `ids` are the fields of its body that may group it, `previous` the reply that it goes on from, by its id."""

    model: str | None
    messages: list[Said]
    ids: Mapping[str, str]
    previous: str | None = None
    samples: int = 1
    stream: bool = False


def asked_of(api: str, body: bytes) -> Asked | None:
    """What a body says; None where it is no JSON object."""
    try:
        fields = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    if not isinstance(fields, dict):
        return None
    read = {"chat": _chat, "completions": _completions, "responses": _responses, "messages": _anthropic}[api]
    messages = list(read(fields))
    if tools := fields.get("tools"):
        messages.insert(0, Said("tools", msgspec.json.encode(tools).decode()))
    samples = fields.get("n")
    return Asked(
        _text(fields.get("model")),
        messages,
        _ids(fields),
        _text(fields.get("previous_response_id")),
        samples if isinstance(samples, int) and samples > 1 else 1,
        fields.get("stream") is True,
    )


def ids_text(ids: list[int]) -> str:
    """Token ids as a text in which those of a reply can be found."""
    return f" {' '.join(map(str, ids))} "


def _ids(fields: Mapping[str, Any]) -> dict[str, str]:
    found = {name: value for name in _BODY_IDS if (value := _text(fields.get(name)))}
    metadata = fields.get("metadata")
    if isinstance(metadata, dict):
        found |= {f"metadata.{name}": value for name in _METADATA_IDS if (value := _text(metadata.get(name)))}
    conversation = fields.get("conversation")
    if named := _text(conversation.get("id") if isinstance(conversation, dict) else conversation):
        found["conversation"] = named
    return found


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _parts(content: Any) -> str:
    """The text of a message's content, which may come in parts; of a part that is no text its size alone matters."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return "" if content is None else msgspec.json.encode(content).decode()
    texts = []
    for part in content:
        text = (
            part if isinstance(part, str) else part.get("text", part.get("refusal")) if isinstance(part, dict) else None
        )
        texts.append(text if isinstance(text, str) else msgspec.json.encode(part).decode())
    return "\n".join(texts)


def _objects(value: Any) -> Iterator[Mapping[str, Any]]:
    yield from (each for each in value if isinstance(each, dict)) if isinstance(value, list) else ()


def _function(call: Mapping[str, Any]) -> ToolAsk:
    function = call.get("function")
    function = function if isinstance(function, dict) else {}
    return _ask(call.get("id"), function.get("name"), function.get("arguments"))


def _ask(id: Any, name: Any, arguments: Any) -> ToolAsk:
    written = arguments if isinstance(arguments, str) else msgspec.json.encode(arguments or {}).decode()
    return ToolAsk(_text(id) or "", _text(name) or "", written)


def _chat(fields: Mapping[str, Any]) -> Iterator[Said]:
    for message in _objects(fields.get("messages")):
        role = _text(message.get("role")) or "user"
        asks = tuple(_function(call) for call in _objects(message.get("tool_calls")))
        role = "tool" if role == "function" else "system" if role == "developer" else role
        yield Said(role, _parts(message.get("content")), asks, _text(message.get("tool_call_id")))


def _completions(fields: Mapping[str, Any]) -> Iterator[Said]:
    prompt = fields.get("prompt")
    if isinstance(prompt, str):
        yield Said("user", prompt)
    elif isinstance(prompt, list) and all(isinstance(each, int) for each in prompt):
        yield Said("user", ids_text(prompt))
    elif isinstance(prompt, list):
        for each in prompt:
            yield Said("user", each if isinstance(each, str) else ids_text(each) if isinstance(each, list) else "")


def _responses(fields: Mapping[str, Any]) -> Iterator[Said]:
    if instructions := _text(fields.get("instructions")):
        yield Said("system", instructions)
    given = fields.get("input")
    if isinstance(given, str):
        yield Said("user", given)
        return
    for item in _objects(given):
        kind = item.get("type", "message")
        if kind == "message":
            role = _text(item.get("role")) or "user"
            yield Said("system" if role == "developer" else role, _parts(item.get("content")))
        elif kind == "function_call":
            yield Said("assistant", "", (_ask(item.get("call_id"), item.get("name"), item.get("arguments")),))
        elif kind == "function_call_output":
            yield Said("tool", _parts(item.get("output")), (), _text(item.get("call_id")))
        elif kind not in ("reasoning", "item_reference"):
            yield Said("assistant", msgspec.json.encode(item).decode())


def _anthropic(fields: Mapping[str, Any]) -> Iterator[Said]:
    if system := _parts(fields.get("system")):
        yield Said("system", system)
    for message in _objects(fields.get("messages")):
        role, content = _text(message.get("role")) or "user", message.get("content")
        blocks = list(_objects(content))
        results = [block for block in blocks if block.get("type") == "tool_result"]
        for block in results:
            yield Said("tool", _parts(block.get("content")), (), _text(block.get("tool_use_id")))
        uses = tuple(_ask(b.get("id"), b.get("name"), b.get("input")) for b in blocks if b.get("type") == "tool_use")
        told = ("tool_result", "tool_use", "thinking", "redacted_thinking")
        text = _parts([b for b in blocks if b.get("type") not in told]) if blocks else _parts(content)
        if text or uses or not results:
            yield Said(role, text, uses)
