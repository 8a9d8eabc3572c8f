"""How the aiohttp lane takes a body: in the callback in which it arrives, stamped, past the reader that would wake a task for each piece.

aiohttp frames and decompresses as ever. The protocol of each connection is its own with two additions: it notes when bytes came, and once a
head is there it hands that response's reader a `Body` to feed. What is not ours to hook (a tunnel through a proxy, a WebSocket) stays as it
is. Uses a few names that aiohttp does not document (the reader's buffer, the connector's factory); tests/test_lanes.py holds them.
"""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

import aiohttp
from aiohttp.client_proto import ResponseHandler
from aiohttp.streams import StreamReader

from fanmark.loadgen.lanes.http import Body


class _BodyReader(StreamReader):
    """A reader whose data go to the Body in its buffer's place. Nobody reads it, so nothing waits, and nothing is paused."""

    __slots__ = ()

    def feed_data(self, data: bytes, size: int = 0) -> bool:
        if data:
            self._buffer.take(self._protocol.arrived_at, data)  # type: ignore[attr-defined]
        return False

    def begin_http_chunk_receiving(self) -> None:
        """Chunks are of no account."""

    def end_http_chunk_receiving(self) -> None:
        """Chunks are of no account."""


class _Connection(ResponseHandler):
    def __init__(self, loop: asyncio.AbstractEventLoop, now: Callable[[], float]) -> None:
        super().__init__(loop)
        self._now = now
        self.arrived_at = 0.0

    def data_received(self, data: bytes) -> None:
        self.arrived_at = self._now()
        super().data_received(data)

    def feed_data(self, data: Any, size: int = 0) -> None:
        """A head, and the reader of its body, which holds what came with the head."""
        message, reader = data
        if type(reader) is StreamReader:
            is_stream = message.code < 300 and "event-stream" in message.headers.get("Content-Type", "").lower()
            body, first = Body(is_stream), b"".join(reader._buffer)
            reader._buffer = body  # type: ignore[assignment]
            reader.__class__ = _BodyReader
            reader.feed_data(first)
            if self._reading_paused:  # so much came with the head that the reader wanted no more
                self._loop.call_soon(self.resume_reading)
        super().feed_data(data, size)

    def connection_lost(self, exc: BaseException | None) -> None:
        reader = self._payload
        super().connection_lost(exc)
        if reader is not None and not reader.is_eof() and reader.exception() is None:  # framing that broke amid a body
            reader.set_exception(aiohttp.ClientPayloadError(f"the connection ended amid the body: {exc or 'closed'}"))


class BodyConnector(aiohttp.TCPConnector):
    """Opens connections that take bodies as they arrive, stamped by `now`."""

    def __init__(self, now: Callable[[], float], **options: Any) -> None:
        super().__init__(**options)
        self._factory = partial(_Connection, self._loop, now)  # type: ignore[assignment]


async def whole_body(reader: StreamReader) -> Body:
    """The body of a response, once it is whole."""
    if not reader.is_eof():
        if (error := reader.exception()) is not None:
            raise error
        await reader.wait_eof()
    return reader._buffer if isinstance(reader, _BodyReader) else Body(False)  # type: ignore[return-value]
