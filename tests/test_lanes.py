"""Every lane against one scripted server: whatever a network and a server do to a reply, the lanes tell the same of it.

Where the openai lane differs, the SDK does: it believes [DONE] before the body's end, and leaves a connection on which it met an error.
"""

import asyncio
import json
import socket
import ssl
import time
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
from lane_server import (
    ASKED,
    CERTIFICATE,
    CHUNKED,
    JSON,
    LANES,
    SSE,
    Make,
    Script,
    call,
    chunked,
    head,
    in_parts,
    on_a_lane,
    outcome,
    outcomes,
    told,
)
from test_http1 import EVENTS, WHOLE
from test_sse import BREADTH, DONE, ENDS, NO_REPLY, STREAMS, USAGE, chunk

from fanmark.loadgen.errors import CallError
from fanmark.loadgen.lanes.http import Sent
from fanmark.loadgen.lanes.sse import parse_stream
from fanmark.loadgen.scenario import Target
from fanmark.loadgen.target import connect

MEANT = told(parse_stream([(1.0, BREADTH)]))
GOOD = head(SSE, CHUNKED) + chunked(EVENTS)


@pytest.fixture(params=LANES)
def lane(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make(lane: str) -> Make:
    return LANES[lane]


@pytest.mark.parametrize(("response", "kept"), WHOLE.values(), ids=WHOLE)
def test_a_reply_is_the_same_however_it_is_framed_and_cut(lane: str, response: bytes, kept: bool) -> None:
    end = [] if kept else [None]
    answers = [[response, *end], [*in_parts(response, 1), *end], [*in_parts(response, 61), *end]]
    reused = kept and not (lane == "openai" and b"HTTP/1.0" in response)
    assert outcomes(LANES[lane], Script(answers), times=3) == ([MEANT] * 3, 1 if reused else 3)


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("name", STREAMS)
def test_a_recorded_stream_is_the_same_in_every_lane(make: Make, name: str, end: str) -> None:
    stream = STREAMS[name].replace(b"\n", ENDS[end]).replace(b"data: ", b": alive" + ENDS[end] + b"data: ")
    response = head(SSE, CHUNKED) + chunked(in_parts(stream, 101))
    meant = told(parse_stream([(1.0, STREAMS[name])]))
    assert outcomes(make, Script([in_parts(response, 997), in_parts(response, 83)]), times=2) == ([meant] * 2, 1)


BODY = b'{"choices":[{"message":{"content":"Z\xc3\xbcrich"},"finish_reason":"stop"}],"usage":{"prompt_tokens":3}}'
SAID = ("Zürich", None, "stop")
NOT_STREAMED: dict[str, tuple[list[Any], Any]] = {
    "a JSON body of a given length": ([head(JSON, b"Content-Length: %d\r\n" % len(BODY)) + BODY], SAID),
    "a JSON body in chunks": ([head(JSON, CHUNKED) + chunked(in_parts(BODY, 9))], SAID),
    "a JSON body until the end": ([head(JSON) + BODY, None], SAID),
    "429 with a body": (
        [head(JSON, b"Content-Length: 9\r\n", b"Retry-After: 1\r\n", status=b"429 Too Many Requests") + b"slow down"],
        ("http_429", 429, "slow down", "1"),
    ),
    "400 in chunks": (
        [head(JSON, CHUNKED, status=b"400 Bad Request") + chunked([b'{"error":{"message":"no \xe2\x82\xac"}}'])],
        ("http_4xx", 400, '{"error":{"message":"no €"}}', None),
    ),
    "503 without a body": (
        [head(b"Content-Length: 0\r\n", status=b"503 Service Unavailable")],
        ("http_5xx", 503, "", None),
    ),
    "500 until the end": ([head(status=b"500 Oops") + b"<html>", None], ("http_5xx", 500, "<html>", None)),
    "502 that says it is a stream": (
        [head(SSE, CHUNKED, status=b"502 Bad Gateway") + chunked(in_parts(b"no " * 50, 5))],
        ("http_5xx", 502, "no " * 50, None),
    ),
    "an error of another encoding": (
        [head(b"Content-Length: 3\r\n", status=b"400 Bad Request") + b"\xff\xfea"],
        ("http_4xx", 400, "\ufffd\ufffda", None),
    ),
    "no content": ([head(status=b"204 No Content")], "bad_reply"),
    "sent on to nowhere": ([head(b"Content-Length: 0\r\n", status=b"308 Permanent Redirect")], "bad_reply"),
    "a JSON error in a 200": ([head(JSON, b"Content-Length: 24\r\n") + b'{"error":{"message":""}}'], "bad_reply"),
    "an error body that is cut": (
        [head(b"Content-Length: 99\r\n", status=b"500 Oops") + b"half", None],
        "stream_cut",
    ),
}


@pytest.mark.parametrize(("answer", "meant"), NOT_STREAMED.values(), ids=NOT_STREAMED)
def test_what_is_no_stream_is_told_the_same(make: Make, answer: list[Any], meant: Any) -> None:
    pieces = [one for part in answer for one in ([part] if part is None else in_parts(part, 40))]
    found, _ = outcomes(make, Script([answer, pieces]), times=2)
    if meant is SAID:
        assert [(text, ids, finish) for text, ids, _, finish in found] == [SAID, SAID]
        assert [usage.prompt_tokens for _, _, usage, _ in found] == [3, 3]
    else:
        assert found == [meant, meant]


@pytest.mark.parametrize(("stream", "kind"), NO_REPLY.values(), ids=NO_REPLY)
def test_what_is_no_reply_is_an_error_of_one_class(lane: str, stream: bytes, kind: str) -> None:
    response = head(SSE, CHUNKED) + chunked(in_parts(stream, 50))
    found, connections = outcomes(LANES[lane], Script([[response], in_parts(response, 20), [GOOD]]), times=3)
    assert found == [kind, kind, MEANT] and (connections == 1 or lane == "openai")


NOT_HTTP = {
    "no HTTP at all": b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
    "a chunk without a size": head(SSE, CHUNKED) + b"xyz\r\n\r\n",
    "a chunk longer than its size": head(SSE, CHUNKED) + b"3\r\nabcd\r\n0\r\n\r\n",
    "a length that is none": head(SSE, b"Content-Length: -3\r\n") + BREADTH,
    "a header without a colon": head(b"nonsense\r\n"),
}


@pytest.mark.parametrize("response", NOT_HTTP.values(), ids=NOT_HTTP)
def test_what_is_not_http_cuts_the_stream(make: Make, response: bytes) -> None:
    found = outcomes(make, Script([[response, ...], [*in_parts(response, 1), ...], [GOOD]]), times=3)
    assert found == (["stream_cut", "stream_cut", MEANT], 3)


SHORT = chunk("a") + chunk("é", "length") + USAGE + DONE


@pytest.mark.parametrize("reset", [False, True], ids=["end", "reset"])
def test_a_reply_cut_at_any_byte_is_an_error_or_whole(lane: str, reset: bool) -> None:
    response = head(SSE, CHUNKED) + chunked([SHORT[:50], SHORT[50:]])
    step = 7 if reset or lane == "openai" else 1  # the SDK takes its time
    places = [*range(0, len(response) - 30, step), *range(len(response) - 30, len(response) + 1)]
    script = Script([[response[:place], None] for place in places], reset)
    found, connections = outcomes(LANES[lane], script, times=len(places))
    whole = told(parse_stream([(1.0, SHORT)]))
    assert connections == len(places)
    if reset:  # what had come before it may be lost, or not
        assert all(one in ("stream_cut", whole) for one in found)
    else:
        told_at = len(response) if lane != "openai" else response.index(DONE) + len(DONE)
        assert found == [whole if place >= told_at else "stream_cut" for place in places]


def test_a_body_of_given_length_cut_at_any_byte(lane: str) -> None:
    response = head(JSON, b"Content-Length: %d\r\n" % len(BODY)) + BODY
    places = range(0, len(response), 7 if lane == "openai" else 1)
    script = Script([[response[:place], None] for place in places])
    assert outcomes(LANES[lane], script, times=len(places)) == (["stream_cut"] * len(places), len(places))


@pytest.mark.parametrize("answer", [[...], [GOOD[:300], ...], [head(SSE)[:9], ...]])
def test_out_of_time_closes_the_connection_and_the_next_call_has_its_own(make: Make, answer: list[Any]) -> None:
    async def use(lane: Any, script: Script) -> tuple[object, ...]:
        sent = Sent()
        await lane.get(f"{script.url}/v1/models", {})  # whatever a lane prepares at its first request
        first = await outcome(lane, script.url, timeout_s=0.1, sent=sent)
        async with asyncio.timeout(5):
            await script.left.wait()
        return first, sent.at is not None, await outcome(lane, script.url)

    ready = head(JSON, b"Content-Length: 2\r\n", b"Connection: close\r\n") + b"{}"
    assert on_a_lane(make, Script([[ready], answer, [GOOD]]), use) == ("timeout", True, MEANT)


def test_a_cancelled_call_is_aborted_at_the_server_and_costs_no_other(make: Make) -> None:
    async def use(lane: Any, script: Script) -> tuple[object, ...]:
        task = asyncio.ensure_future(call(lane, script.url))
        await script.asked.wait()
        other = asyncio.ensure_future(outcome(lane, script.url))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with asyncio.timeout(5):
            await script.left.wait()
        return await other, await outcome(lane, script.url), script.connections

    script = Script([[GOOD[:200], ...], [GOOD]])
    assert on_a_lane(make, script, use) == (MEANT, MEANT, 2)


def test_a_port_that_refuses_and_a_name_that_is_none(make: Make) -> None:
    async def use(lane: Any, script: Script) -> tuple[object, ...]:
        sent = Sent()
        found = await outcome(lane, url, sent=sent), await outcome(lane, "http://[::1"), sent.at
        with pytest.raises(CallError) as caught:
            await lane.get(f"{url}/v1/models", {})
        return *found, caught.value.kind

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        assert on_a_lane(make, Script([]), use) == ("connect", "connect", None, "connect")


def test_gets_and_posts_that_are_no_calls(make: Make) -> None:
    async def use(lane: Any, script: Script) -> tuple[object, ...]:
        found = (
            await lane.get(f"{script.url}/v1/models?a=b", {"Authorization": "Bearer k"}),
            await lane.post(f"{script.url}/tokenize", b"abc", {}),
        )
        with pytest.raises(CallError) as caught:
            await lane.get(f"{script.url}/silent", {}, timeout_s=0.05)
        return *found, caught.value.kind, [request.partition(b" HTTP/1.1\r\n")[0] for request in script.requests]

    answers = [
        [head(JSON, CHUNKED) + chunked([b"[]"])],
        [head(b"Content-Length: 2\r\n", status=b"404 No") + b"no"],
        [...],
    ]
    lines = [b"GET /v1/models?a=b", b"POST /tokenize", b"GET /silent"]
    assert on_a_lane(make, Script(answers), use) == ((200, b"[]"), (404, b"no"), "timeout", lines)


@pytest.mark.parametrize("key", [None, "Bearer k"])
def test_every_field_and_header_goes_over_the_wire(make: Make, key: str | None, monkeypatch: Any) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "another")
    headers = {"Content-Type": "application/json", "X-Request-Id": "r"} | ({"Authorization": key} if key else {})
    completion = {**ASKED, "prompt": [1, 2, 3]}
    del completion["messages"]

    async def use(lane: Any, script: Script) -> None:
        for path, asked in (("chat/completions", ASKED), ("completions", completion)):
            url, body = f"{script.url}/v1/{path}", json.dumps(asked).encode()
            reply = await lane.send(url, body, headers, stream=True, timeout_s=5, sent=Sent())
            assert told(reply) == MEANT

    script = Script([[GOOD]])
    on_a_lane(make, script, use)
    for request, path, asked in zip(
        script.requests, [b"chat/completions", b"completions"], [ASKED, completion], strict=True
    ):
        first, *lines = request.partition(b"\r\n\r\n")[0].split(b"\r\n")
        told_of = dict(line.lower().split(b": ", 1) for line in lines)
        assert first == b"POST /v1/" + path + b" HTTP/1.1"
        assert json.loads(request.partition(b"\r\n\r\n")[2]) == asked
        assert told_of[b"x-request-id"] == b"r" and told_of[b"host"] == script.url[7:].encode()
        assert told_of.get(b"authorization") == (key.lower().encode() if key else None)


def test_a_large_prompt_goes_out_in_full(make: Make) -> None:
    text = "0123456789abcdef" * 400_000

    async def use(lane: Any, script: Script) -> tuple[object, bool]:
        found = await outcome(lane, script.url, timeout_s=30, messages=[{"role": "user", "content": text}])
        sent = json.loads(script.requests[0].partition(b"\r\n\r\n")[2])
        return found, bool(sent["messages"][0]["content"] == text)

    assert on_a_lane(make, Script([[GOOD]]), use) == (MEANT, True)


def test_a_server_that_answers_before_it_has_the_prompt(make: Make) -> None:
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(head(b"Content-Length: 9\r\n", status=b"413 Too Large") + b"too large")
        while await reader.read(65_536):
            pass
        writer.close()

    async def use(lane: Any, script: Script) -> object:
        server = await asyncio.start_server(refuse, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        found = await outcome(lane, url, messages=[{"role": "user", "content": "x" * 6_000_000}])
        server.close()
        return found

    assert on_a_lane(make, Script([]), use) == ("http_4xx", 413, "too large", None)


def test_a_connection_that_the_server_closed_while_idle_is_not_used(make: Make) -> None:
    async def use(lane: Any, script: Script) -> tuple[object, ...]:
        first = await outcome(lane, script.url)
        await script.left.wait()
        return first, await outcome(lane, script.url), script.connections

    assert on_a_lane(make, Script([[GOOD, None]]), use) == (MEANT, MEANT, 2)


@pytest.mark.parametrize("lane", ["fast", "aiohttp"])
def test_bytes_after_the_end_are_no_part_of_the_next_reply(lane: str) -> None:
    stale = GOOD.replace("Zürich".encode(), b"Bern")
    for rest in (b"HTTP/1.1 200 OK\r\n", stale):
        first, second = outcomes(LANES[lane], Script([[GOOD + rest], [GOOD]]), times=2)[0]
        assert second == MEANT and (first == MEANT or (lane == "aiohttp" and first == "stream_cut"))


def test_a_call_tells_how_long_connecting_took_before_it_was_sent(make: Make) -> None:
    async def use(lane: Any, script: Script) -> list[tuple[bool, bool]]:
        told = []
        for number in range(3):
            if number == 2:
                await script.left.wait()
            before, sent = time.monotonic(), Sent()
            await call(lane, script.url, sent=sent)
            assert sent.at is not None
            took_s = sent.connect_s or 0.0
            told.append((sent.connect_s is not None, 0.0 <= took_s <= sent.at - before))
        return told

    # the second call takes the first's connection, which the server closes after it
    assert on_a_lane(make, Script([[GOOD], [GOOD, None]]), use) == [(True, True), (False, True), (True, True)]


def test_stamps_are_in_order_and_a_chunks_is_when_it_came(make: Make) -> None:
    """The server notes when it sent each piece; no stamp of the lane lies before what it belongs to."""
    pieces = [head(SSE, CHUNKED), *[b"%x\r\n" % len(e) + e + b"\r\n" for e in EVENTS], b"0\r\n\r\n"]
    sent_at: list[float] = []

    class Noted(list[bytes]):
        def __iter__(self) -> Iterator[bytes]:
            for piece in pieces:
                sent_at.append(time.monotonic())
                yield piece

    async def use(lane: Any, script: Script) -> None:
        for _ in range(5):
            sent_at.clear()
            before, sent = time.monotonic(), Sent()
            reply = await call(lane, script.url, sent=sent)
            assert sent.at is not None and before <= sent.at <= sent_at[0]
            assert sent_at[1] <= reply.first_at <= reply.done_at <= time.monotonic()
            assert reply.answer_at == reply.first_at and sent_at[4] <= reply.done_at
            assert sum(reply.gaps.values()) + (reply.coalesced if not reply.gaps else 0) <= 3

    on_a_lane(make, Script([Noted()]), use)


@pytest.mark.parametrize("lane", ["aiohttp", "openai"])
@pytest.mark.parametrize("size", [1, 50, 10_000])
def test_a_compressed_stream_is_read_as_it_comes(lane: str, size: int) -> None:
    packer = zlib.compressobj(wbits=31)
    packed = [packer.compress(event) + packer.flush(zlib.Z_SYNC_FLUSH) for event in EVENTS] + [packer.flush()]
    response = head(SSE, CHUNKED, b"Content-Encoding: gzip\r\n") + chunked(packed)
    assert outcomes(LANES[lane], Script([in_parts(response, size)]), times=2) == ([MEANT] * 2, 1)
    broken = head(SSE, CHUNKED, b"Content-Encoding: gzip\r\n") + chunked([packed[0], b"no gzip", packed[2]])
    assert outcomes(LANES[lane], Script([in_parts(broken, size), [GOOD]]), times=2)[0] == ["stream_cut", MEANT]


def test_the_fast_lane_asks_for_no_compression_and_takes_none() -> None:
    script = Script([[head(SSE, CHUNKED, b"Content-Encoding: gzip\r\n") + chunked(EVENTS)], [GOOD]])
    assert outcomes(LANES["fast"], script, times=2)[0] == ["stream_cut", MEANT]
    assert b"\r\nAccept-Encoding: identity\r\n" in script.requests[0]


@pytest.mark.parametrize("lane", ["aiohttp", "openai"])
def test_https_with_its_own_authority(lane: str) -> None:
    trusted = ssl.create_default_context(cafile=str(CERTIFICATE))
    script = Script([in_parts(GOOD, 40), [GOOD[:200], None], [GOOD]], tls=True)
    assert outcomes(LANES[lane], script, times=3, tls=trusted) == ([MEANT, "stream_cut", MEANT], 2)
    assert outcomes(LANES[lane], Script([[GOOD]], tls=True)) == (["connect"], 0)
    assert outcomes(LANES[lane], Script([[GOOD]], tls=True), tls=False) == ([MEANT], 1)


@pytest.mark.parametrize("lane", ["aiohttp", "openai"])
def test_a_proxy_is_asked_for_the_whole_address(lane: str) -> None:
    script = Script([in_parts(GOOD, 40)])

    async def use(carrier: Any, served: Script) -> object:
        through = LANES[lane](time.monotonic, proxy=served.url)
        found = await outcome(through, "http://elsewhere.invalid:81")
        await through.close()
        return found

    assert on_a_lane(LANES[lane], script, use) == MEANT
    assert script.requests[0].startswith(b"POST http://elsewhere.invalid:81/v1/chat/completions HTTP/1.1\r\n")


@pytest.mark.parametrize("lane", ["aiohttp", "openai"])
def test_https_through_a_proxys_tunnel_is_sent_once_the_tunnel_is_there(lane: str) -> None:
    there_at: list[float] = []
    asked: list[bytes] = []

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65_536):
            writer.write(data)
        writer.close()

    async def tunnel(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readuntil(b"\r\n\r\n"))
        host, port = asked[-1].split()[1].split(b":")
        inward, outward = await asyncio.open_connection(host.decode(), int(port))
        writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        there_at.append(time.monotonic())
        await asyncio.gather(pump(reader, outward), pump(inward, writer))

    async def use(_: Any, script: Script) -> tuple[object, bool]:
        proxy = await asyncio.start_server(tunnel, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{proxy.sockets[0].getsockname()[1]}"
        trusted = ssl.create_default_context(cafile=str(CERTIFICATE))
        through, before, sent = LANES[lane](time.monotonic, tls=trusted, proxy=url), time.monotonic(), Sent()
        found = await outcome(through, script.url, sent=sent)
        await through.close()
        proxy.close()
        await script.left.wait()
        assert sent.at is not None and sent.connect_s is not None
        return found, before + sent.connect_s <= sent.at and there_at[0] <= sent.at

    script = Script([in_parts(GOOD, 40)], tls=True)
    assert on_a_lane(LANES[lane], script, use) == (MEANT, True)
    assert asked[0].startswith(b"CONNECT 127.0.0.1:") and len(asked) == 1


@pytest.mark.parametrize("lane", ["aiohttp", "openai"])
def test_a_redirect_is_followed(lane: str) -> None:
    on = head(b"Location: /elsewhere/v1/chat/completions\r\n", b"Content-Length: 2\r\n", status=b"307 There") + b"no"
    script = Script([in_parts(on, 10), [GOOD]])
    assert outcomes(LANES[lane], script)[0] == [MEANT]
    assert script.requests[1].startswith(b"POST /elsewhere/v1/chat/completions ")
    assert json.loads(script.requests[1].partition(b"\r\n\r\n")[2]) == ASKED


@pytest.mark.parametrize("lane", ["aiohttp", "openai"])
def test_a_redirect_to_another_host_is_refused(lane: str) -> None:
    """It is another server than the one that is measured, and the keys are not for it."""
    on = (
        head(b"Location: http://localhost:9/v1/chat/completions\r\n", b"Content-Length: 2\r\n", status=b"307 There")
        + b"no"
    )
    script = Script([[on]])
    assert outcomes(LANES[lane], script)[0] == ["bad_reply"]
    assert len(script.requests) == 1


@pytest.mark.parametrize("lane", ["fast", "aiohttp"])
def test_a_stream_longer_than_any_buffer_is_read_to_its_end(lane: str) -> None:
    """With the first read comes more than a reader would take at once, in chunks of few bytes."""
    stream = chunk("x" * 3_000) * 20 + chunk("", "length") + USAGE + DONE
    response = head(SSE, CHUNKED) + chunked(in_parts(stream, 2))
    found, connections = outcomes(LANES[lane], Script([[response]]))
    assert [len(one[0]) for one in found] == [60_000] and connections == 1


LISTED = b'{"data":[{"id":"m"}]}'
MODELS = [head(JSON, b"Content-Length: %d\r\n" % len(LISTED)) + LISTED]
NOT_FOUND = [head(b"Content-Length: 0\r\n", status=b"404 Not Found")]
ELSEWHERE = [head(b"Location: /elsewhere\r\n", b"Content-Length: 0\r\n", status=b"308 Permanent Redirect")]


@pytest.mark.parametrize(
    ("wanted", "got", "answers"),
    [
        ("auto", "fast", [MODELS, NOT_FOUND]),
        ("fast", "fast", [MODELS, NOT_FOUND]),
        ("aiohttp", "aiohttp", [MODELS, NOT_FOUND]),
        ("openai", "openai", [MODELS, NOT_FOUND]),
        ("auto", "aiohttp", [ELSEWHERE, ELSEWHERE, MODELS, NOT_FOUND]),  # sent on elsewhere: left to one that follows
    ],
)
def test_the_lane_that_is_asked_for(wanted: Any, got: str, answers: Any) -> None:
    async def use(_: Any, script: Script) -> tuple[str, str]:
        endpoint = await connect("default", Target(url=f"{script.url}/v1", lane=wanted), time.monotonic, {})
        await endpoint.lane.close()
        return endpoint.lane.name, endpoint.model

    assert on_a_lane(LANES["fast"], Script(answers), use) == (got, "m")
