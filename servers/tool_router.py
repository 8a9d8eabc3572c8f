"""A router in front of tool servers: `fanmark serve tools --replicas N`.

Rules of the file:
1. A session belongs to the server that opened it: the router tells its name with the server's number in front, and holds nothing itself.
   What opens a session, and what has none (all of the modern era), goes to the next server in turn.
2. A server that does not listen is passed over. Its sessions are 404, as those that it ended are, so that clients open new ones.
"""

import asyncio
import signal
from collections.abc import Sequence

from aiohttp import web

from fanmark.servers import mcp_codec as codec
from fanmark.servers.mcp_app import unknown_session
from fanmark.servers.replicas import Header, NotListening, ReplicaError, Replicas, Starting, own_flags, silent, started
from fanmark.servers.tools import ToolsError, ToolsOptions, answering, bound, tell

_SESSION = codec.SESSION_HEADER.lower()


class ToolRouter:
    """Passes requests on to the tool servers."""

    def __init__(self, replicas: Replicas) -> None:
        self._replicas = replicas
        self._turn = 0

    def __repr__(self) -> str:
        return f"<ToolRouter of {len(self._replicas)}>"

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """The one entrance."""
        body = await request.content.read()
        if request.path == "/metrics" and request.method == "GET":
            return await self._replicas.metrics()
        name = request.headers.get(codec.SESSION_HEADER)
        if name is None:
            return await self._in_turn(request, body)
        number, _, own = name.partition("-")
        if not number.isdecimal() or int(number) >= len(self._replicas):
            return unknown_session()
        try:
            return await self._ask(int(number), request, body, own)
        except NotListening:
            return unknown_session()

    async def _in_turn(self, request: web.BaseRequest, body: bytes) -> web.StreamResponse:
        first, self._turn = self._turn, (self._turn + 1) % len(self._replicas)
        for place in (*range(first, len(self._replicas)), *range(first)):
            try:
                return await self._ask(place, request, body, "")
            except NotListening as error:
                last = silent(place, error)
        return last

    async def _ask(self, place: int, request: web.BaseRequest, body: bytes, own: str) -> web.StreamResponse:
        def there(header: Header) -> Header:
            return (header[0], own) if header[0].lower() == _SESSION else header

        def back(header: Header) -> Header:
            return (header[0], f"{place}-{header[1]}") if header[0].lower() == _SESSION else header

        return await self._replicas.ask(place, request, body, there=there, back=back)


async def _signal() -> None:
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    await ended.wait()


async def serve(options: ToolsOptions, argv: Sequence[str], start: Starting | None = None) -> None:
    """Has the servers started, here or as `start` does it, and routes to them until a signal. Raises ToolsError. Each has a seed of its
    own, or all would fail and wait at the same calls."""
    flags = own_flags(argv, ["--seed"])
    each = [[*flags, "--seed", str(options.behaviour.seed + place)] for place in range(options.replicas)]
    with bound(options) as sock:
        try:
            async with (
                started("fanmark.servers.tools", each, start) as replicas,
                answering(sock, ToolRouter(replicas).handle),
            ):
                tell(sock, options.host, replicas=replicas.urls)
                await _signal()
        except ReplicaError as error:
            raise ToolsError(str(error)) from None
