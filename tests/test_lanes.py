"""Every lane against one scripted server: whatever a network and a server do to a reply, the lanes tell the same of it."""

import asyncio
import socket
import struct
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeVar

import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sse import BREADTH, DONE, ENDS, NO_REPLY, STREAMS, USAGE, chunk, counts, split

from fanmark.loadgen.errors import CallError
from fanmark.loadgen.lanes import fast
from fanmark.loadgen.lanes.fast import FastLane
from fanmark.loadgen.lanes.http import HttpError, HttpLane, Sent
from fanmark.loadgen.lanes.http1 import BadResponse, Response
from fanmark.loadgen.lanes.sse import Reply, StreamParser, parse_stream
from fanmark.loadgen.lanes.stamps import ReceiveClock
from fanmark.loadgen.scenario import Target
from fanmark.loadgen.target import connect

T = TypeVar("T")
Lane = FastLane | HttpLane
LANES: dict[str, Callable[..., Lane]] = {"fast": FastLane, "aiohttp": HttpLane}
SSE = b"Content-Type: text/event-stream; charset=utf-8\r\n"
JSON = b"Content-Type: application/json\r\n"


@dataclass
class Script:
    """What the server answers to each request in turn, piece by piece, the last answer again and again. After a None it closes the
    connection; after ... it says no more and waits for the client to go."""

    answers: Sequence[Sequence[Any]]
    reset: bool = False
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
        return found

    with asyncio.Runner(loop_factory=None if own else uvloop.new_event_loop) as runner:
        return runner.run(whole())


async def with_server(script: Script, use: Callable[[Script], Awaitable[T]]) -> T:
    server = await asyncio.start_server(script.serve, "127.0.0.1", 0, backlog=1024)
    script.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        return await use(script)
    finally:
        server.close()
        await server.wait_closed()


async def call(
    lane: Lane, url: str, *, stream: bool = True, timeout_s: float = 5.0, body: bytes = b"{}", sent: Sent | None = None
) -> Reply:
    headers = {"Content-Type": "application/json", "X-Request-Id": "r"}
    return await lane.send(
        f"{url}/v1/chat/completions", body, headers, stream=stream, timeout_s=timeout_s, sent=sent or Sent()
    )


def told(reply: Reply) -> tuple[object, ...]:
    """What a reply says but for how its chunks came together in time."""
    return counts(reply)[:4]


async def outcome(lane: Lane, url: str, **more: Any) -> object:
    """What a call came to, to be compared between lanes."""
    try:
        return told(await call(lane, url, **more))
    except HttpError as e:
        return e.kind, e.status, e.body, str(e)
    except CallError as e:
        return e.kind


def of_each_lane(answers: Sequence[Sequence[Any]], reset: bool = False, times: int = 1, **more: Any) -> dict[str, Any]:
    """Outcomes of `times` calls one after another, and the connections that they took, by lane."""

    async def one(make: Callable[..., Lane]) -> Any:
        async def use(script: Script) -> Any:
            lane = make(time.monotonic)
            found = [await outcome(lane, script.url, **more) for _ in range(times)]
            await lane.close()
            return found, script.connections

        return await with_server(Script(answers, reset), use)

    async def all_lanes() -> dict[str, Any]:
        return {name: await one(make) for name, make in LANES.items()}

    return on_a_loop(all_lanes())


def head(*lines: bytes, status: bytes = b"200 OK", version: bytes = b"1.1") -> bytes:
    return b"HTTP/" + version + b" " + status + b"\r\n" + b"".join(lines) + b"\r\n"


def chunked(parts: Iterable[bytes], extension: bytes = b"", trailer: bytes = b"") -> bytes:
    sized = [b"%x" % len(part) + extension + b"\r\n" + part + b"\r\n" for part in parts if part]
    return b"".join(sized) + b"0" + extension + b"\r\n" + trailer + b"\r\n"


def in_parts(data: bytes, size: int) -> list[bytes]:
    return [data[i : i + size] for i in range(0, len(data), size)]


CHUNKED = b"Transfer-Encoding: chunked\r\n"
EVENTS = [event + b"\n\n" for event in BREADTH.split(b"\n\n")[:-1]]
LENGTH = b"Content-Length: %d\r\n" % len(BREADTH)
WHOLE = {  # a response, and whether its connection serves the next one
    "a chunk an event": (head(SSE, CHUNKED) + chunked(EVENTS), True),
    "a chunk an event and a half": (head(SSE, CHUNKED) + chunked(in_parts(BREADTH, 137)), True),
    "chunks of 7 bytes, amid characters": (head(SSE, CHUNKED) + chunked(in_parts(BREADTH, 7)), True),
    "one chunk": (head(SSE, CHUNKED) + chunked([BREADTH]), True),
    "chunk extensions": (head(SSE, CHUNKED) + chunked(EVENTS, b";name=value"), True),
    "trailers": (head(SSE, CHUNKED) + chunked(EVENTS, trailer=b"Server-Timing: x\r\nB: c\r\n"), True),
    "sizes in capitals": (
        head(SSE, CHUNKED) + chunked([BREADTH]).replace(b"%x" % len(BREADTH), b"%X" % len(BREADTH)),
        True,
    ),
    "a given length": (head(SSE, LENGTH) + BREADTH, True),
    "header names in any case": (
        head(SSE.replace(b"Content-T", b"cONTENT-t"), CHUNKED.upper().replace(b"CHUNKED", b"Chunked"))
        + chunked(EVENTS),
        True,
    ),
    "until the end of the connection": (head(SSE) + BREADTH, False),
    "HTTP/1.0": (head(SSE, version=b"1.0") + BREADTH, False),
    "HTTP/1.0 that is kept": (head(SSE, LENGTH, b"Connection: keep-alive\r\n", version=b"1.0") + BREADTH, True),
    "Connection: close": (head(SSE, CHUNKED, b"Connection: close\r\n") + chunked(EVENTS), False),
    "100 Continue before it": (head(status=b"100 Continue") + head(SSE, CHUNKED) + chunked(EVENTS), True),
    "two interim responses": (
        head(status=b"102 Processing")
        + head(b"Link: </x>\r\n", status=b"103 Early Hints")
        + head(SSE, LENGTH)
        + BREADTH,
        True,
    ),
    "no reason phrase": (head(SSE, CHUNKED, status=b"200 ") + chunked(EVENTS), True),
}
MEANT = told(parse_stream([(1.0, BREADTH)]))


@pytest.mark.parametrize(("response", "kept"), WHOLE.values(), ids=WHOLE)
def test_a_reply_is_the_same_however_it_is_framed_and_cut(response: bytes, kept: bool) -> None:
    end = [] if kept else [None]
    answers = [[response, *end], [*in_parts(response, 1), *end], [*in_parts(response, 61), *end]]
    found = of_each_lane(answers, times=3)
    assert found["fast"] == ([MEANT] * 3, 1 if kept else 3)
    assert found["aiohttp"] == found["fast"]


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("name", STREAMS)
def test_a_recorded_stream_is_the_same_in_every_lane(name: str, end: str) -> None:
    stream = STREAMS[name].replace(b"\n", ENDS[end]).replace(b"data: ", b": alive" + ENDS[end] + b"data: ")
    response = head(SSE, CHUNKED) + chunked(in_parts(stream, 101))
    found = of_each_lane([in_parts(response, 997), in_parts(response, 83)], times=2)
    assert found["fast"] == ([told(parse_stream([(1.0, STREAMS[name])]))] * 2, 1)
    assert found["aiohttp"] == found["fast"]


BODY = b'{"choices":[{"message":{"content":"Z\xc3\xbcrich"},"finish_reason":"stop"}],"usage":{"prompt_tokens":3}}'
NOT_STREAMED = {
    "a JSON body of a given length": [head(JSON, b"Content-Length: %d\r\n" % len(BODY)) + BODY],
    "a JSON body in chunks": [head(JSON, CHUNKED) + chunked(in_parts(BODY, 9))],
    "a JSON body until the end": [head(JSON) + BODY, None],
    "429 with a body": [
        head(JSON, b"Content-Length: 9\r\n", b"Retry-After: 1\r\n", status=b"429 Too Many Requests") + b"slow down"
    ],
    "400 in chunks": [
        head(JSON, CHUNKED, status=b"400 Bad Request") + chunked([b'{"error":{"message":"no \xe2\x82\xac"}}'])
    ],
    "503 without a body": [head(b"Content-Length: 0\r\n", status=b"503 Service Unavailable")],
    "500 until the end": [head(status=b"500 Oops") + b"<html>", None],
    "502 that says it is a stream": [head(SSE, CHUNKED, status=b"502 Bad Gateway") + chunked(in_parts(b"no " * 50, 5))],
    "an error of another encoding": [head(b"Content-Length: 3\r\n", status=b"400 Bad Request") + b"\xff\xfea"],
    "no content": [head(status=b"204 No Content")],
    "a JSON error in a 200": [head(JSON, b"Content-Length: 24\r\n") + b'{"error":{"message":""}}'],
    "an error body that is cut": [head(b"Content-Length: 99\r\n", status=b"500 Oops") + b"half", None],
}


@pytest.mark.parametrize("answer", NOT_STREAMED.values(), ids=NOT_STREAMED)
def test_what_is_no_stream_is_told_the_same(answer: list[Any]) -> None:
    pieces = [one for part in answer for one in ([part] if part is None else in_parts(part, 40))]
    found = of_each_lane([answer, pieces], times=2)
    assert found["fast"] == found["aiohttp"]
    assert found["fast"][0][0] == found["fast"][0][1]


@pytest.mark.parametrize(("stream", "kind"), NO_REPLY.values(), ids=NO_REPLY)
def test_what_is_no_reply_is_an_error_of_one_class(stream: bytes, kind: str) -> None:
    response = head(SSE, CHUNKED) + chunked(in_parts(stream, 50))
    found = of_each_lane([[response], in_parts(response, 20)], times=2)
    assert found["fast"] == ([kind, kind], 1) == found["aiohttp"]


NOT_HTTP = {
    "no HTTP at all": b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
    "a chunk without a size": head(SSE, CHUNKED) + b"xyz\r\n\r\n",
    "a chunk longer than its size": head(SSE, CHUNKED) + b"3\r\nabcd\r\n0\r\n\r\n",
    "a length that is none": head(SSE, b"Content-Length: -3\r\n") + BREADTH,
    "a header without a colon": head(b"nonsense\r\n"),
}


@pytest.mark.parametrize("response", NOT_HTTP.values(), ids=NOT_HTTP)
def test_what_is_not_http_cuts_the_stream(response: bytes) -> None:
    for answer in ([response, None], [*in_parts(response, 1), None]):
        whole = of_each_lane([answer])
        assert whole["fast"][0] == ["stream_cut"] == whole["aiohttp"][0]
    assert read_error(in_parts(response, 1)) == read_error([response])


@pytest.mark.parametrize("reset", [False, True], ids=["end", "reset"])
def test_a_reply_cut_at_any_byte_is_an_error_or_whole_and_the_same_in_every_lane(reset: bool) -> None:
    short = chunk("a") + chunk("é", "length") + USAGE + DONE
    response = head(SSE, CHUNKED) + chunked([short[:50], short[50:]])
    places = range(0, len(response) + 1, 7 if reset else 1)
    found = of_each_lane([[response[:place], None] for place in places], reset, times=len(places))
    outcomes = found["fast"][0]
    assert outcomes[:-1] == ["stream_cut"] * (len(places) - 1) or reset
    assert not reset or set(map(str, outcomes)) <= {"stream_cut", str(told(parse_stream([(1.0, short)])))}
    if not reset:  # after a reset, what had come before it may be lost, or not
        assert outcomes == found["aiohttp"][0] and outcomes[-1] == told(parse_stream([(1.0, short)]))


def test_a_body_of_given_length_cut_at_any_byte() -> None:
    response = head(JSON, b"Content-Length: %d\r\n" % len(BODY)) + BODY
    found = of_each_lane([[response[:i], None] for i in range(len(response))], times=len(response))
    assert set(found["fast"][0]) == {"stream_cut"} and found["aiohttp"][0] == found["fast"][0]


@pytest.mark.parametrize("answer", [[...], [head(SSE, CHUNKED) + chunked(EVENTS)[:300], ...], [head(SSE)[:9], ...]])
def test_out_of_time_closes_the_connection_and_the_next_call_has_its_own(answer: list[Any]) -> None:
    good = [head(SSE, CHUNKED) + chunked(EVENTS)]

    async def one(make: Callable[..., Lane], script: Script) -> tuple[object, ...]:
        lane, sent = make(time.monotonic), Sent()
        first = await outcome(lane, script.url, timeout_s=0.05, sent=sent)
        second = await outcome(lane, script.url)
        await lane.close()
        return first, sent.at is not None, second, script.connections, script.gone >= 1

    for make in LANES.values():
        found = on_a_loop(with_server(Script([answer, good]), lambda script, make=make: one(make, script)))  # type: ignore[misc]
        assert found == ("timeout", True, MEANT, 2, True)


def test_a_cancelled_call_is_aborted_at_the_server() -> None:
    async def one(make: Callable[..., Lane], script: Script) -> tuple[object, ...]:
        lane = make(time.monotonic)
        task = asyncio.ensure_future(call(lane, script.url))
        await script.asked.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with asyncio.timeout(5):
            await script.left.wait()
        again = await outcome(lane, script.url)
        await lane.close()
        return again, script.connections

    stalled: list[Any] = [head(SSE, CHUNKED) + chunked(EVENTS)[:200], ...]
    for make in LANES.values():
        answers: list[Sequence[Any]] = [stalled, [head(SSE, CHUNKED) + chunked(EVENTS)]]
        assert on_a_loop(with_server(Script(answers), lambda script, make=make: one(make, script))) == (MEANT, 2)  # type: ignore[misc]


def test_a_port_that_refuses_and_a_name_that_is_none() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]

        async def one(make: Callable[..., Lane]) -> tuple[object, ...]:
            lane, sent = make(time.monotonic), Sent()
            found = await outcome(lane, f"http://127.0.0.1:{port}", sent=sent)
            with pytest.raises(CallError) as caught:
                await lane.get(f"http://127.0.0.1:{port}/v1/models", {})
            await lane.close()
            return found, sent.at, caught.value.kind

        for make in LANES.values():
            assert on_a_loop(one(make)) == ("connect", None, "connect")


def test_gets_and_posts_that_are_no_calls() -> None:
    async def one(make: Callable[..., Lane], script: Script) -> tuple[object, ...]:
        lane = make(time.monotonic)
        found = (
            await lane.get(f"{script.url}/v1/models?a=b", {"Authorization": "Bearer k"}),
            await lane.post(f"{script.url}/tokenize", b"abc", {}),
        )
        with pytest.raises(CallError) as caught:
            await lane.get(f"{script.url}/silent", {}, timeout_s=0.05)
        await lane.close()
        return *found, caught.value.kind, [request.partition(b" HTTP/1.1\r\n")[0] for request in script.requests]

    answers = [
        [head(JSON, CHUNKED) + chunked([b"[]"])],
        [head(b"Content-Length: 2\r\n", status=b"404 No") + b"no"],
        [...],
    ]
    lines = [b"GET /v1/models?a=b", b"POST /tokenize", b"GET /silent"]
    for make in LANES.values():
        found = on_a_loop(with_server(Script(answers), lambda script, make=make: one(make, script)))  # type: ignore[misc]
        assert found == ((200, b"[]"), (404, b"no"), "timeout", lines)


def test_what_goes_over_the_wire() -> None:
    async def use(script: Script) -> Script:
        lane = FastLane(time.monotonic)
        await call(lane, script.url, body=b'{"model":"m"}')
        with pytest.raises(ValueError, match="end of line"):
            await lane.get(script.url, {"X-A": "b\r\nX-C: d"})
        for wrong in ("https://127.0.0.1/", "http:///v1", "http://h:99999/", "http://127.0.0.1/\xe9", "http://a..b/"):
            with pytest.raises(CallError) as caught:
                await lane.get(wrong, {})
            assert caught.value.kind == "connect"
        await lane.close()
        return script

    script = on_a_loop(with_server(Script([[head(SSE, CHUNKED) + chunked(EVENTS)]]), use))
    host = script.url.removeprefix("http://").encode()
    assert script.requests == [
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: " + host + b"\r\nAccept: */*\r\nAccept-Encoding: identity\r\n"
        b"Content-Type: application/json\r\nX-Request-Id: r\r\nContent-Length: 13\r\n\r\n" + b'{"model":"m"}'
    ]


def test_a_large_prompt_goes_out_in_full() -> None:
    body = bytes(range(256)) * 80_000
    assert len(body) > 20_000_000

    async def use(script: Script) -> tuple[object, bool]:
        lane = FastLane(time.monotonic)
        found = await outcome(lane, script.url, body=body, timeout_s=30)
        await lane.close()
        return found, script.requests[0].endswith(body)

    assert on_a_loop(with_server(Script([[head(SSE, CHUNKED) + chunked(EVENTS)]]), use)) == (MEANT, True)


def test_a_server_that_answers_before_it_has_the_prompt() -> None:
    async def use(script: Script) -> tuple[Any, str]:
        async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(head(b"Content-Length: 9\r\n", status=b"413 Too Large") + b"too large")
            while await reader.read(65_536):
                pass
            writer.close()

        server = await asyncio.start_server(refuse, "127.0.0.1", 0)
        lane = FastLane(time.monotonic)
        found = await outcome(lane, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", body=bytes(30_000_000))
        said = repr(lane)
        await lane.close()
        server.close()
        return found, said

    found, said = on_a_loop(with_server(Script([]), use))
    assert found[:3] == ("http_4xx", 413, "too large") and said.startswith("FastLane(0 in flight, 0 idle")


@pytest.mark.parametrize("own", [False, True], ids=["uvloop", "asyncio"])
def test_many_streams_at_once_by_ticks(own: bool) -> None:
    n = 3 * fast.TICK_FROM
    response = [head(SSE, CHUNKED), *[b"%x\r\n" % len(e) + e + b"\r\n" for e in EVENTS], b"0\r\n\r\n"]

    async def use(script: Script) -> tuple[list[object], str, int, list[bool]]:
        lane = FastLane(time.monotonic)
        await lane.open_ahead(script.url, n)
        before = repr(lane)
        sent = [Sent() for _ in range(n)]
        replies = await asyncio.gather(*(call(lane, script.url, sent=s, timeout_s=30) for s in sent))
        in_time = [
            s.at is not None and s.at <= r.first_at <= r.done_at <= time.monotonic()
            for s, r in zip(sent, replies, strict=True)
        ]
        single = await outcome(lane, script.url)
        await lane.close()
        return [single, *map(told, replies)], before, script.connections, in_time

    found, before, after, in_time = on_a_loop(with_server(Script([response]), use), own=own)
    assert found == [MEANT] * (n + 1)
    assert before == f"FastLane(0 in flight, {n} idle, kernel stamps)" and after == n and all(in_time)


def test_a_connection_that_the_server_closed_while_idle_is_not_used() -> None:
    good = head(SSE, CHUNKED) + chunked(EVENTS)

    async def use(script: Script) -> tuple[list[object], int]:
        lane = FastLane(time.monotonic)
        found = [await outcome(lane, script.url)]
        await script.left.wait()
        found.append(await outcome(lane, script.url))
        await lane.close()
        return found, script.connections

    assert on_a_loop(with_server(Script([[good, None]]), use)) == ([MEANT, MEANT], 2)


def test_bytes_after_the_end_cost_the_connection() -> None:
    good = head(SSE, CHUNKED) + chunked(EVENTS)
    found = of_each_lane([[good + b"HTTP/1.1 200 OK\r\n"], [good]], times=2)
    assert found["fast"] == ([MEANT, MEANT], 2)


def test_a_wall_clock_that_is_set_does_not_matter() -> None:
    """The wall clock that the lane sees jumps by an hour at every other look; every stamp then stems from the run's own clock."""
    response = [head(SSE, CHUNKED), *[b"%x\r\n" % len(e) + e + b"\r\n" for e in EVENTS], b"0\r\n\r\n"]
    looks = iter(range(10**9))

    async def use(script: Script) -> list[tuple[float, Reply, float]]:
        lane = FastLane(time.monotonic, wall=lambda: time.time() + 3600 * (next(looks) % 4 - 2))
        found = []
        for _ in range(20):
            sent = Sent()
            reply = await call(lane, script.url, sent=sent)
            assert sent.at is not None
            found.append((sent.at, reply, time.monotonic()))
        await lane.close()
        return found

    for sent_at, reply, end_at in on_a_loop(with_server(Script([response]), use)):
        assert sent_at <= reply.first_at <= reply.done_at <= end_at


def ancillary(wall_s: float) -> list[tuple[int, int, bytes]]:
    return [(1, 35, struct.pack("@qq", int(wall_s), round(wall_s % 1 * 1e9)))]


class Clocks:
    """A run's clock that starts at 0 and runs `scale` times slower than seconds, and the wall clock beside it."""

    def __init__(self, scale: float) -> None:
        self.start_s = time.monotonic()
        self.set_by_s = 0.0
        self.scale = scale

    def now(self) -> float:
        return (time.monotonic() - self.start_s) / self.scale

    def wall(self) -> float:
        return 1e9 + time.monotonic() - self.start_s + self.set_by_s


@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_kernel_stamps_are_on_the_runs_clock(scale: float) -> None:
    clocks = Clocks(scale)
    clock = ReceiveClock(clocks.now, scale, clocks.wall)
    clock.look()
    stamp_s = clocks.wall() - 0.5
    at = clock.instant(ancillary(stamp_s), -1.0)
    assert at == pytest.approx((stamp_s - 1e9) / scale, abs=2e-4)
    assert (clock.stamps, clock.refused) == (True, 0)


@pytest.mark.parametrize("step_s", [3600.0, -3600.0, 0.01])
def test_a_stamp_from_before_the_clock_was_set_is_refused(step_s: float) -> None:
    clocks = Clocks(1.0)
    clock = ReceiveClock(clocks.now, 1.0, clocks.wall)
    clock.look()
    before_s = clocks.wall()
    clocks.set_by_s = step_s
    clock.look()
    at = clock.instant(ancillary(before_s), 0.0)
    assert 0.0 <= at <= clocks.now() and clock.refused == 1
    clock.look()
    again_s = clocks.wall()
    assert clock.instant(ancillary(again_s), 0.0) == pytest.approx(again_s - step_s - 1e9, abs=2e-4)
    assert clock.instant(ancillary(again_s - 3600), 0.0) <= clocks.now()
    assert clock.instant(ancillary(again_s + 3600), 0.0) <= clocks.now()
    assert (clock.refused, clock.stamps) == (3, True)
    assert clock.instant([], 5.0) == 5.0 and not clock.stamps


def read(parts: Iterable[bytes]) -> tuple[bytes, int, bool, bool]:
    response = Response()
    body = b"".join([response.feed(part) for part in parts])
    return body, response.status, response.whole, response.extra


def read_error(parts: Iterable[bytes]) -> str:
    with pytest.raises(BadResponse) as caught:
        read(parts)
    return str(caught.value)


@settings(max_examples=100)
@given(st.sampled_from(sorted(WHOLE)), st.data())
def test_any_split_of_a_response_gives_the_same_body(name: str, data: st.DataObject) -> None:
    response, kept = WHOLE[name]
    places = sorted(data.draw(st.lists(st.integers(1, len(response) - 1), max_size=40)))
    body, status, whole, extra = read(response[a:b] for a, b in pairwise([0, *places, len(response)]))
    assert (body, status, extra) == (BREADTH, 200, False)
    assert whole is (kept or b"chunked" in response)


@settings(max_examples=200)
@given(st.sampled_from(sorted(WHOLE)), st.binary(max_size=12), st.data())
def test_noise_in_a_response_raises_one_kind_of_error_and_any_split_of_it_gives_the_same(
    name: str, noise: bytes, data: st.DataObject
) -> None:
    response, _ = WHOLE[name]
    place = data.draw(st.integers(0, len(response)))
    response = response[:place] + noise + response[place:]
    cut = data.draw(st.integers(0, len(response)))
    outcomes: list[object] = []
    for parts in ([response], [response[:cut], response[cut:]], in_parts(response, 1)):
        try:
            outcomes.append(read(parts))
        except BadResponse:
            outcomes.append("bad")
    assert outcomes[0] == outcomes[1] == outcomes[2]


@pytest.mark.parametrize(
    "response",
    [
        head(b"Content-Length: 1\r\nContent-Length: 2\r\n"),
        head(b"Transfer-Encoding: gzip, chunked\r\n"),
        head(b" folded\r\n"),
        head(status=b"101 Switching Protocols"),
        head(status=b"20 OK"),
        b"HTTP/2 200\r\n\r\n",
        b"x" * 70_000,
        head(CHUNKED) + b"1" * 2_000,
        head(CHUNKED) + b"0\r\n" + b"t" * 70_000,
        head(CHUNKED) + b"-3\r\nabc",
        head(CHUNKED) + b"0x3\r\nabc",
        head(CHUNKED) + b"1_0\r\nabc",
    ],
)
def test_what_the_framing_refuses(response: bytes) -> None:
    with pytest.raises(BadResponse):
        read([response])


@settings(max_examples=60)
@given(st.sampled_from(sorted(STREAMS)), st.sampled_from(sorted(ENDS)), st.data())
def test_a_stream_fed_in_batches_is_the_stream_fed_whole(name: str, end: str, data: st.DataObject) -> None:
    stream = STREAMS[name].replace(b"\n", ENDS[end])
    if data.draw(st.booleans()):  # a CR that turns up late
        stream = STREAMS[name][: len(STREAMS[name]) // 2] + STREAMS[name][len(STREAMS[name]) // 2 :].replace(
            b"\n", ENDS[end]
        )
    reads = split(stream, data.draw(st.lists(st.integers(1, len(stream) - 1), max_size=30)))
    edges = [0, *sorted(data.draw(st.lists(st.integers(0, len(reads)), max_size=8))), len(reads)]
    parser = StreamParser()
    for a, b in pairwise(edges):
        parser.feed(reads[a:b])
    assert parser.reply() == parse_stream(reads)


def test_a_plain_target_that_sends_on_elsewhere_is_left_to_aiohttp() -> None:
    listed = b'{"data":[{"id":"m"}]}'
    answers = [
        [head(b"Location: /elsewhere\r\n", b"Content-Length: 0\r\n", status=b"308 Permanent Redirect")],
        [head(b"Location: /elsewhere\r\n", b"Content-Length: 0\r\n", status=b"308 Permanent Redirect")],
        [head(JSON, b"Content-Length: %d\r\n" % len(listed)) + listed],
        [head(b"Content-Length: 0\r\n", status=b"404 Not Found")],
    ]

    async def use(script: Script) -> tuple[str, str]:
        endpoint = await connect("default", Target(url=f"{script.url}/v1"), time.monotonic, {})
        await endpoint.lane.close()
        return endpoint.lane.name, endpoint.model

    assert on_a_loop(with_server(Script(answers), use)) == ("aiohttp", "m")


@pytest.mark.parametrize(("wanted", "got"), [("auto", "fast"), ("fast", "fast"), ("aiohttp", "aiohttp")])
def test_the_lane_that_is_asked_for(wanted: Any, got: str) -> None:
    listed = b'{"data":[{"id":"m"}]}'
    answers = [
        [head(JSON, b"Content-Length: %d\r\n" % len(listed)) + listed],
        [head(b"Content-Length: 0\r\n", status=b"404 Not Found")],
    ]

    async def use(script: Script) -> str:
        endpoint = await connect("default", Target(url=f"{script.url}/v1", lane=wanted), time.monotonic, {})
        await endpoint.lane.close()
        return endpoint.lane.name

    assert on_a_loop(with_server(Script(answers), use)) == got
