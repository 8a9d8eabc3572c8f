"""MCP lane: the tool servers of a run, by URL (streamable HTTP) or by command (stdio), and who goes by which session.

A thin client of ours carries calls to URLs, the `mcp` SDK those to commands; either can be had for a URL. Whatever fails costs the calls in
flight on its connection: a caller sees ToolTransportError, ToolProtocolError or a result, and CancelledError only if it was cancelled
itself. A tool's own error (isError) is a result.
"""

import asyncio
import re
from collections.abc import Callable, Coroutine, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from fanmark.loadgen.errors import CallError
from fanmark.loadgen.lanes.arguments import arguments_for
from fanmark.loadgen.lanes.mcp_model import (
    FIRST_BACKOFF_S,
    Connection,
    RemoteTool,
    Tool,
    ToolProtocolError,
    ToolRefusedError,
    ToolResult,
    ToolServerError,
    ToolServerSpec,
    ToolTransportError,
    Trip,
)

__all__ = [
    "Tool",
    "ToolProtocolError",
    "ToolResult",
    "ToolServerError",
    "ToolServerSpec",
    "ToolServers",
    "ToolTransportError",
    "Trip",
    "arguments_for",
]

Transport = Literal["auto", "thin", "sdk"]
Sessions = Literal["per_agent", "per_query", "shared"]


def _connection(spec: ToolServerSpec, transport: Transport, version: str | None = None) -> Connection:
    if spec.url is not None and transport != "sdk":
        from fanmark.loadgen.lanes.mcp_thin import ThinConnection

        return ThinConnection(spec, version)
    from fanmark.loadgen.lanes.mcp_sdk import SdkConnection

    return SdkConnection(spec)


async def _opened(spec: ToolServerSpec, connection: Connection, ready_timeout_s: float) -> None:
    """Connects and lists the tools; ToolServerError if that has not worked after `ready_timeout_s`. A URL is tried again until then, as its
    server may be starting; a command that ends is not."""
    loop = asyncio.get_running_loop()
    deadline_at = loop.time() + ready_timeout_s
    where, reason = f"tool server {spec.name}", ""
    while True:
        try:
            await connection.start(deadline_at - loop.time())
            return
        except TimeoutError:
            reason = reason or f"no answer within {ready_timeout_s:g} s"
        except ToolRefusedError as e:
            reason = spec.secrets.redact(str(e).removeprefix(f"{where}: "))
            raise ToolServerError(f"{where} lets nobody in ({reason}): {spec.key_hint}") from None
        except CallError as e:
            reason = spec.secrets.redact(str(e).removeprefix(f"{where}: "))
            if spec.url is not None and isinstance(e, ToolTransportError) and loop.time() < deadline_at:
                await asyncio.sleep(min(FIRST_BACKOFF_S, deadline_at - loop.time()))
                continue
        raise ToolServerError(f"{where} does not start: {reason}{connection.last_lines()}")


class ToolServers:
    """The tool servers of a run. Calls may be made at once and from any task. `sessions`: who has connections and sessions of its own; they
    start with its first call. "shared": all go by those that the tools were listed by."""

    def __init__(self, specs: Sequence[ToolServerSpec], transport: Transport, sessions: Sessions) -> None:
        self.tools: list[Tool] = []
        self._specs = list(specs)
        self._transport, self._sessions = transport, sessions
        self._shared: list[Connection] = [_connection(spec, transport) for spec in specs]
        self._own: dict[Hashable, dict[tuple[Hashable, int], Connection]] = {}  # by query, then agent and server
        self._by_name: dict[str, tuple[int, RemoteTool]] = {}
        self._versions: list[str | None] = [None] * len(self._specs)
        self._ending: set[asyncio.Task[None]] = set()

    @classmethod
    async def open(
        cls,
        specs: Sequence[ToolServerSpec],
        ready_timeout_s: float = 30.0,
        *,
        transport: Transport = "auto",
        sessions: Sessions = "shared",
    ) -> "ToolServers":
        """Start or reach every server and list its tools; ToolServerError for the first that fails, the rest closed."""
        servers = cls(specs, transport, sessions)
        opening = [
            asyncio.create_task(_opened(spec, connection, ready_timeout_s))
            for spec, connection in zip(servers._specs, servers._shared, strict=True)
        ]
        try:
            await asyncio.gather(*opening)
            servers._name_tools()
            if (
                sessions != "shared"
            ):  # these were for the listing: a session held by nobody would count against the server's limit
                servers._versions = [getattr(connection, "version", None) for connection in servers._shared]
                await asyncio.gather(*(connection.close() for connection in servers._shared))
        except BaseException:
            for task in opening:
                task.cancel()
            await asyncio.wait(opening)
            await servers.close()
            raise
        return servers

    def _name_tools(self) -> None:
        """Give every tool a name that no other has: the later of two alike is led by its server's label."""
        for place, (spec, connection) in enumerate(zip(self._specs, self._shared, strict=True)):
            clean: Callable[[Any], Any] = spec.secrets.clean
            for remote in connection.tools:
                plain = re.sub(r"[^A-Za-z0-9_-]", "_", clean(remote.name))
                candidates = [plain, f"{spec.label}__{plain}"]
                candidates += [f"{i}__{plain}" for i in range(2, len(self._specs) + 2)]
                name = next(short for c in candidates if (short := c[:64]) not in self._by_name)
                schema = clean(remote.input_schema)
                self.tools.append(
                    Tool(name, clean(remote.description), schema, remote.read_only, spec.name, remote.name)
                )
                self._by_name[name] = (place, remote)

    async def call(
        self,
        name: str,
        arguments: Mapping[str, Any],
        *,
        timeout_s: float,
        meta: Mapping[str, Any] | None = None,
        trip: Trip | None = None,
    ) -> ToolResult:
        """Call a tool by its name in `tools`. `meta` goes into the request's `_meta` (keys as "fanmark/seed").

        Raises ToolTransportError or ToolProtocolError; a tool's own error is a result with `is_error`. A secret that a server says back is
        taken out, as prompts go to another server, which may say it again.
        """
        if name not in self._by_name:
            raise ToolProtocolError(f"no tool {name!r}: there are {', '.join(self._by_name)}")
        place, remote = self._by_name[name]
        trip, secrets = trip or Trip(), self._specs[place].secrets
        try:
            result = await self._of(trip, place).call(remote, arguments, timeout_s, meta or {}, trip)
        except CallError as e:
            e.args = tuple(secrets.clean(list(e.args)))
            raise
        return replace(result, text=secrets.redact(result.text)) if secrets else result

    def _of(self, trip: Trip, place: int) -> Connection:
        if self._sessions == "shared":
            return self._shared[place]
        own = self._own.setdefault(trip.query, {})
        key = trip.agent if self._sessions == "per_agent" else None, place
        if key not in own:
            own[key] = _connection(self._specs[place], self._transport, self._versions[place])
        return own[key]

    def end(self, query: Hashable) -> None:
        """Ends a query's sessions, if it has any of its own; nobody waits for that."""
        for connection in self._own.pop(query, {}).values():
            self._go_on(connection.close())

    def _go_on(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def close(self) -> None:
        """End every connection and every process that was started."""
        for query in list(self._own):
            self.end(query)
        await asyncio.gather(*(each.close() for each in self._shared), *self._ending)
