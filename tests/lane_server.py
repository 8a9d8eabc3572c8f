"""A server that plays byte scripts, the lanes that are tested against it, and what calls to it come to."""

import asyncio
import json
import socket
import ssl
import struct
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import uvloop
from test_sse import counts

from fanmark.loadgen.errors import CallError
from fanmark.loadgen.lanes.fast import FastLane
from fanmark.loadgen.lanes.http import HttpError, HttpLane, Sent
from fanmark.loadgen.lanes.sse import Reply

T = TypeVar("T")
Make = Callable[..., Any]


@cache
def authorities() -> ssl.SSLContext:
    """The system's, read once: each lane of its own takes 20 ms for it."""
    return ssl.create_default_context()


def openai_lane(*arguments: Any, **options: Any) -> Any:
    from fanmark.loadgen.lanes.openai_sdk import OpenaiLane

    return OpenaiLane(*arguments, **{"tls": authorities(), **options})


LANES: dict[str, Make] = {"fast": FastLane, "aiohttp": HttpLane, "openai": openai_lane}
CERTIFICATE = Path(__file__).parent / "data" / "tls" / "loopback.pem"
SSE = b"Content-Type: text/event-stream; charset=utf-8\r\n"
JSON = b"Content-Type: application/json\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"
ASKED: dict[str, Any] = {  # with two fields that are vLLM's own
    "model": "m",
    "messages": [{"role": "user", "content": "Zürich?"}],
    "max_tokens": 4,
    "stream": True,
    "stream_options": {"include_usage": True},
    "ignore_eos": True,
    "cache_salt": "s",
}


def head(*lines: bytes, status: bytes = b"200 OK", version: bytes = b"1.1") -> bytes:
    return b"HTTP/" + version + b" " + status + b"\r\n" + b"".join(lines) + b"\r\n"


def chunked(parts: Iterable[bytes], extension: bytes = b"", trailer: bytes = b"") -> bytes:
    sized = [b"%x" % len(part) + extension + b"\r\n" + part + b"\r\n" for part in parts if part]
    return b"".join(sized) + b"0" + extension + b"\r\n" + trailer + b"\r\n"


def in_parts(data: bytes, size: int) -> list[bytes]:
    return [data[i : i + size] for i in range(0, len(data), size)]


@dataclass
class Script:
    """What the server answers to each request in turn, piece by piece, the last answer again and again. After a None it closes the
    connection; after ... it says no more and waits for the client to go."""

    answers: Sequence[Sequence[Any]]
    reset: bool = False
    tls: bool = False
    connections: int = 0
    gone: int = 0
    requests: list[bytes] = field(default_factory=list)
    url: str = ""
    asked: asyncio.Event = field(default_factory=asyncio.Event)
    left: asyncio.Event = field(default_factory=asyncio.Event)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                sizes = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
                body = await reader.readexactly(int(sizes[0].split(b":")[1]) if sizes else 0)
                self.requests.append(head + body)
                self.asked.set()
                for piece in self.answers[min(len(self.requests), len(self.answers)) - 1]:
                    if piece is None:
                        return
                    if piece is ...:
                        await reader.read()
                        return
                    if writer.is_closing():
                        return
                    writer.write(piece)
                    await asyncio.sleep(0)  # lets the client see it
                    await asyncio.sleep(0)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            if self.reset:
                linger = struct.pack("ii", 1, 0)
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()
            self.gone += 1
            self.left.set()


def on_a_loop(part: Awaitable[T], *, own: bool = False) -> T:
    """Runs on uvloop, as the command line does, or on asyncio's own loop. Nothing may be left when it ends."""

    async def whole() -> T:
        found = await part
        for _ in range(200):
            if len(asyncio.all_tasks()) == 1:
                break
            await asyncio.sleep(0)
        assert len(asyncio.all_tasks()) == 1
        return found

    with asyncio.Runner(loop_factory=None if own else uvloop.new_event_loop) as runner:
        return runner.run(whole())


async def with_server(script: Script, use: Callable[[Script], Awaitable[T]]) -> T:
    context = None
    if script.tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(CERTIFICATE)
    server = await asyncio.start_server(script.serve, "127.0.0.1", 0, backlog=1024, ssl=context)
    script.url = f"{'https' if script.tls else 'http'}://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        return await use(script)
    finally:
        server.close()
        await server.wait_closed()


def on_a_lane(make: Make, script: Script, use: Callable[[Any, Script], Awaitable[T]], **options: Any) -> T:
    """What `use` finds with a lane of its own and a server that plays the script."""

    async def with_lane(served: Script) -> T:
        lane = make(time.monotonic, **options)
        try:
            return await use(lane, served)
        finally:
            await lane.close()

    return on_a_loop(with_server(script, with_lane))


async def call(lane: Any, url: str, *, timeout_s: float = 5.0, sent: Sent | None = None, **more: Any) -> Reply:
    headers = {"Content-Type": "application/json", "X-Request-Id": "r"}
    body = json.dumps({**ASKED, **more}).encode()
    where = f"{url}/v1/chat/completions"
    found: Reply = await lane.send(where, body, headers, stream=True, timeout_s=timeout_s, sent=sent or Sent())
    return found


def told(reply: Reply) -> tuple[object, ...]:
    """What a reply says but for how its chunks came together in time."""
    return counts(reply)[:4]


async def outcome(lane: Any, url: str, **more: Any) -> Any:
    """What a call came to."""
    try:
        return told(await call(lane, url, **more))
    except HttpError as e:
        return e.kind, e.status, e.body, e.headers.get("retry-after")
    except CallError as e:
        return e.kind


def outcomes(make: Make, script: Script, times: int = 1, **options: Any) -> tuple[list[Any], int]:
    """Outcomes of `times` calls one after another, and the connections that they took."""

    async def use(lane: Any, served: Script) -> tuple[list[Any], int]:
        return [await outcome(lane, served.url) for _ in range(times)], served.connections

    return on_a_lane(make, script, use, **options)
