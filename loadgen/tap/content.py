"""What requests and replies show of who waited for whom: the same texts, found again. Pure.

1. A request extends an earlier one if all messages of that stand first in it, the system's apart, for another agent may take over. What
   follows, its reply apart, is new. Frameworks write an earlier turn anew: texts are compared without the white space around them, tool
   calls by name and parsed arguments, and a reply that became a text by its calls' ids.
2. A reply, or a tool's result, is read where it stands in a message: as the message, or, if it is long enough not to stand there by
   chance, within it.
3. A tool call that a reply asks for is open until its result is told. What another agent is first told, and is an argument of an open one
   or holds it, was handed over by it.
"""

from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import Any

import msgspec

from fanmark.agents.runtime import ToolAsk
from fanmark.loadgen.quoting import SHORT
from fanmark.loadgen.tap.asked import Said

_in_order = msgspec.json.Encoder(order="deterministic")
AS_USER = (
    "Observation:",
    "<tool_response>",
    "Call id:",
    "Tool output",
    "Tool result",
)  # a result in a user's words begins so
HANDED = 16  # characters: an argument of so many stands in another text by no chance


def chain(messages: Iterable[Said]) -> list[bytes]:
    """A digest of the messages up to each one."""
    digest, found = blake2b(digest_size=16), []
    for message in messages:
        calls = [[ask.name, _parsed(ask)] for ask in message.asks]
        digest.update(_in_order.encode([message.role, message.text.strip(), calls]))
        found.append(digest.copy().digest())
    return found


def of_system(messages: Iterable[Said]) -> str:
    """What the system says of who is asked."""
    return "\n".join(message.text for message in messages if message.role == "system")


def spoken(messages: Iterable[Said]) -> list[Said]:
    """The conversation: all but the system's words and the tools' schemas."""
    return [message for message in messages if message.role not in ("system", "tools")]


def call_ids(messages: Iterable[Said]) -> list[str]:
    """The ids of the tool calls that are told of."""
    return [id for message in messages for id in (*(ask.id for ask in message.asks), message.answers) if id]


def stands(text: str, message: str) -> bool:
    """Whether a reply stands in a message."""
    return text == message or (len(text) >= SHORT and text in message)


def _parsed(ask: ToolAsk) -> Any:
    try:
        return msgspec.json.decode(ask.arguments) if ask.arguments else {}
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ask.arguments


def texts_of(ask: ToolAsk) -> list[str]:
    """The texts among a tool call's arguments."""
    return [text.strip() for text in _leaves(_parsed(ask)) if text.strip()]


def says(text: str, asks: Iterable[ToolAsk]) -> list[str]:
    """What of a reply may be read again: its text, and what its tool calls say, for some agents give their answer by one."""
    return [text] * bool(text) + [each for ask in asks for each in texts_of(ask) if len(each) >= HANDED]


def _leaves(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _leaves(each)
    elif isinstance(value, list):
        for each in value:
            yield from _leaves(each)


def handed_over(ask: ToolAsk, told: str) -> bool:
    """Whether what an agent is first told is what this tool call says."""
    return any(text == told or (len(text) >= HANDED and text in told) for text in texts_of(ask))


def first_told(messages: Sequence[Said]) -> str:
    """What an agent is first told: its first message that is not the system's."""
    return next((m.text.strip() for m in messages if m.role == "user"), "")


def same_call(ask: ToolAsk, tool: str, arguments: Mapping[str, Any]) -> bool:
    """Whether a tool call is the one that a reply asked for; frameworks put a server's name before a tool's."""
    return (ask.name == tool or ask.name.endswith(tool)) and _parsed(ask) == arguments


def new_turn(added: Sequence[Said], told: Iterable[str]) -> bool:
    """Whether what a request adds to an earlier one, whose reply asked for no tool, is a user's next turn: it ends with a user's message
    that is no tool's result, in no form, and in which nothing stands that was `told` in the query."""
    last = added[-1] if added else None
    if last is None or last.role != "user" or any(message.role == "tool" for message in added):
        return False
    text = last.text.strip()
    return not text.startswith(AS_USER) and not any(stands(each, text) for each in told)
