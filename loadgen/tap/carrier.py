"""The process that passes bytes on, and does nothing else: `python -m fanmark.loadgen.tap.carrier`, started by the tap with its port and a
pair of sockets to tell of what passes. It ends, and all connections with it, when the tap does."""

import asyncio
import os
import socket
import sys
import time
from collections import Counter
from contextlib import suppress
from typing import Any

import msgspec

from fanmark.loadgen.collecting import rare_collections
from fanmark.loadgen.execute import allow_connections
from fanmark.loadgen.health import Health
from fanmark.loadgen.tap.frames import GROUPING, UNTOLD, Beat, Began, Ended, More, Reads, beat, packed
from fanmark.loadgen.tap.heads import Upstream
from fanmark.loadgen.tap.wire import Client, Exchange, Wire

CONNECTIONS = 8_192
MOST_WAITING_BYTES = 1 << 28  # of what the tap has not taken yet
_TELL_S = 0.005  # what passes is told so often, many messages at once
_BEAT_S = 1.0


class Teller(asyncio.Protocol):
    """Tells the tap of every exchange. What it does not take yet waits in memory, up to `most_bytes`: beyond that a request is not told of,
    nor the rest of a reply, and `untold` counts the requests of which the tap does not know all."""

    def __init__(self, most_bytes: int = MOST_WAITING_BYTES) -> None:
        self.over = asyncio.Event()  # the tap wants no more, or is gone
        self.untold = 0
        self._most_bytes = most_bytes
        self._transport: Any = None
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0
        self._n = 0

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def eof_received(self) -> bool:
        self.over.set()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self.over.set()

    def put(self, frame: Began | More | Ended | Beat) -> None:
        """Tells it soon."""
        if not self._waiting:
            asyncio.get_running_loop().call_later(_TELL_S, self.flush)
        self._waiting.append(packed(frame))
        self._waiting_bytes += len(self._waiting[-1])

    def flush(self) -> None:
        """Tells what waits."""
        if self._waiting and not self._transport.is_closing():
            self._transport.write(b"".join(self._waiting))
        self._waiting.clear()
        self._waiting_bytes = 0

    async def close(self) -> None:
        """Waits until all is told, or nobody listens."""
        self.flush()
        self._transport.close()
        while not self._transport.is_closing() or self._transport.get_write_buffer_size():  # noqa: ASYNC110  # a transport tells nobody
            await asyncio.sleep(0.005)

    def _has_room(self, n_bytes: int) -> bool:
        waiting: int = self._waiting_bytes + self._transport.get_write_buffer_size()
        return waiting + n_bytes <= self._most_bytes

    def _reads(self, exchange: Exchange) -> Reads:
        """What is to be told of the reply; nothing more once there was no room."""
        reads, exchange.reads = exchange.reads, []
        if exchange.number and not exchange.untold and not self._has_room(sum(len(data) for _, data in reads)):
            exchange.untold = True
            self.untold += 1
        return [] if exchange.untold else reads

    def began(self, exchange: Exchange) -> None:
        headers = {name: value for name, value in exchange.headers.items() if name in GROUPING}
        exchange.headers = {}
        if not self._has_room(len(exchange.body)):
            exchange.untold = True
            self.untold += 1
            return
        self._n += 1
        exchange.number = self._n
        self.put(Began(self._n, exchange.api, headers, exchange.body, exchange.came_at))

    def read(self, exchange: Exchange) -> None:
        if reads := self._reads(exchange):
            self.put(More(exchange.number, exchange.status, exchange.content_type, reads))

    def ended(self, exchange: Exchange) -> None:
        reads = self._reads(exchange)
        if not exchange.number:
            return
        self.put(
            Ended(
                exchange.number, exchange.status, exchange.content_type, reads, exchange.sent_at, exchange.connect_s,
                exchange.done_at or time.monotonic(), UNTOLD if exchange.untold else exchange.error,
            )
        )  # fmt: skip


class _Nobody:
    """There is no load whose delays could be looked at: the verdict is on the loop alone."""

    def __init__(self) -> None:
        self.send_delay: Counter[int] = Counter()
        self.ttft: Counter[int] = Counter()
        self.clients: dict[int, Any] = {}
        self.arms: dict[str, Any] = {}


async def carry(listener: socket.socket, link: socket.socket, upstreams: list[Upstream]) -> None:
    """Passes on until the tap wants no more."""
    loop = asyncio.get_running_loop()
    allow_connections(2 * CONNECTIONS)
    _, teller = await loop.create_connection(Teller, sock=link)
    wire = Wire(upstreams, teller)
    server = await loop.create_server(lambda: Client(wire), sock=listener, backlog=1024)
    health = Health(time.monotonic)
    watching = asyncio.ensure_future(health.watch(_Nobody()))
    with rare_collections():
        while not teller.over.is_set():
            teller.put(beat(health.look(), wire.passed, teller.untold))
            with suppress(TimeoutError):
                async with asyncio.timeout(_BEAT_S):
                    await teller.over.wait()
    server.close()
    wire.close()
    await asyncio.sleep(0)
    watching.cancel()
    teller.put(beat(health.look(), wire.passed, teller.untold))
    await teller.close()


def main() -> int:
    """Arguments: the two sockets' descriptors and the upstreams as JSON."""
    import uvloop

    listener, link = (socket.socket(fileno=int(fd)) for fd in sys.argv[1:3])
    upstreams = msgspec.json.decode(sys.argv[3], type=list[Upstream])
    for sock in (listener, link):
        os.set_inheritable(sock.fileno(), False)
        sock.setblocking(False)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(carry(listener, link, upstreams))
    return 0


if __name__ == "__main__":
    sys.exit(main())
