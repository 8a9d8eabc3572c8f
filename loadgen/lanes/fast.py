"""The fast lane: plain http:// on non-blocking sockets, stamped by the kernel as bytes arrive.

Rules of the file:
1. No task, timer, log line or parsing by chunk. All sockets stand in one epoll set, and the event loop watches that set alone: one wake-up
   reads every socket that has something (`_drain`). A read is kept with its instant; streams are parsed a batch of reads at a time.
2. From TICK_FROM calls in flight on, the set is drained every TICK_S instead of at each arrival. That costs no precision, for an arrival's
   instant is the kernel's (stamps.py); where the system gives none there is no tick, and the instant is that of the wake-up.
3. Whatever keeps the loop busy between two wake-ups (many calls that start at once, replies that are parsed) drains in between, so that
   chunks do not pile up unseen. Reads that the kernel joined have the instant of the last: sse.py shares their gaps and counts them.
   The loop itself is kept no longer than SLICE_S at a time, and calls that end together are handed over a few a turn (`_hand_over`).
4. A connection serves one call at a time. A call that fails, runs out of time or is cancelled closes its own, which is how the server
   learns of it. A connection that the server closed while it was idle is never used again.
"""

import asyncio
import math
import select
import socket
import time
from collections import deque
from collections.abc import Callable, Mapping

from fanmark.loadgen.errors import CallError
from fanmark.loadgen.lanes.dial import Dialler
from fanmark.loadgen.lanes.http import HttpError, Sent
from fanmark.loadgen.lanes.http1 import Address, BadResponse, Response, request, request_head
from fanmark.loadgen.lanes.sse import Reply, StreamParser, parse_body
from fanmark.loadgen.lanes.stamps import ANCILLARY_BYTES, ReceiveClock

TICK_S = 0.002
TICK_FROM = 128
SLICE_S = 0.002
SLICE_SOCKETS = 16
HANDED_OVER_A_TURN = 3
IDLE_S = 60.0
READ_BYTES = 65_536
BATCH_READS = 8  # a stream's reads are parsed so many at a time, which bounds what each holds in memory
OPEN_AT_ONCE = 64

_NOTHING = memoryview(b"")


def available() -> bool:
    """Whether this system has what the lane is made of (Linux)."""
    return hasattr(select, "epoll")


class _Exchange:
    """One request under way on a connection."""

    __slots__ = ("batch_reads", "end_by_s", "error", "parser", "read_at", "reads", "response", "unsent", "whole")

    def __init__(self, whole: "asyncio.Future[None]", end_by_s: float) -> None:
        self.whole = whole
        self.end_by_s = end_by_s
        self.error: Exception | None = None
        self.batch_reads = BATCH_READS
        self.response = Response()
        self.reads: list[tuple[float, bytes]] = []
        self.parser: StreamParser | None = None
        self.read_at = 0.0  # when the latest read came; before the first, when the request went out
        self.unsent = _NOTHING

    @property
    def is_stream(self) -> bool:
        return self.response.status < 300 and "event-stream" in self.response.headers.get("content-type", "")

    def body(self) -> bytes:
        return b"".join([data for _, data in self.reads])


class _Connection:
    __slots__ = ("address", "exchange", "fd", "idle_since_s", "sock")

    def __init__(self, sock: socket.socket, address: Address) -> None:
        self.sock = sock
        self.fd = sock.fileno()
        self.address = address
        self.exchange: _Exchange | None = None
        self.idle_since_s = 0.0


class FastLane:
    """Carries all calls to the targets of one scheme, http. `now` is the run's clock, which runs `time_scale` times slower than seconds;
    `wall` is the clock that the kernel stamps with."""

    name = "fast"

    def __init__(
        self, now: Callable[[], float], *, time_scale: float = 1.0, wall: Callable[[], float] = time.time
    ) -> None:
        self._now = now
        self._clock = ReceiveClock(now, time_scale, wall)
        self._loop = asyncio.get_running_loop()
        self._epoll = select.epoll()
        self._connections: dict[int, _Connection] = {}
        self._idle: dict[Address, list[_Connection]] = {}
        self._in_flight = 0
        self._dialler = Dialler()
        self._heads: dict[tuple[str, str], tuple[Address, bytes]] = {}
        self._tick_timer: asyncio.Handle | None = None
        self._end_timer: asyncio.TimerHandle | None = None
        self._next_end_s = math.inf
        self._ended: deque[asyncio.Future[None]] = deque()  # of calls that are to be handed over
        self._turn_left = HANDED_OVER_A_TURN
        self._loop.add_reader(self._epoll.fileno(), self._on_ready)

    def __repr__(self) -> str:
        idle = sum(map(len, self._idle.values()))
        return f"FastLane({self._in_flight} in flight, {idle} idle, {'kernel' if self._clock.stamps else 'own'} stamps)"

    async def send(
        self, url: str, body: bytes, headers: Mapping[str, str], *, stream: bool, timeout_s: float, sent: Sent
    ) -> Reply:
        """Posts `body` and reads the whole reply. Raises CallError, HttpError for a status of 400 or more."""
        try:
            where, message = self._request("POST", url, body, headers)
            del body, headers
            exchange = await self._exchange(where, message, timeout_s, sent, stream)
        except TimeoutError:
            raise CallError("timeout", f"no whole reply within {timeout_s:g} s") from None
        except (BadResponse, ConnectionError) as e:
            raise CallError("stream_cut", f"{type(e).__name__}: {e}") from None
        status = exchange.response.status
        if status >= 400:
            raise HttpError(status, exchange.body().decode(errors="replace"), exchange.response.headers)
        if status >= 300:
            place = exchange.response.headers.get("location", "nowhere")
            raise CallError("bad_reply", f"HTTP {status}: sent on to {place}: give that as the target")
        if exchange.parser is None:
            return parse_body(exchange.body(), exchange.read_at)
        exchange.parser.feed(exchange.reads)
        return exchange.parser.reply()

    async def get(self, url: str, headers: Mapping[str, str], *, timeout_s: float = 10.0) -> tuple[int, bytes]:
        """Status and body of a GET. Raises CallError where there is no reply."""
        return await self._ask("GET", url, b"", headers, timeout_s)

    async def post(
        self, url: str, body: bytes, headers: Mapping[str, str], *, timeout_s: float = 30.0
    ) -> tuple[int, bytes]:
        """Status and body of a POST that is not a call (/tokenize). Raises CallError where there is no reply."""
        return await self._ask("POST", url, body, headers, timeout_s)

    async def _ask(
        self, method: str, url: str, body: bytes, headers: Mapping[str, str], timeout_s: float
    ) -> tuple[int, bytes]:
        try:
            where, message = self._request(method, url, body, headers)
            exchange = await self._exchange(where, message, timeout_s, Sent(), False)
        except TimeoutError:
            raise CallError("timeout", f"no reply within {timeout_s:g} s") from None
        except (BadResponse, ConnectionError) as e:
            raise CallError("connect", str(e) or type(e).__name__) from None
        return exchange.response.status, exchange.body()

    async def open_ahead(self, url: str, count: int) -> None:
        """Opens connections until `count` are idle, so that calls need not wait for one; gives up at the first that fails."""
        address, _ = self._request("POST", url, b"", {})
        try:
            while (lacking := count - len(self._idle.get(address, ()))) > 0:
                await asyncio.gather(*(self._open(address) for _ in range(min(lacking, OPEN_AT_ONCE))))
        except CallError:
            return

    async def _open(self, address: Address) -> None:
        self._release(await self._connect(address))

    async def close(self) -> None:
        """Closes all connections; calls under way fail."""
        self._loop.remove_reader(self._epoll.fileno())
        for timer in (self._tick_timer, self._end_timer):
            if timer is not None:
                timer.cancel()
        for connection in list(self._connections.values()):
            self._lose(connection, ConnectionError("the lane was closed"))
        self._epoll.close()

    def _request(self, method: str, url: str, body: bytes, headers: Mapping[str, str]) -> tuple[Address, list[bytes]]:
        """Where a request goes, and the whole of it, to be taken out and not kept."""
        head = self._heads.get((method, url))
        if head is None:
            try:
                head = self._heads[method, url] = request_head(method, url)
            except ValueError as e:
                raise CallError("connect", f"{url}: {e}") from None
        return head[0], [request(head[1], headers, body if method == "POST" else None)]

    async def _exchange(
        self, address: Address, message: list[bytes], timeout_s: float, sent: Sent, stream: bool
    ) -> _Exchange:
        """One request, taken out of `message` so that it is not kept once it is sent, and its whole response. Raises TimeoutError,
        BadResponse, ConnectionError, or CallError where nobody is reached."""
        exchange = _Exchange(self._loop.create_future(), time.monotonic() + timeout_s)
        if stream:
            exchange.parser = StreamParser()
        connection: _Connection | None = None
        self._drain_if_late()
        try:
            connection = self._take_idle(address)
            if connection is None:
                asked_at = self._now()
                async with asyncio.timeout(timeout_s):
                    connection, sent.connect_s = await self._connect(address), self._now() - asked_at
            exchange.batch_reads = 1 + connection.fd % BATCH_READS  # streams in step are not all parsed at once
            connection.exchange = exchange
            self._in_flight += 1
            sent.at = exchange.read_at = self._now()
            self._write(connection, exchange, memoryview(message.pop()))
            self._end_by(exchange)
            await exchange.whole
            if exchange.error is not None:
                raise exchange.error
        finally:
            if connection is not None and connection.exchange is exchange:  # failed, out of time or cancelled
                self._lose(connection, None)
        self._drain_if_late()
        if exchange.response.headers.get("content-encoding", "identity") != "identity":
            raise BadResponse("a compressed reply, though none was asked for")
        return exchange

    def _end_by(self, exchange: _Exchange) -> None:
        """Sees to it that a call out of time is ended: one timer for all, at the first that may be, for a timer each is dear."""
        if exchange.end_by_s < self._next_end_s:
            if self._end_timer is not None:
                self._end_timer.cancel()
            self._next_end_s = exchange.end_by_s
            self._end_timer = self._loop.call_later(exchange.end_by_s - time.monotonic(), self._end_late)

    def _end_late(self) -> None:
        self._next_end_s = math.inf
        for connection in list(self._connections.values()):
            if connection.exchange is not None:
                if connection.exchange.end_by_s <= time.monotonic():
                    self._lose(connection, TimeoutError())
                else:
                    self._end_by(connection.exchange)

    def _write(self, connection: _Connection, exchange: _Exchange, message: memoryview) -> None:
        """Sends what the socket takes and keeps the rest. Where it takes no more for good, the reading side tells why."""
        before = exchange.unsent
        try:
            size = connection.sock.send(message)
            exchange.unsent = message[size:] if size < len(message) else _NOTHING  # an empty slice would keep the whole
        except BlockingIOError:
            exchange.unsent = message
        except OSError:
            exchange.unsent = _NOTHING
        if bool(before) != bool(exchange.unsent):
            self._epoll.modify(connection.fd, select.EPOLLIN | (select.EPOLLOUT if exchange.unsent else 0))

    def _take_idle(self, address: Address) -> _Connection | None:
        """The idle connection that was used last, if it is open still."""
        idle = self._idle.get(address)
        while idle:
            connection = idle.pop()
            if time.monotonic() - connection.idle_since_s < IDLE_S:
                try:
                    connection.sock.recv(1, socket.MSG_PEEK)
                except BlockingIOError:
                    return connection
                except OSError:
                    pass
            self._lose(connection, None)
        return None

    async def _connect(self, address: Address) -> _Connection:
        """A new connection. Raises CallError."""
        sock = await self._dialler.connect(address)
        self._clock.ask_stamps(sock)
        connection = _Connection(sock, address)
        self._connections[connection.fd] = connection
        self._epoll.register(connection.fd, select.EPOLLIN)
        return connection

    def _release(self, connection: _Connection) -> None:
        connection.idle_since_s = time.monotonic()
        self._idle.setdefault(connection.address, []).append(connection)

    def _lose(self, connection: _Connection, error: Exception | None) -> None:
        """Closes a connection; the call on it, if any, fails by `error`."""
        if self._connections.pop(connection.fd, None) is None:
            return
        self._epoll.unregister(connection.fd)
        connection.sock.close()
        exchange, connection.exchange = connection.exchange, None
        if exchange is not None:
            self._in_flight -= 1
            if error is not None and not exchange.whole.done():
                exchange.error = error
                self._hand_over(exchange.whole)
        elif connection in (idle := self._idle.get(connection.address, [])):
            idle.remove(connection)

    def _on_ready(self) -> None:
        self._drain()
        if self._clock.stamps and self._in_flight >= TICK_FROM:
            self._loop.remove_reader(self._epoll.fileno())
            self._tick_timer = self._loop.call_later(TICK_S, self._tick)

    def _tick(self) -> None:
        if self._drain():
            self._tick_timer = self._loop.call_soon(self._tick)
        elif self._clock.stamps and self._in_flight >= TICK_FROM // 2:
            self._tick_timer = self._loop.call_later(TICK_S, self._tick)
        else:
            self._tick_timer = None
            self._loop.add_reader(self._epoll.fileno(), self._on_ready)

    def _drain_if_late(self) -> None:
        if self._in_flight and time.monotonic() - self._clock.looked_s > TICK_S:
            self._drain()

    def _drain(self) -> bool:
        """Reads every socket that has something, for SLICE_S at most; whether that was not enough."""
        self._clock.look()
        end_s = self._clock.looked_s + SLICE_S
        connections, instant = self._connections, self._clock.instant
        while ready := self._epoll.poll(0, SLICE_SOCKETS):
            for fd, events in ready:
                connection = connections[fd]
                exchange = connection.exchange
                if events & select.EPOLLOUT and exchange is not None:
                    self._write(connection, exchange, exchange.unsent)
                try:
                    data, ancillary, _, _ = connection.sock.recvmsg(READ_BYTES, ANCILLARY_BYTES)
                except (BlockingIOError, InterruptedError):
                    continue
                except OSError as e:
                    self._lose(connection, e if isinstance(e, ConnectionError) else ConnectionError(str(e)))
                    continue
                if data and exchange is not None:
                    exchange.read_at = instant(ancillary, exchange.read_at)
                    self._arrived(connection, exchange, data)
                else:
                    self._closed_by_server(connection)
            if len(ready) < SLICE_SOCKETS:
                break
            if time.monotonic() > end_s:
                return True
        return False

    def _arrived(self, connection: _Connection, exchange: _Exchange, data: bytes) -> None:
        response, reads = exchange.response, exchange.reads
        try:
            body = response.feed(data)
        except BadResponse as e:
            self._lose(connection, e)
            return
        if body:
            reads.append((exchange.read_at, body))
        if response.whole:
            self._finished(connection, exchange)
        elif len(reads) >= exchange.batch_reads and exchange.parser is not None:
            if exchange.is_stream:
                exchange.parser.feed(reads)
                reads.clear()
                exchange.batch_reads = BATCH_READS
            else:
                exchange.parser = None

    def _closed_by_server(self, connection: _Connection) -> None:
        """The server closed the connection, or sent what nobody had asked for."""
        exchange = connection.exchange
        if exchange is None:
            self._lose(connection, None)
            return
        try:
            exchange.response.end()
        except BadResponse as e:
            self._lose(connection, e)
        else:
            self._finished(connection, exchange)

    def _finished(self, connection: _Connection, exchange: _Exchange) -> None:
        if exchange.parser is not None and not exchange.is_stream:
            exchange.parser = None
        if exchange.response.keep_alive and not exchange.response.extra and not exchange.unsent:
            connection.exchange = None
            self._in_flight -= 1
            self._release(connection)
        else:
            self._lose(connection, None)
        self._hand_over(exchange.whole)

    def _hand_over(self, whole: "asyncio.Future[None]") -> None:
        """Wakes a call that ended; of many at once the rest in the turns of the loop that follow, for each keeps it a while."""
        if self._turn_left == HANDED_OVER_A_TURN:
            self._loop.call_soon(self._next_turn)
        if self._turn_left:
            self._turn_left -= 1
            if not whole.done():
                whole.set_result(None)
        else:
            self._ended.append(whole)

    def _next_turn(self) -> None:
        self._turn_left = HANDED_OVER_A_TURN
        for _ in range(min(HANDED_OVER_A_TURN, len(self._ended))):
            self._hand_over(self._ended.popleft())
