"""What a tool server, its tools and a tool call are to their callers, whatever carries the call."""

import asyncio
import re
import shlex
import ssl
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from fanmark.loadgen.errors import CallError, UnreachableError
from fanmark.loadgen.redaction import Secrets

FIRST_BACKOFF_S, LAST_BACKOFF_S = 0.1, 5.0
KEEP_ALIVE_S = 60  # below the 75 s of our own server: the side that reuses a connection must let go of it first
MAX_PAGES = 1_000


class ToolServerError(UnreachableError):
    """A tool server did not start: which one, why, and the last lines that it wrote."""


class ToolTransportError(CallError):
    """A tool call had no answer: connection refused or lost, server gone, or out of time."""

    def __init__(self, message: str) -> None:
        super().__init__("tool_transport", message)


class NotConnectedError(ToolTransportError):
    """Nobody listens: nothing was sent, so it may be tried again."""


class ToolRefusedError(ToolTransportError):
    """The server wants another key than it was shown, or one at all: HTTP 401 or 403."""


class ToolProtocolError(CallError):
    """A tool call was answered by a JSON-RPC error, or by what the protocol does not allow."""

    def __init__(self, message: str) -> None:
        super().__init__("tool_protocol", message)


@dataclass(frozen=True)
class ToolServerSpec:
    """One server: exactly one of `url` (streamable HTTP) and `command` (program and arguments, stdio). `headers` go with every request,
    `env` into the process; none of `secrets` is in any error or result. `key_hint`: the mend where the server lets nobody in."""

    url: str | None = None
    command: Sequence[str] | None = None
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    tls: ssl.SSLContext | bool = True
    secrets: Secrets = field(default_factory=Secrets, repr=False)
    key_hint: str = "give it a key"

    def __post_init__(self) -> None:
        if (self.url is None) == (not self.command):
            raise ValueError("a tool server needs either a url or a command")

    @property
    def name(self) -> str:
        """How messages call it: the URL, or the command line."""
        return self.url if self.url is not None else shlex.join(self.command or ())

    @property
    def label(self) -> str:
        """A short name out of letters, digits, `_` and `-`: host and port, or the program."""
        text = re.sub(r"^\w+://|/.*$", "", self.url) if self.url is not None else Path((self.command or [""])[0]).name
        return re.sub(r"[^A-Za-z0-9_-]+", "_", text)


@dataclass(frozen=True, slots=True)
class RemoteTool:
    """A tool as its server lists it."""

    name: str
    description: str
    input_schema: dict[str, Any]
    read_only: bool


@dataclass(frozen=True)
class Tool:
    """A tool as a prompt may show it. `name` is unique among all servers and fits OpenAI's rule for function names."""

    name: str
    description: str
    input_schema: dict[str, Any]
    read_only: bool
    server: str
    remote_name: str


@dataclass(frozen=True)
class ToolResult:
    """`text`: the contents, a line break between; what is not text as its JSON. `bytes`: its size in UTF-8. `queued_s`: how long the
    server kept the call waiting, where it says so."""

    text: str
    is_error: bool
    bytes: int
    queued_s: float | None = None


def loop_time() -> float:
    """The running loop's time."""
    return asyncio.get_running_loop().time()


@dataclass(slots=True)
class Trip:
    """One tool call while it is under way; what is filled in stands even if the call fails. `query` and `agent`: who makes it; `trace`: the
    headers that join it to its query; `reconnect_s`: how long it waits for a server that does not listen; `session_s`: how long it waited
    for its session (None: it was open), which it opened itself or not."""

    query: Hashable = None
    agent: Hashable = None
    trace: Mapping[str, str] = field(default_factory=dict)
    now: Callable[[], float] = loop_time
    reconnect_s: float = 0.0
    tool: str | None = None
    sent_at: float | None = None
    session_s: float | None = None
    opened_session: bool = False


class Connection(Protocol):
    """One client of one server. Calls may be made at once and from any task; none costs another."""

    @property
    def tools(self) -> Sequence[RemoteTool]:
        """What the first listing gave."""

    async def start(self, timeout_s: float) -> None:
        """One attempt to connect and to list the tools. Raises ToolTransportError, ToolProtocolError, TimeoutError."""

    async def call(
        self, tool: RemoteTool, arguments: Mapping[str, Any], timeout_s: float, meta: Mapping[str, Any], trip: Trip
    ) -> ToolResult:
        """`tools/call`. Raises ToolTransportError, ToolProtocolError."""

    def last_lines(self) -> str:
        """What its process wrote last, in the same line; empty where there is none."""

    async def close(self) -> None:
        """Ends the session, and the process where there is one; takes a few seconds at most."""
