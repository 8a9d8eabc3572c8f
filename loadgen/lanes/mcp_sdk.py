"""An MCP client on the `mcp` SDK: for servers that are started by a command (stdio), and to compare with what applications use.

Rules of the file:
1. An SDK client lives and dies in one task of its own (`SdkConnection._live`): the SDK's cancel scopes belong to the task
   that entered them, and one failed request ends the whole client. Nobody else enters or leaves it.
2. What a failure costs is the calls in flight on that connection. It is replaced, with back-off; calls made meanwhile
   wait for the attempt that is under way and fail with it.
3. A caller sees ToolTransportError, ToolProtocolError or a result, and CancelledError only if it was cancelled itself:
   each SDK call runs in a task of its own, whose end is translated.
4. A tool's own error (isError) is a result.
"""

import asyncio
import logging
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any

from fanmark.loadgen.lanes.mcp_model import (
    FIRST_BACKOFF_S,
    KEEP_ALIVE_S,
    LAST_BACKOFF_S,
    MAX_PAGES,
    RemoteTool,
    ToolProtocolError,
    ToolRefusedError,
    ToolResult,
    ToolServerSpec,
    ToolTransportError,
    Trip,
)
from fanmark.loadgen.lanes.mcp_session import result_of, trace_meta

if TYPE_CHECKING:
    import httpx2
    from mcp import Client

CLOSE_S = 5.0
CANCEL_S = 1.0
LAST_LINES = 8
# The SDK's words for an HTTP error without JSON-RPC in it, and for status 404 within a session.
HTTP_ERROR, SESSION_ENDED = "Server returned an error response", "Session terminated"


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
class SdkConnection:
    """A supervised SDK client of one server, connected when it is first needed."""

    spec: ToolServerSpec
    tools: Sequence[RemoteTool] = ()
    _attempt: "asyncio.Future[Client]" = field(init=False)  # done when there is a client; replaced when it is lost
    _claimed: "asyncio.Future[Client] | None" = None  # the attempt that a call has counted as its own
    _leave: asyncio.Event = field(default_factory=asyncio.Event)  # set to end the client that lives now
    _closing: asyncio.Event = field(default_factory=asyncio.Event)
    _calls: set["asyncio.Task[Any]"] = field(default_factory=set)
    _supervisor: "asyncio.Task[None] | None" = None
    _session_refused: bool = False
    _kept_out: int | None = None
    _stderr: IO[bytes] | None = None

    def _supervised(self) -> None:
        """Sees to it that somebody keeps the connection up."""
        if self._supervisor is not None:
            return
        for name in ("mcp", "httpx2"):  # the SDK logs every lost connection: callers hear of it by exception
            if not logging.getLogger(name).handlers:
                logging.getLogger(name).addHandler(logging.NullHandler())
        if self.spec.command:
            self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        self._attempt = asyncio.get_running_loop().create_future()
        self._supervisor = asyncio.create_task(self._supervise(), name=f"tools {self.spec.name}")

    async def start(self, timeout_s: float) -> None:
        """See Connection."""
        self._supervised()
        attempt = self._attempt
        if not attempt.done():
            await asyncio.wait({attempt}, timeout=max(timeout_s, 0.0))
        if not attempt.done():
            raise TimeoutError
        attempt.result()

    def last_lines(self) -> str:
        """See Connection."""
        if self._stderr is None:
            return ""
        self._stderr.seek(0)
        text = self.spec.secrets.redact(self._stderr.read().decode(errors="replace"))
        lines = text.splitlines()[-LAST_LINES:]
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
                reason = "connection lost" if error is None else _reason(error)
                if self._kept_out is not None:
                    attempt.set_exception(ToolRefusedError(f"tool server {self.spec.name}: HTTP {self._kept_out}"))
                else:
                    attempt.set_exception(ToolTransportError(f"tool server {self.spec.name}: {reason}"))
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
            self.tools = self.tools or [_remote(tool) for tool in tools]
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
            parameters = StdioServerParameters(command=program, args=arguments, env=dict(self.spec.env))
            # the SDK only hands this on to the process, which needs no more of it than fileno()
            transport = stdio_client(parameters, errlog=self._stderr)  # type: ignore[arg-type]
            async with Client(transport, cache=None) as client:
                yield client
            return
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=KEEP_ALIVE_S)
        timeout = httpx2.Timeout(30.0, read=None)  # how long a call may take is its caller's business
        hooks = {"response": [self._note_refusal]}
        async with httpx2.AsyncClient(
            headers=dict(self.spec.headers), verify=self.spec.tls, limits=limits, timeout=timeout, event_hooks=hooks
        ) as http:
            transport = streamable_http_client(self.spec.url, http_client=http, max_sse_event_size=None)
            async with Client(transport, cache=None) as client:
                yield client

    async def _note_refusal(self, response: "httpx2.Response") -> None:
        """Servers answer a session that they do not know with 404, as the protocol wants, or with 400, and one without the key with 401."""
        self._kept_out = response.status_code if response.status_code in (401, 403) else None
        if response.status_code in (400, 404) and "mcp-session-id" in response.request.headers:
            self._session_refused = True

    async def _connected(self, timeout_s: float, trip: Trip) -> "asyncio.Future[Client]":
        """The attempt that is under way, once it has brought a client; ToolTransportError if it brings none in time."""
        loop, began_at = asyncio.get_running_loop(), trip.now()
        give_up_at, out_at = loop.time() + trip.reconnect_s, loop.time() + timeout_s
        self._supervised()
        while True:
            attempt = self._attempt
            if attempt.done():
                return attempt
            trip.opened_session = trip.opened_session or self._claimed is not attempt
            self._claimed = attempt
            try:
                await self.start(out_at - loop.time())
                return attempt
            except TimeoutError:
                text = f"tool server {self.spec.name}: not connected within {timeout_s:g} s"
                raise ToolTransportError(text) from None
            except ToolTransportError:
                if loop.time() >= give_up_at:
                    raise
            finally:
                trip.session_s = trip.now() - began_at

    async def call(
        self, tool: RemoteTool, arguments: Mapping[str, Any], timeout_s: float, meta: Mapping[str, Any], trip: Trip
    ) -> ToolResult:
        """See Connection. Never sent twice: the server may have run a call whose answer was lost."""
        started_at = asyncio.get_running_loop().time()
        attempt = await self._connected(timeout_s, trip)
        client, where = attempt.result(), f"tool {tool.name} of {self.spec.name}"
        left_s = max(started_at + timeout_s - asyncio.get_running_loop().time(), 0.0)
        told: Any = {**meta, **trace_meta(trip.trace)} or None
        trip.sent_at = trip.now()
        task = asyncio.create_task(client.call_tool(tool.name, dict(arguments), meta=told))
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
        return result_of(task.result().model_dump(mode="json", by_alias=True, exclude_none=True), where)

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


def _remote(tool: Any) -> RemoteTool:
    read_only = tool.annotations is not None and tool.annotations.read_only_hint is True
    return RemoteTool(tool.name, tool.description or "", dict(tool.input_schema), read_only)
