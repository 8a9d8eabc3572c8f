"""Which earlier replies a request reads, found by content: all that is known of an agent that keeps its messages itself. Pure."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from fanmark.loadgen.lanes.sse import Chunks, events

SHORT = 12  # characters: a reply of fewer counts where it is a line of its own, for it may stand in any text by chance


class Said(NamedTuple):
    """What call number `call` replied: a text for each choice, and the ids of the tool calls that it asked for."""

    call: int
    texts: list[str]
    ids: list[str]


class _ToolCall(msgspec.Struct):
    id: str | None = None


class _Message(msgspec.Struct):
    content: str | None = None
    tool_calls: list[_ToolCall] | None = None


class _Choice(msgspec.Struct):
    index: int = 0
    message: _Message | None = None
    delta: _Message | None = None
    text: str | None = None


class _Reply(msgspec.Struct):
    choices: list[_Choice] = []


def said_in(call: int, body: Chunks, *, stream: bool) -> Said:
    """What a body says, which is known to be a whole reply."""
    parts = [data for _, data in events(body)] if stream else [b"".join([data for _, data in body])]
    texts: dict[int, list[str]] = {}
    ids: list[str] = []
    for part in parts:
        if part.strip() == b"[DONE]":
            continue
        try:
            choices = msgspec.json.decode(part, type=_Reply).choices
        except msgspec.ValidationError:  # of a form that nobody quotes
            continue
        for choice in choices:
            message = choice.message or choice.delta or _Message()
            texts.setdefault(choice.index, []).append(choice.text or message.content or "")
            ids += [asked.id for asked in message.tool_calls or () if asked.id]
    return Said(call, [text for text in ("".join(found).strip() for found in texts.values()) if text], ids)


def texts_read(request: Mapping[str, Any]) -> list[str]:
    """All texts of a request's prompt, and the ids of tool calls in it."""
    prompt = request.get("prompt", [])
    found = [prompt] if isinstance(prompt, str) else [text for text in prompt if isinstance(text, str)]
    for message in request.get("messages", ()):
        content = message.get("content")
        if isinstance(content, str):
            found.append(content)
        elif isinstance(content, list):
            found += [part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)]
        found += [asked["id"] for asked in message.get("tool_calls") or () if isinstance(asked.get("id"), str)]
    return found


def depends_on(said: Iterable[Said], read: Sequence[str]) -> list[int]:
    """The numbers of the calls whose replies stand in what is read."""
    lines = {line.strip() for text in read for line in text.splitlines()}
    return [
        one.call
        for one in said
        if any(id in lines for id in one.ids) or any(_stands(text, read, lines) for text in one.texts)
    ]


def _stands(text: str, read: Sequence[str], lines: set[str]) -> bool:
    return text in lines if len(text) < SHORT else any(text in other for other in read)
