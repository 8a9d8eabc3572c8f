"""What the fast lane alone does: its own bytes on the wire, many sockets drained by ticks, the kernel's stamps on the run's clock."""

import asyncio
import struct
import time
from typing import Any

import pytest
from lane_server import CHUNKED, SSE, Script, call, chunked, head, on_a_lane, on_a_loop, outcome, told, with_server
from test_http1 import EVENTS
from test_sse import BREADTH

from fanmark.loadgen.errors import CallError
from fanmark.loadgen.lanes import fast
from fanmark.loadgen.lanes.fast import FastLane
from fanmark.loadgen.lanes.http import Sent
from fanmark.loadgen.lanes.sse import Reply, parse_stream
from fanmark.loadgen.lanes.stamps import ReceiveClock

MEANT = told(parse_stream([(1.0, BREADTH)]))


def test_what_goes_over_the_wire() -> None:
    async def use(lane: Any, script: Script) -> None:
        headers = {"Content-Type": "application/json", "X-Request-Id": "r"}
        url = f"{script.url}/v1/chat/completions"
        await lane.send(url, b'{"model":"m"}', headers, stream=True, timeout_s=5, sent=Sent())
        with pytest.raises(ValueError, match="end of line"):
            await lane.get(script.url, {"X-A": "b\r\nX-C: d"})
        for wrong in ("https://127.0.0.1/", "http:///v1", "http://h:99999/", "http://127.0.0.1/\xe9", "http://a..b/"):
            with pytest.raises(CallError) as caught:
                await lane.get(wrong, {})
            assert caught.value.kind == "connect"

    script = Script([[head(SSE, CHUNKED) + chunked(EVENTS)]])
    on_a_lane(FastLane, script, use)
    host = script.url.removeprefix("http://").encode()
    assert script.requests == [
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: " + host + b"\r\nAccept: */*\r\nAccept-Encoding: identity\r\n"
        b"Content-Type: application/json\r\nX-Request-Id: r\r\nContent-Length: 13\r\n\r\n" + b'{"model":"m"}'
    ]


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
        assert all(s.connect_s is None for s in sent)  # opened ahead is reused
        single = await outcome(lane, script.url)
        await lane.close()
        return [single, *map(told, replies)], before, script.connections, in_time

    found, before, after, in_time = on_a_loop(with_server(Script([response]), use), own=own)
    assert found == [MEANT] * (n + 1)
    assert before == f"FastLane(0 in flight, {n} idle, kernel stamps)" and after == n and all(in_time)


def test_each_call_has_its_own_time_limit() -> None:
    """Set in any order, on connections that are open already, with one that needs no limit and one that is given up."""
    limits_s = [0.3, 0.1, 0.2, 30.0, 0.15]

    async def use(script: Script) -> tuple[list[float], list[bool], str]:
        lane = FastLane(time.monotonic)
        await lane.open_ahead(script.url, len(limits_s))
        ended: list[float] = []
        in_time: list[bool] = []

        async def one(limit_s: float) -> None:
            begun = time.monotonic()
            assert await outcome(lane, script.url, timeout_s=limit_s) == "timeout"
            in_time.append(time.monotonic() - begun >= limit_s)
            ended.append(limit_s)

        calls = [asyncio.ensure_future(one(limit_s)) for limit_s in limits_s]
        await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
        calls[-2].cancel()
        await asyncio.wait(calls)
        state = repr(lane)
        await lane.close()
        return ended, in_time, state

    ended, in_time, state = on_a_loop(with_server(Script([[...]]), use))
    assert ended == sorted(limits_s[:3] + limits_s[4:]) and all(in_time)
    assert state.startswith("FastLane(0 in flight, 0 idle")


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
