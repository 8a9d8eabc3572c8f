"""The carrier as the tap sees it: started with its port, heard, and ended."""

import asyncio
import socket
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from typing import Any

import msgspec

from fanmark.loadgen.errors import LostError
from fanmark.loadgen.tap.frames import Frame, Unpacker
from fanmark.loadgen.tap.heads import Upstream

_READY_S = 30.0
_END_S = 10.0


class Listener(asyncio.Protocol):
    """Hears the carrier out. `heard`: it has said something, so that its port is open; `gone`: it says no more."""

    def __init__(self, take: Callable[[Frame], None]) -> None:
        self.heard = asyncio.Event()
        self.gone = asyncio.Event()
        self.error: Exception | None = None
        self._unpacker = Unpacker(take)
        self._transport: Any = None

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self.heard.set()
        self._unpacker.feed(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self.error = exc
        self.heard.set()
        self.gone.set()

    def end(self) -> None:
        """The carrier is to pass on no more, and to tell the rest."""
        if not self._transport.is_closing():
            self._transport.write_eof()


class Carried:
    """A carrier that runs."""

    def __init__(self, process: asyncio.subprocess.Process, listener: Listener, words: Any) -> None:
        self._process = process
        self._listener = listener
        self._words = words

    @property
    def gone(self) -> asyncio.Event:
        """Set when it says no more."""
        return self._listener.gone

    async def end(self) -> None:
        """Ends all connections, once; what passed until then is told. Raises LostError where it died before."""
        died = self._listener.gone.is_set()
        self._listener.end()
        try:
            async with asyncio.timeout(_END_S):
                await self._listener.gone.wait()
                await self._process.wait()
        except TimeoutError:
            self.kill()
            await self._process.wait()
        if self._listener.error is not None:
            raise self._listener.error
        if died:
            raise LostError(
                f"the tap's carrier ended ({self._process.returncode}): {self.last_words() or 'without a word'}"
            )

    def last_words(self) -> str:
        """What it wrote last."""
        self._words.seek(0)
        return " | ".join(self._words.read().strip().splitlines()[-3:])

    def kill(self) -> None:
        """At once, if it runs."""
        if self._process.returncode is None:
            self._process.kill()


async def start(
    port: socket.socket, upstreams: Sequence[Upstream], take: Callable[[Frame], None], stack: AsyncExitStack
) -> Carried:
    """Starts a carrier on an open port; it does not outlive `stack`. Raises LostError."""
    words = tempfile.TemporaryFile("w+")  # noqa: SIM115  # `stack` closes it
    stack.callback(words.close)
    ours, theirs = socket.socketpair()
    with theirs:
        fds = (port.fileno(), theirs.fileno())
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "fanmark.loadgen.tap.carrier", *map(str, fds), msgspec.json.encode(upstreams).decode(),
            pass_fds=fds, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=words, start_new_session=True,
        )  # fmt: skip
    transport, listener = await asyncio.get_running_loop().create_connection(lambda: Listener(take), sock=ours)
    carried = Carried(process, listener, words)
    stack.callback(transport.close)
    stack.push_async_callback(process.wait)
    stack.callback(carried.kill)
    try:
        async with asyncio.timeout(_READY_S):
            await listener.heard.wait()
    except TimeoutError:
        raise LostError(f"the tap's carrier does not start within {_READY_S:g} s") from None
    if listener.gone.is_set():
        await process.wait()
        raise LostError(f"the tap's carrier did not start: {carried.last_words()}")
    return carried
