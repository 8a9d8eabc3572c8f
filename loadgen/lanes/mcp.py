"""MCP lane: tool servers by URL (streamable HTTP) or by command (stdio), on the `mcp` SDK.

Rules of the file:
1. An SDK client lives and dies in one task of its own (`_Connection._live`): the SDK's cancel scopes belong to the task
   that entered them, and one failed request ends the whole client. Nobody else enters or leaves it.
2. What a failure costs is the calls in flight on that connection. It is replaced, with back-off; calls made meanwhile
   wait for the attempt that is under way and fail with it.
3. A caller sees ToolTransportError, ToolProtocolError or a result, and CancelledError only if it was cancelled itself:
   each SDK call runs in a task of its own, whose end is translated.
4. A tool's own error (isError) is a result.
"""

import asyncio
import logging
import os
import re
import shlex
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from fanmark.loadgen.errors import CallError, UnreachableError
from fanmark.loadgen.lanes.arguments import arguments_for

if TYPE_CHECKING:
    import httpx2
    from mcp import Client

__all__ = [
    "Tool",
    "ToolProtocolError",
    "ToolResult",
    "ToolServerError",
    "ToolServerSpec",
    "ToolServers",
    "ToolTransportError",
    "arguments_for",
]

FIRST_BACKOFF_S, LAST_BACKOFF_S = 0.1, 5.0
KEEP_ALIVE_S = 60  # below the 75 s of our own server: the side that reuses a connection must let go of it first
CLOSE_S = 5.0
CANCEL_S = 1.0
LAST_LINES = 8
MAX_PAGES = 1_000
# The SDK's words for an HTTP error without JSON-RPC in it, and for status 404 within a session.
HTTP_ERROR, SESSION_ENDED = "Server returned an error response", "Session terminated"


class ToolServerError(UnreachableError):
    """A tool server did not start: which one, why, and the last lines that it wrote."""


class ToolTransportError(CallError):
    """A tool call had no answer: connection refused or lost, server gone, or out of time."""

    def __init__(self, message: str) -> None:
        super().__init__("tool_transport", message)


class ToolProtocolError(CallError):
    """A tool call was answered by a JSON-RPC error, or by what the protocol does not allow."""

    def __init__(self, message: str) -> None:
        super().__init__("tool_protocol", message)


@dataclass(frozen=True)
class ToolServerSpec:
    """One server: exactly one of `url` (streamable HTTP) and `command` (program and arguments, stdio)."""

    url: str | None = None
    command: Sequence[str] | None = None

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
    """`text`: the contents, a line break between; what is not text as its JSON. `bytes`: its size in UTF-8."""

    text: str
    is_error: bool
    bytes: int


def _leaves(error: BaseException) -> list[BaseException]:
    """The exceptions inside nested groups. Iterative: groups nest deeper than Python recurses."""
    found, waiting = [], [error]
    while waiting:
        each = waiting.pop()
        if isinstance(each, BaseExceptionGroup):
            waiting.extend(each.exceptions)
        else:
            found.append(each)
    return found


def _reason(error: BaseException) -> str:
    """One line on an exception or a group of them; CancelledError says nothing and is left out."""
    texts = [
        f"{type(e).__name__}: {e}".rstrip(": ") for e in _leaves(error) if not isinstance(e, asyncio.CancelledError)
    ]
    return "; ".join(dict.fromkeys(" ".join(text.split()) for text in texts)) or "connection lost"


def _text(content: Sequence[Any], structured: Any) -> str:
    """The text of a result's content blocks; a result of structured content alone is its JSON."""
    import json

    if not content and structured is not None:
        return json.dumps(structured, ensure_ascii=False)
    return "\n".join(
        block.text if block.type == "text" else block.model_dump_json(by_alias=True, exclude_none=True)
        for block in content
    )


def _translated(error: BaseException, where: str) -> ToolTransportError | ToolProtocolError:
    """Whose fault an SDK exception is; the one place where foreign exceptions are mapped."""
    import anyio
    import httpx2
    from mcp.shared.exceptions import MCPError
    from mcp_types import CONNECTION_CLOSED

    message = f"{where}: {_reason(error)}"
    if isinstance(error, MCPError):
        is_lost = error.code == CONNECTION_CLOSED or str(error) in (HTTP_ERROR, SESSION_ENDED)
    else:
        lost = (anyio.ClosedResourceError, anyio.BrokenResourceError, httpx2.TransportError, OSError)
        is_lost = any(isinstance(leaf, lost) for leaf in _leaves(error))
    return ToolTransportError(message) if is_lost else ToolProtocolError(message)


@dataclass
class _Connection:
    """The supervised connection to one server."""

    spec: ToolServerSpec
    tools: list[Any] = field(default_factory=list)  # as the SDK has them, from the first listing
    _attempt: "asyncio.Future[Client]" = field(init=False)  # done when there is a client; replaced when it is lost
    _leave: asyncio.Event = field(default_factory=asyncio.Event)  # set to end the client that lives now
    _closing: asyncio.Event = field(default_factory=asyncio.Event)
    _calls: set["asyncio.Task[Any]"] = field(default_factory=set)
    _supervisor: "asyncio.Task[None] | None" = None
    _session_refused: bool = False
    _stderr: IO[bytes] | None = None
    _failure: str = ""  # why the last attempt to connect brought no client

    async def open(self, ready_timeout_s: float) -> None:
        """Connect and list the tools; ToolServerError if that has not worked after `ready_timeout_s`.

        A URL is tried again until then, as its server may be starting; a command that ends is not.
        """
        loop = asyncio.get_running_loop()
        self._attempt = loop.create_future()
        if self.spec.command:
            self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        deadline = loop.time() + ready_timeout_s
        self._supervisor = asyncio.create_task(self._supervise(), name=f"tools {self.spec.name}")
        while True:
            try:
                await self._connected(deadline - loop.time())
                return
            except ToolTransportError:
                if self.spec.url is None or loop.time() >= deadline:
                    reason = self._failure or f"no answer within {ready_timeout_s:g} s"
                    text = f"tool server {self.spec.name} does not start: {reason}{self._last_lines()}"
                    raise ToolServerError(text) from None

    def _last_lines(self) -> str:
        """What the command wrote last on its standard error, in the same line."""
        if self._stderr is None:
            return ""
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").splitlines()[-LAST_LINES:]
        return "".join(f" | {line.strip()}" for line in lines if line.strip())

    async def _supervise(self) -> None:
        """Keep one client alive after the other until `close`."""
        backoff_s = FIRST_BACKOFF_S
        while not self._closing.is_set():
            self._leave.clear()
            attempt = self._attempt
            living = asyncio.create_task(self._live(attempt))
            try:
                await asyncio.wait({living})
            except asyncio.CancelledError:
                living.cancel()
                await asyncio.wait({living})
                if not living.cancelled():
                    living.exception()  # it ends with the connection: how is nobody's business any more
                raise
            self._give_up(attempt)
            error = None if living.cancelled() else living.exception()
            connected = attempt.done()
            if not connected:
                self._failure = "connection lost" if error is None else _reason(error)
                attempt.set_exception(ToolTransportError(f"tool server {self.spec.name}: {self._failure}"))
                attempt.exception()  # nobody may be waiting
            for call in list(self._calls):
                call.cancel()
            with suppress(TimeoutError):
                async with asyncio.timeout(backoff_s):
                    await self._closing.wait()
            backoff_s = FIRST_BACKOFF_S if connected else min(2 * backoff_s, LAST_BACKOFF_S)

    def _give_up(self, attempt: "asyncio.Future[Client]") -> None:
        """End this client if it is still the one in use; calls from now on wait for the next."""
        if self._attempt is attempt:
            self._attempt = asyncio.get_running_loop().create_future()
            self._leave.set()

    async def _live(self, attempt: "asyncio.Future[Client]") -> None:
        """One client from connecting to its end. Lists the tools each time: the SDK checks results against the list."""
        self._session_refused = False
        async with self._connect() as client:
            tools: list[Any] = []
            cursor: str | None = None
            for _ in range(MAX_PAGES):
                page = await client.list_tools(cursor=cursor)
                tools += page.tools
                cursor = page.next_cursor
                if cursor is None:
                    break
            self.tools = self.tools or tools
            attempt.set_result(client)
            await self._leave.wait()

    @asynccontextmanager
    async def _connect(self) -> AsyncIterator["Client"]:
        """An SDK client, entered and left in the task that uses this."""
        import httpx2
        from mcp import Client, StdioServerParameters
        from mcp.client.stdio import stdio_client
        from mcp.client.streamable_http import streamable_http_client

        if self.spec.url is None:
            program, *arguments = self.spec.command or ()
            parameters = StdioServerParameters(command=program, args=arguments, env=dict(os.environ))
            # the SDK only hands this on to the process, which needs no more of it than fileno()
            transport = stdio_client(parameters, errlog=self._stderr)  # type: ignore[arg-type]
            async with Client(transport, cache=None) as client:
                yield client
            return
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=KEEP_ALIVE_S)
        timeout = httpx2.Timeout(30.0, read=None)  # how long a call may take is its caller's business
        hooks = {"response": [self._note_refusal]}
        async with httpx2.AsyncClient(limits=limits, timeout=timeout, event_hooks=hooks) as http:
            transport = streamable_http_client(self.spec.url, http_client=http, max_sse_event_size=None)
            async with Client(transport, cache=None) as client:
                yield client

    async def _note_refusal(self, response: "httpx2.Response") -> None:
        """Servers answer a session that they do not know with 404, as the protocol wants, or with 400."""
        if response.status_code in (400, 404) and "mcp-session-id" in response.request.headers:
            self._session_refused = True

    async def _connected(self, timeout_s: float) -> "asyncio.Future[Client]":
        """The attempt that is under way, once it has brought a client; ToolTransportError if it brings none in time."""
        attempt = self._attempt
        if not attempt.done():
            await asyncio.wait({attempt}, timeout=max(timeout_s, 0.0))
        if not attempt.done():
            raise ToolTransportError(f"tool server {self.spec.name}: not connected within {timeout_s:g} s")
        attempt.result()
        return attempt

    async def call(self, name: str, arguments: dict[str, Any], timeout_s: float, meta: Mapping[str, Any]) -> ToolResult:
        """`tools/call`, never sent twice: the server may have run a call whose answer was lost."""
        started_at = asyncio.get_running_loop().time()
        attempt = await self._connected(timeout_s)
        client, where = attempt.result(), f"tool {name} of {self.spec.name}"
        left_s = max(started_at + timeout_s - asyncio.get_running_loop().time(), 0.0)
        task = asyncio.create_task(client.call_tool(name, arguments, meta=dict(meta) or None))  # type: ignore[arg-type]
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)
        try:
            await asyncio.wait({task}, timeout=left_s)
        finally:
            timed_out = task.cancel()  # False where it is done
        if timed_out:
            await asyncio.wait({task}, timeout=CANCEL_S)
            raise ToolTransportError(f"{where}: no answer within {timeout_s:g} s")
        if task.cancelled():
            raise ToolTransportError(f"{where}: connection lost")
        if error := task.exception():
            failure = _translated(error, where)
            answered = str(error) == HTTP_ERROR  # by a status, a busy server's perhaps: the others may go on
            if isinstance(failure, ToolTransportError) and (self._session_refused or not answered):
                self._give_up(attempt)
            raise failure from None
        result = task.result()
        text = _text(result.content, result.structured_content)
        return ToolResult(text, bool(result.is_error), len(text.encode()))

    async def close(self) -> None:
        """End the client and, for a command, its process; takes a few seconds at most."""
        self._closing.set()
        self._leave.set()
        if self._supervisor is None:
            return
        if self._attempt.done():  # the client takes its leave; one that is still connecting cannot hear of it
            await asyncio.wait({self._supervisor}, timeout=CLOSE_S)
        self._supervisor.cancel()
        await asyncio.wait({self._supervisor}, timeout=CLOSE_S)
        if self._stderr is not None:
            self._stderr.close()


class ToolServers:
    """The tool servers of a run, connected. Calls may be made at once and from any task."""

    def __init__(self, connections: Sequence[_Connection]) -> None:
        self._connections = list(connections)
        self.tools: list[Tool] = []
        self._by_name: dict[str, tuple[_Connection, str]] = {}

    @classmethod
    async def open(cls, specs: Sequence[ToolServerSpec], ready_timeout_s: float = 30.0) -> "ToolServers":
        """Start or reach every server and list its tools; ToolServerError for the first that fails, the rest closed."""
        for name in ("mcp", "httpx2"):  # the SDK logs every lost connection: callers hear of it by exception
            if not logging.getLogger(name).handlers:
                logging.getLogger(name).addHandler(logging.NullHandler())
        servers = cls([_Connection(spec) for spec in specs])
        opening = [asyncio.create_task(each.open(ready_timeout_s)) for each in servers._connections]
        try:
            await asyncio.gather(*opening)
        except BaseException:
            for task in opening:
                task.cancel()
            await asyncio.wait(opening)
            await servers.close()
            raise
        servers._name_tools()
        return servers

    def _name_tools(self) -> None:
        """Give every tool a name that no other has: the later of two alike is led by its server's label."""
        for connection in self._connections:
            for remote in connection.tools:
                plain = re.sub(r"[^A-Za-z0-9_-]", "_", remote.name)
                candidates = [plain, f"{connection.spec.label}__{plain}"]
                candidates += [f"{i}__{plain}" for i in range(2, len(self._connections) + 2)]
                name = next(short for c in candidates if (short := c[:64]) not in self._by_name)
                read_only = remote.annotations is not None and remote.annotations.read_only_hint is True
                schema, server = dict(remote.input_schema), connection.spec.name
                self.tools.append(Tool(name, remote.description or "", schema, read_only, server, remote.name))
                self._by_name[name] = (connection, remote.name)

    async def call(
        self, name: str, arguments: dict[str, Any], *, timeout_s: float, meta: Mapping[str, Any] | None = None
    ) -> ToolResult:
        """Call a tool by its name in `tools`. `meta` goes into the request's `_meta` (keys as "fanmark/seed").

        Raises ToolTransportError or ToolProtocolError; a tool's own error is a result with `is_error`.
        """
        if name not in self._by_name:
            raise ToolProtocolError(f"no tool {name!r}: there are {', '.join(self._by_name)}")
        connection, remote_name = self._by_name[name]
        return await connection.call(remote_name, arguments, timeout_s, meta or {})

    async def close(self) -> None:
        """End every connection and every process that `open` started."""
        await asyncio.gather(*(each.close() for each in self._connections))
