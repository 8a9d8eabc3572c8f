"""Replies of OpenAI's Responses and Anthropic's Messages as chunks of a chat completion, so that one parser takes the times and counts of
all. Pure.

Anthropic's `input_tokens` leave out what the cache served and took in: a prompt is all three together.
"""

from collections.abc import Mapping
from typing import Any

import msgspec

from fanmark.loadgen.errors import CallError
from fanmark.loadgen.lanes.sse import Choice, Chunk, Delta, Details, Function, StreamParser, ToolDelta, Usage, Work

_NOTHING = Chunk()
_TEXT = ("response.output_text.delta", "response.refusal.delta")
_THOUGHT = ("response.reasoning_text.delta", "response.reasoning_summary_text.delta")
_ENDED = ("response.completed", "response.incomplete")


def parser_of(api: str) -> tuple[StreamParser, "Responses | Messages | None"]:
    """What reads a stream of this API, and what of it knows the reply's id, where replies have one that is told again."""
    if api not in ("responses", "messages"):
        return StreamParser(), None
    reader = Responses() if api == "responses" else Messages()
    return StreamParser(reader), reader


def whole_reply(api: str, body: bytes) -> tuple[Chunk, str | None]:
    """A reply that was not streamed, and its id. Raises CallError."""
    reader = {"responses": _response, "messages": _message}[api]
    fields = _decoded(body)
    id = fields.get("id")
    return reader(fields), id if isinstance(id, str) else None


def _decoded(data: bytes) -> dict[str, Any]:
    try:
        fields = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
        raise CallError("bad_reply", f"a malformed reply: {e}") from None
    if not isinstance(fields, dict):
        raise CallError("bad_reply", "a reply that is no JSON object")
    return fields


def _of(fields: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = fields.get(name)
    return found if isinstance(found, dict) else {}


def _count(fields: Mapping[str, Any], name: str) -> int | None:
    found = fields.get(name)
    return found if isinstance(found, int) else None


def _chunk(finish: str | None = None, **delta: Any) -> Chunk:
    return Chunk(choices=[Choice(delta=Delta(**delta), finish_reason=finish)])


def _use(index: Any, id: Any, name: Any, arguments: str) -> Chunk:
    place = index if isinstance(index, int) else 0
    return _chunk(tool_calls=[ToolDelta(index=place, id=id, function=Function(name=name, arguments=arguments))])


def _work(usage: Mapping[str, Any]) -> Work | None:
    """What our own stub says that the call took of it."""
    try:
        return msgspec.convert(usage.get("fanmark"), Work | None)
    except msgspec.ValidationError:
        return None


def _usage_of_response(usage: Mapping[str, Any]) -> Usage | None:
    read, written = _count(usage, "input_tokens"), _count(usage, "output_tokens")
    if read is None or written is None:
        return None
    cached = _count(_of(usage, "input_tokens_details"), "cached_tokens")
    reasoning = _count(_of(usage, "output_tokens_details"), "reasoning_tokens")
    return Usage(
        read, written,
        None if cached is None else Details(cached_tokens=cached),
        None if reasoning is None else Details(reasoning_tokens=reasoning),
        _work(usage),
    )  # fmt: skip


class Responses:
    """The events of a streamed Response, one after another. `id` is the response's, once it is known; `finish` is told at its very end."""

    def __init__(self) -> None:
        self.id: str | None = None
        self.finish: str | None = None

    def __call__(self, data: bytes) -> Chunk:
        event = _decoded(data)
        kind, delta = event.get("type"), event.get("delta")
        if kind in _TEXT and isinstance(delta, str):
            return _chunk(content=delta)
        if kind in _THOUGHT and isinstance(delta, str):
            return _chunk(reasoning=delta)
        if kind == "response.function_call_arguments.delta" and isinstance(delta, str):
            return _use(event.get("output_index"), None, None, delta)
        if kind == "response.output_item.added" and (item := _of(event, "item")).get("type") == "function_call":
            return _use(event.get("output_index"), item.get("call_id"), item.get("name"), "")
        if kind == "response.output_item.done":
            return Chunk(
                choices=[
                    Choice(finish_reason="tool_calls" if _of(event, "item").get("type") == "function_call" else "stop")
                ]
            )
        if kind == "response.created":
            id = _of(event, "response").get("id")
            self.id = id if isinstance(id, str) else None
            return Chunk(choices=[Choice(finish_reason="stop")])  # unless an item or the end says otherwise
        if kind in _ENDED:
            if kind == "response.incomplete" or _of(event, "response").get("status") == "incomplete":
                self.finish = "length"
            return Chunk(usage=_usage_of_response(_of(_of(event, "response"), "usage")))
        if kind in ("error", "response.failed"):
            raise CallError("bad_reply", "an error in place of a reply")
        return _NOTHING


def _response(fields: Mapping[str, Any]) -> Chunk:
    texts, uses = [], list[ToolDelta]()
    output = fields.get("output")
    for item in output if isinstance(output, list) else []:
        if item.get("type") == "function_call":
            function = Function(name=item.get("name"), arguments=item.get("arguments"))
            uses.append(ToolDelta(index=len(uses), id=item.get("call_id"), function=function))
        elif item.get("type") == "message":
            texts += [part.get("text", "") for part in item.get("content", ()) if isinstance(part, dict)]
    said = Delta(content="".join(texts), tool_calls=uses or None)
    finish = "tool_calls" if uses else "length" if fields.get("status") == "incomplete" else "stop"
    return Chunk(choices=[Choice(message=said, finish_reason=finish)], usage=_usage_of_response(_of(fields, "usage")))


def _usage_of_message(usage: Mapping[str, Any], written: int | None) -> Usage | None:
    read = _count(usage, "input_tokens")
    if read is None:
        return None
    cached, kept = _count(usage, "cache_read_input_tokens"), _count(usage, "cache_creation_input_tokens")
    details = None if cached is None else Details(cached_tokens=cached)
    return Usage(read + (cached or 0) + (kept or 0), written or 0, details, None, _work(usage))


_FINISH = {"end_turn": "stop", "stop_sequence": "stop", "max_tokens": "length", "tool_use": "tool_calls"}


class Messages:
    """The events of a streamed Message, one after another. Its id is never told again."""

    id: str | None = None
    finish: str | None = None

    def __init__(self) -> None:
        self._usage: dict[str, Any] = {}

    def __call__(self, data: bytes) -> Chunk:
        event = _decoded(data)
        kind, delta, index = event.get("type"), _of(event, "delta"), event.get("index")
        if kind == "message_start":
            self._usage = _of(_of(event, "message"), "usage")
        elif kind == "content_block_start" and (block := _of(event, "content_block")).get("type") == "tool_use":
            return _use(index, block.get("id"), block.get("name"), "")
        elif kind == "content_block_delta":
            if "text" in delta:
                return _chunk(content=delta["text"])
            if "thinking" in delta:
                return _chunk(reasoning=delta["thinking"])
            if "partial_json" in delta:
                return _use(index, None, None, delta["partial_json"])
        elif kind == "message_delta":
            self._usage = self._usage | {k: v for k, v in _of(event, "usage").items() if v is not None}
            reason = delta.get("stop_reason")
            return Chunk(choices=[Choice(finish_reason=_FINISH.get(str(reason), reason))])
        elif kind == "message_stop":
            return Chunk(usage=_usage_of_message(self._usage, _count(self._usage, "output_tokens")))
        elif kind == "error":
            raise CallError("bad_reply", "an error in place of a reply")
        return _NOTHING


def _message(fields: Mapping[str, Any]) -> Chunk:
    texts, uses = [], list[ToolDelta]()
    content = fields.get("content")
    for block in content if isinstance(content, list) else []:
        if block.get("type") == "tool_use":
            function = Function(name=block.get("name"), arguments=msgspec.json.encode(block.get("input", {})).decode())
            uses.append(ToolDelta(index=len(uses), id=block.get("id"), function=function))
        elif block.get("type") == "text":
            texts.append(block.get("text", ""))
    usage = _of(fields, "usage")
    reason = fields.get("stop_reason")
    said = Delta(content="".join(texts), tool_calls=uses or None)
    return Chunk(
        choices=[Choice(message=said, finish_reason=_FINISH.get(reason, reason) if isinstance(reason, str) else None)],
        usage=_usage_of_message(usage, _count(usage, "output_tokens")),
    )
