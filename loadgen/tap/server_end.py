"""The upstream's end of the pass-through: one connection of a client's own, and the reply that comes back on it."""

import asyncio
from typing import TYPE_CHECKING, Any

from fanmark.loadgen.lanes.http1 import BadResponse, Response
from fanmark.loadgen.tap.heads import BadRequest, RequestHead, returned, split_head
from fanmark.loadgen.tap.usage import WithoutUsage

if TYPE_CHECKING:
    from fanmark.loadgen.tap.wire import Client, Exchange, Wire

BATCH_READS = 8  # a reply's reads are handed to the sink so many at a time
_REFUSED = (400, 422)


class Server(asyncio.Protocol):
    """A connection to an upstream; it serves one request at a time."""

    def __init__(self, client: "Client", name: str, wire: "Wire") -> None:
        self._client = client
        self._name = name
        self._wire = wire
        self._transport: Any = None
        self._busy = False
        self._exchange: Exchange | None = None
        self._request: RequestHead | None = None
        self._response = Response()
        self._head: bytes | None = b""  # of the reply, as far as it is there; None once it is with the client
        self._filter: WithoutUsage | None = None
        self._reframed: bool | None = None  # see heads.returned
        self._held: list[bytes] | None = None  # a refusal that may be of what the tap added

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def begin(self, exchange: "Exchange | None", head: RequestHead | None) -> None:
        """The next request is on its way."""
        self._busy = True
        self._exchange, self._request = exchange, head
        self._response = Response()
        self._head, self._filter, self._reframed, self._held = b"", None, None, None

    def write(self, data: bytes) -> None:
        self._transport.write(data)

    def pause(self, pause: bool) -> None:
        """Whether the client takes no more for now."""
        if not self._transport.is_closing():
            (self._transport.pause_reading if pause else self._transport.resume_reading)()

    def pause_writing(self) -> None:
        self._client.hold_back(True)

    def resume_writing(self) -> None:
        self._client.hold_back(False)

    def abandon(self) -> None:
        """The client has gone: the request ends here too."""
        self._busy = False
        self._exchange = None
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        if not self._busy:
            self._transport.abort()  # nobody had asked
            return
        at = self._wire.now()
        try:
            if self._head is not None:
                data = self._take_head(data)
                if self._head is not None:
                    return
            body = self._response.feed(data) if data else b""
            if self._response.extra:
                raise BadResponse("more than the reply")
        except (BadResponse, BadRequest) as e:
            self._broken(str(e))
            return
        if self._held is not None:
            self._held.append(body)
        elif self._reframed is None:
            if data:
                self._client.reply(data)
        elif body:
            self._pass(self._filter.feed(body) if self._filter is not None else body)
        self._take(at, body)
        if self._response.whole:
            self._finish(at)

    def _take(self, at: float, body: bytes) -> None:
        exchange = self._exchange
        if exchange is not None and body:
            exchange.reads.append((at, body))
            if len(exchange.reads) >= BATCH_READS and self._held is None:
                self._wire.sink.read(exchange)

    def _take_head(self, data: bytes) -> bytes:
        """Reads heads until one is final, and passes it on; gives what follows it."""
        self._head = (self._head or b"") + data
        while True:
            found = split_head(self._head)
            if found is None:
                return b""
            raw, rest = found
            if not raw.startswith(b"HTTP/1.") or raw[9:10] != b"1":
                break
            self._head = rest
        response, exchange, request = self._response, self._exchange, self._request
        assert request is not None
        response.feed(raw + b"\r\n\r\n")
        chunked = "transfer-encoding" in response.headers
        if exchange is not None:
            exchange.status, exchange.content_type = response.status, response.headers.get("content-type", "")
            if exchange.asked_usage and response.status in _REFUSED:
                self._held = [raw]
            elif exchange.asked_usage and "event-stream" in exchange.content_type:
                self._filter, self._reframed = WithoutUsage(), request.version == 1
        if chunked and request.version == 0:
            self._reframed = False
        close = not response.keep_alive or not request.keep_alive or self._reframed is False
        if self._held is None:
            self._client.reply(returned(raw, close=close, reframed=self._reframed))
        self._head = None
        if request.method == "HEAD":
            self._response = Response()
            self._response.feed(b"HTTP/1.1 204 No Content\r\n\r\n")
            self._finish(self._wire.now())
            return b""
        if response.whole and not rest:
            self._finish(self._wire.now())
        return rest

    def _pass(self, data: bytes) -> None:
        """A piece of a body that is framed anew."""
        if data:
            self._client.reply(b"%x\r\n%b\r\n" % (len(data), data) if self._reframed else data)

    def _finish(self, at: float) -> None:
        """The reply is whole."""
        if not self._busy:
            return
        exchange, held = self._exchange, self._held
        if held is not None and exchange is not None:
            if self._response.keep_alive and any(b"stream_options" in piece for piece in held[1:]):
                exchange.reads.clear()
                self._client.again()
                return
            self._reframed = True
            self._client.reply(returned(held[0], close=False, reframed=True))
            self._pass(b"".join(held[1:]))
        if self._filter is not None:
            self._pass(self._filter.close())
        if self._reframed:
            self._client.reply(b"0\r\n\r\n")
        if exchange is not None:
            exchange.done_at = at
        self._busy, self._exchange = False, None
        keep_alive = self._response.keep_alive and self._reframed is not False
        if not self._response.keep_alive:
            self._transport.close()
        self._client.finished(keep_alive)

    def _broken(self, reason: str) -> None:
        self._busy, self._exchange = False, None
        self._transport.abort()
        self._client.lost("stream_cut", f"the tap's upstream, {self._name}, broke off: {reason}")

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._busy:
            self._client.gone(self._name)
            return
        try:
            self._response.end()
        except BadResponse as e:
            self._broken(str(e))
        else:
            self._finish(self._wire.now())
