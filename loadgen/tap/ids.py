"""By which of its ids a request is grouped. Pure: headers and fields in, names out, in the order in which they count.

A name is `whole` where it names one query; else it names a session, of which each user turn is a query.
"""

from collections.abc import Mapping
from typing import NamedTuple
from urllib.parse import unquote

OWN_HEADER = "x-fanmark-query"
METHODS = ("header", "baggage", "traceparent", "session", "metadata", "prompt_cache_key", "user", "content", "none")
SESSION_HEADERS = (
    "x-session-id", "session-id", "session_id", "x-conversation-id", "conversation-id", "conversation_id", "x-thread-id", "thread-id",
    "x-chat-id", "x-litellm-session-id", "x-litellm-trace-id", "helicone-session-id", "langfuse-session-id", "x-claude-code-session-id",
    "x-openwebui-chat-id",
)  # fmt: skip
_SESSION_BAGGAGE = ("session.id", "gen_ai.conversation.id", "conversation.id", "thread.id", "langfuse.session.id")
_QUERY_BAGGAGE = ("fanmark.run", "fanmark.arm", "fanmark.query")
_METADATA = (
    "metadata.session_id", "metadata.session", "litellm_session_id", "metadata.litellm_session_id", "conversation",
    "metadata.conversation_id", "metadata.thread_id",
)  # fmt: skip
RETRY_HEADER = "x-stainless-retry-count"


class Name(NamedTuple):
    """What groups a request, and by which method it is known."""

    method: str
    key: str
    whole: bool


def names(headers: Mapping[str, str], ids: Mapping[str, str]) -> list[Name]:
    """All names of a request, those that count most first. `headers` by name in lower case, `ids` as in Asked."""
    found: list[Name] = []
    if own := headers.get(OWN_HEADER):
        found.append(Name("header", own, True))
    baggage = _baggage(headers.get("baggage", ""))
    if baggage.keys() >= set(_QUERY_BAGGAGE):
        found.append(Name("baggage", "/".join(baggage[name] for name in _QUERY_BAGGAGE), True))
    else:
        found += [Name("baggage", baggage[name], False) for name in _SESSION_BAGGAGE if name in baggage][:1]
    if (trace := _trace(headers.get("traceparent", ""))) is not None:
        found.append(Name("traceparent", trace, True))
    found += [Name("session", headers[name], False) for name in SESSION_HEADERS if headers.get(name)][:1]
    found += [Name("metadata", ids[name], False) for name in _METADATA if name in ids][:1]
    if "prompt_cache_key" in ids:
        found.append(Name("prompt_cache_key", ids["prompt_cache_key"], False))
    found += [Name("user", ids[name], False) for name in ("user", "metadata.user_id") if name in ids][:1]
    return found


def retries(headers: Mapping[str, str]) -> int:
    """How often an SDK has sent this request before."""
    told = headers.get(RETRY_HEADER, "")
    return int(told) if told.isascii() and told.isdecimal() and len(told) < 4 else 0


def _baggage(value: str) -> dict[str, str]:
    """The members of a W3C baggage header, without their properties."""
    found = {}
    for member in value.split(","):
        name, sign, rest = member.partition("=")
        if sign and (said := unquote(rest.partition(";")[0].strip())):
            found[name.strip()] = said
    return found


def _trace(value: str) -> str | None:
    """The trace id of a traceparent header, where it is one."""
    parts = value.strip().split("-")
    if len(parts) < 4 or len(parts[1]) != 32 or set(parts[1]) <= {"0"} or not set(parts[1]) <= set("0123456789abcdef"):
        return None
    return parts[1]
