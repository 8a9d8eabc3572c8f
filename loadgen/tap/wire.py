"""The pass-through: requests of clients to their upstream and the replies back, as bytes come.

Rules of the file:
1. Each client's connection has connections of its own upstream, so whatever one end does to its connection (close it while idle, cut it
   amid a reply) the other end sees, and nothing is sent twice.
2. A reply is passed on read by read, in the callback that brought it, framed as it came. Nothing is parsed before it is on its way; what is
   to be measured is kept with its instant, and handed to the sink a few reads at a time.
3. Only the body of a request that is measured is held until it is whole: it is read to be told apart, and may be asked for usage.
4. A client that goes ends its request upstream at once. Who reads slowly is not sent more than the socket takes.
"""

import asyncio
import ssl
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import msgspec

from fanmark.loadgen.lanes.http1 import BadResponse, Response
from fanmark.loadgen.tap.heads import BadRequest, RequestHead, Upstream, body_of, passed_on, request_head, split_head
from fanmark.loadgen.tap.server_end import Server
from fanmark.loadgen.tap.usage import with_usage

MOST_BODY_BYTES = 1 << 28
_USAGE_FOR = ("chat", "completions")
_OF_PATH = {"chat/completions": "chat", "completions": "completions", "responses": "responses", "messages": "messages"}


class Exchange:
    """One request that is measured, and its reply so far. `api` is what it is written in; it was whole at `came_at`, and went on at
    `sent_at`; `reads` are the bytes of the reply's body that the sink was not handed yet, each with the instant it came."""

    __slots__ = (
        "api", "asked_usage", "begun", "body", "came_at", "connect_s", "content_type", "done_at", "error", "headers", "number", "reads",
        "sent_at", "status", "untold",
    )  # fmt: skip

    def __init__(self, api: str, head: RequestHead) -> None:
        self.api = api
        self.number = 0  # the sink's, as the next
        self.untold = False
        self.headers = head.values()
        self.came_at = 0.0
        self.body = b""
        self.asked_usage = self.begun = False
        self.sent_at: float | None = None
        self.connect_s: float | None = None
        self.status = 0
        self.content_type = ""
        self.reads: list[tuple[float, bytes]] = []
        self.done_at: float | None = None
        self.error: str | None = None


class Sink(Protocol):
    """Is told of every exchange: that its request is on its way, of its reads a few at a time, and that it has ended."""

    def began(self, exchange: Exchange) -> None: ...

    def read(self, exchange: Exchange) -> None: ...

    def ended(self, exchange: Exchange) -> None: ...


class Wire:
    """What all connections share. `refuses_usage`: the target does not know `stream_options`."""

    def __init__(self, upstreams: Sequence[Upstream], sink: Sink, now: Callable[[], float] = time.monotonic) -> None:
        self.upstreams = upstreams
        self.sink = sink
        self.now = now
        self.refuses_usage = False
        self.clients: set[Client] = set()
        self.passed = 0  # requests that are not measured
        self._tls: ssl.SSLContext | None = None

    def tls(self) -> ssl.SSLContext:
        """The system's authorities, read once."""
        if self._tls is None:
            self._tls = ssl.create_default_context()
        return self._tls

    def route(self, path: str) -> tuple[Upstream, str] | None:
        """Where a path goes, and as what."""
        for each in self.upstreams:
            if (there := each.goes_to(path)) is not None:
                return each, there
        return None

    def close(self) -> None:
        """Ends all connections."""
        for client in list(self.clients):
            client.drop()


def api_of(upstream: Upstream, head: RequestHead) -> str | None:
    """What a request that is measured is written in; None for all others."""
    if head.method != "POST":
        return None
    path = head.path.partition("?")[0]
    if upstream.root is None:
        return "mcp"
    return _OF_PATH.get(path.removeprefix(upstream.at).strip("/")) if path.startswith(upstream.at) else None


class Client(asyncio.Protocol):
    """A client's connection: one request at a time."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._transport: Any = None
        self._early = b""  # what came and has not been looked at
        self._head: RequestHead | None = None
        self._body: Response | None = None
        self._held: list[bytes] | None = None
        self._held_bytes = 0
        self._servers: dict[str, Server] = {}
        self._server: Server | None = None  # of the request under way, once there is a connection
        self._waiting: list[bytes] = []  # for the connection
        self._connecting: asyncio.Task[None] | None = None
        self._reply_begun = False
        self.exchange: Exchange | None = None
        self.paused = False

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._wire.clients.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._wire.clients.discard(self)
        if self._connecting is not None:
            self._connecting.cancel()
        for server in self._servers.values():
            server.abandon()
        self._end("cancelled")

    def drop(self) -> None:
        """Ends the connection, and its request upstream."""
        self._transport.abort()

    def pause_writing(self) -> None:
        self.paused = True
        if self._server is not None:
            self._server.pause(True)

    def resume_writing(self) -> None:
        self.paused = False
        if self._server is not None:
            self._server.pause(False)

    def hold_back(self, hold: bool) -> None:
        """Whether the upstream takes no more of the request for now."""
        if not self._transport.is_closing():
            (self._transport.pause_reading if hold else self._transport.resume_reading)()

    def data_received(self, data: bytes) -> None:
        try:
            if self._body is not None and not self._body.whole:
                self._more(data)
            else:
                self._early += data
                if self._head is None:
                    self._next()
        except (BadRequest, BadResponse) as e:
            self.refuse(400, str(e))

    def _next(self) -> None:
        """The next request, if its head is there."""
        found = split_head(self._early.lstrip(b"\r\n"))
        if found is None:
            return
        self._head = head = request_head(found[0])
        self._early = b""
        self._body = body_of(head)
        self._reply_begun = False
        routed = self._wire.route(head.path)
        if routed is None:
            self.refuse(404, f"the tap has no {head.path.partition('?')[0]}")
            return
        upstream, path = routed
        api = api_of(upstream, head)
        if head.waits:
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if api is None:
            self._wire.passed += 1
            self._reach(upstream, passed_on(head, path, upstream.authority, None, plain_reply=False))
        else:
            self.exchange = Exchange(api, head)
            self._held, self._held_bytes = [], 0
        self._more(found[1])

    def _more(self, data: bytes) -> None:
        """More of the request's body."""
        assert self._body is not None and self._head is not None
        body = self._body.feed(data) if data else b""
        if self._held is None:
            if data:
                self._forward(data)
            return
        self._held.append(body)
        self._held_bytes += len(body)
        if self._held_bytes > MOST_BODY_BYTES:
            self.refuse(413, f"a request of more than {MOST_BODY_BYTES:,} bytes")
        elif self._body.whole:
            whole, self._held = b"".join(self._held), None
            self._send(whole)

    def _send(self, body: bytes) -> None:
        """A measured request, whole."""
        exchange, head = self.exchange, self._head
        assert exchange is not None and head is not None
        exchange.body, exchange.came_at = body, self._wire.now()
        asked = None if self._wire.refuses_usage or exchange.api not in _USAGE_FOR else with_usage(body)
        exchange.asked_usage, exchange.begun = asked is not None, True
        self._post(body if asked is None else asked)
        self._wire.sink.began(exchange)  # once it is on its way: nobody waits for the recording

    def _post(self, body: bytes) -> None:
        assert self._head is not None
        routed = self._wire.route(self._head.path)
        assert routed is not None
        upstream, path = routed
        self._reach(upstream, passed_on(self._head, path, upstream.authority, len(body), plain_reply=True) + body)

    def again(self) -> None:
        """Sends the request as the client wrote it: the target does not know what was added."""
        assert self.exchange is not None
        self._wire.refuses_usage, self.exchange.asked_usage = True, False
        self._post(self.exchange.body)

    def _reach(self, upstream: Upstream, data: bytes) -> None:
        self._server = self._servers.get(upstream.name)
        if self._server is not None:
            self._server.begin(self.exchange, self._head)
            self._forward(data)
            return
        self._waiting = [data]
        self._connecting = asyncio.get_running_loop().create_task(self._connect(upstream))

    async def _connect(self, upstream: Upstream) -> None:
        began_at = self._wire.now()
        try:
            _, server = await asyncio.get_running_loop().create_connection(
                lambda: Server(self, upstream.name, self._wire),
                upstream.host,
                upstream.port,
                ssl=self._wire.tls() if upstream.tls else None,
            )
        except OSError as e:
            self._connecting = None
            self.lost("connect", f"the tap cannot reach {upstream.host}:{upstream.port}: {e}")
            return
        self._connecting = None
        self._servers[upstream.name] = self._server = server
        if self.exchange is not None:
            self.exchange.connect_s = self._wire.now() - began_at
        server.begin(self.exchange, self._head)
        waiting, self._waiting = self._waiting, []
        self._forward(b"".join(waiting))

    def _forward(self, data: bytes) -> None:
        """Upstream, or to what waits for the connection there."""
        if self._server is None:
            self._waiting.append(data)
            return
        if self.exchange is not None:
            self.exchange.sent_at = self._wire.now()
        self._server.write(data)

    def reply(self, data: bytes) -> None:
        """Bytes of the reply, to the client."""
        self._reply_begun = True
        self._transport.write(data)

    def finished(self, keep_alive: bool) -> None:
        """The reply is whole, and with the client."""
        self._end(None)
        whole = self._body is not None and self._body.whole and not self._body.extra
        keep = keep_alive and self._head is not None and self._head.keep_alive and whole
        self._head = self._body = self._server = None
        if not keep:
            self._transport.close()
        elif self._early:
            self.data_received(b"")

    def lost(self, error: str, message: str) -> None:
        """The upstream is not there, or went amid the reply."""
        self._end(error)
        if self._reply_begun:
            self._transport.close()
        else:
            self.refuse(502, message)

    def gone(self, name: str) -> None:
        """An upstream closed its connection while nothing was under way on it: so does the client's end, if it is idle."""
        self._servers.pop(name, None)
        if self._head is None:
            self._transport.close()

    def refuse(self, status: int, message: str) -> None:
        """An answer of the tap's own, and the connection's end."""
        self._end("http_4xx" if status < 500 else "connect")
        body = msgspec.json.encode({"error": {"message": message, "type": "tap_error", "param": None, "code": status}})
        words = {400: "Bad Request", 404: "Not Found", 413: "Content Too Large", 502: "Bad Gateway"}[status]
        self._transport.write(
            f"HTTP/1.1 {status} {words}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
            f"Connection: close\r\n\r\n".encode()
            + body
        )
        self._transport.close()

    def _end(self, error: str | None) -> None:
        exchange, self.exchange = self.exchange, None
        if exchange is None:
            return
        exchange.error = error
        if exchange.done_at is None:
            exchange.done_at = self._wire.now()
        if exchange.begun:
            self._wire.sink.ended(exchange)
