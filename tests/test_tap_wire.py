"""The pass-through: every byte as it came, but for what is of one hop and for the usage that the tap itself asked for."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lane_server import CERTIFICATE, CHUNKED, JSON, SSE, Script, chunked, head, in_parts, on_a_loop, with_server

from fanmark.loadgen.errors import ScenarioError
from fanmark.loadgen.health import ClientState
from fanmark.loadgen.tap.frames import Beat, Began, Ended, Frame, More, Unpacker, beat, packed
from fanmark.loadgen.tap.heads import BadRequest, request_head, upstream
from fanmark.loadgen.tap.usage import WithoutUsage, with_usage
from fanmark.loadgen.tap.wire import Client, Exchange, Wire

TOKEN = b'data: {"choices":[{"index":0,"delta":{"content":"a"}}]}\n\n'
USAGE = b'data: {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}\n\n'
DONE = b"data: [DONE]\n\n"
ASK = {"model": "m", "temperature": 0.10, "stream": True, "messages": [{"role": "user", "content": "Zürich?"}]}
KEY = "Bearer sk-of-the-client"


class Told:
    """A sink that keeps what it is told."""

    def __init__(self) -> None:
        self.began_: list[bytes] = []
        self.ended_: list[Exchange] = []
        self.body: dict[int, list[bytes]] = {}

    def began(self, exchange: Exchange) -> None:
        exchange.number = len(self.began_)
        self.began_.append(exchange.body)
        self.body[exchange.number] = []

    def read(self, exchange: Exchange) -> None:
        self.body[exchange.number] += [data for _, data in exchange.reads]
        exchange.reads.clear()

    def ended(self, exchange: Exchange) -> None:
        self.read(exchange)
        self.ended_.append(exchange)


Use = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[Any]]


def through(script: Script, use: Use, *, url: str = "") -> tuple[Any, Told]:
    """What `use` finds on a connection to a tap in front of a server that plays the script."""
    told = Told()

    async def run(served: Script) -> Any:
        there = upstream("default", f"{url or served.url}/v1", "/v1", target=True, flag="--target")
        tools = upstream("/mcp", f"{served.url}/tools/mcp", "/mcp", target=False, flag="--mcp")
        wire = Wire([tools, there], told)
        server = await asyncio.get_running_loop().create_server(lambda: Client(wire), "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        try:
            return await use(reader, writer)
        finally:
            writer.close()
            server.close()
            wire.close()
            await asyncio.sleep(0)

    return on_a_loop(with_server(script, run)), told


def request(path: str, body: bytes | None = None, *lines: str, method: str = "POST") -> bytes:
    size = [f"Content-Length: {len(body)}"] if body is not None else []
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: tap", *lines, *size, "", ""]).encode() + (body or b"")


def asking(sent: bytes, *, until: bytes) -> Use:
    """Sends this, and reads until that has come."""

    async def use(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        writer.write(sent)
        return await reader.readuntil(until)

    return use


def split(reply: bytes) -> tuple[list[bytes], bytes]:
    first, _, body = reply.partition(b"\r\n\r\n")
    return first.split(b"\r\n"), body


def unchunked(body: bytes) -> bytes:
    found, place = b"", 0
    while size := int(body[place : body.index(b"\r\n", place)], 16):
        start = body.index(b"\r\n", place) + 2
        found += body[start : start + size]
        place = start + size + 2
    return found


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_a_reply_passes_byte_for_byte_however_it_comes(size: int) -> None:
    ask = json.dumps({**ASK, "stream_options": {"include_usage": True}}).encode()
    body = chunked([TOKEN, TOKEN + USAGE, DONE], extension=b";x=1", trailer=b"X-Sum: 1\r\n")
    script = Script([in_parts(head(SSE, CHUNKED, b"X-Odd:  Value \r\n") + body, size)])
    reply, told = through(script, asking(request("/v1/chat/completions?a=b", ask), until=b"X-Sum: 1\r\n\r\n"))
    lines, there = split(reply)
    assert there == body
    assert lines == [b"HTTP/1.1 200 OK", SSE.strip(), CHUNKED.strip(), b"X-Odd: Value"]
    assert script.requests[0].endswith(ask) and script.requests[0].startswith(b"POST /v1/chat/completions?a=b HTTP/1.1")
    assert b"".join(told.body[0]) == TOKEN + TOKEN + USAGE + DONE
    assert told.ended_[0].error is None


def test_headers_of_one_hop_stay_behind_and_keys_pass() -> None:
    script = Script(
        [[head(b"Content-Length: 2\r\n", b"Connection: x-hop\r\n", b"X-Hop: 1\r\n", b"Keep-Alive: 9\r\n") + b"ok"]]
    )
    lines = ("Connection: keep-alive, X-Mine", "X-Mine: 1", "Upgrade: h2c", f"Authorization: {KEY}", "X-Kept: 1")
    reply, told = through(script, asking(request("/tokenize", b"{}", *lines), until=b"ok"))
    sent = script.requests[0].split(b"\r\n")
    assert sent[0] == b"POST /tokenize HTTP/1.1" and sent[1] == b"Host: " + script.url.removeprefix("http://").encode()
    assert sorted(sent[2:-2]) == sorted([f"Authorization: {KEY}".encode(), b"X-Kept: 1", b"Content-Length: 2"])
    assert split(reply) == ([b"HTTP/1.1 200 OK", b"Content-Length: 2"], b"ok")
    assert not told.began_


def test_a_client_that_asked_for_no_usage_sees_none_and_the_tap_does() -> None:
    script = Script([in_parts(head(SSE, CHUNKED) + chunked([TOKEN, TOKEN, USAGE + DONE]), 11)])
    reply, told = through(script, asking(request("/v1/chat/completions", json.dumps(ASK).encode()), until=b"0\r\n\r\n"))
    assert unchunked(split(reply)[1]) == TOKEN + TOKEN + DONE
    sent = script.requests[0].partition(b"\r\n\r\n")[2]
    assert json.loads(sent) == {**ASK, "stream_options": {"include_usage": True}}
    assert b'"temperature": 0.1' not in sent and b'"temperature":0.1' in sent
    assert b"".join(told.body[0]) == TOKEN + TOKEN + USAGE + DONE and told.began_ == [json.dumps(ASK).encode()]


def test_a_target_that_refuses_usage_is_asked_again_as_the_client_did() -> None:
    refusal = b'{"error": "unknown field stream_options"}'
    refused = head(JSON, b"Content-Length: %d\r\n" % len(refusal), status=b"400 Bad Request") + refusal
    script = Script([[refused], [head(SSE, CHUNKED) + chunked([TOKEN, DONE])]])
    ask = json.dumps(ASK).encode()
    reply, told = through(script, asking(request("/v1/chat/completions", ask), until=b"0\r\n\r\n"))
    assert unchunked(split(reply)[1]) == TOKEN + DONE
    assert script.requests[1].endswith(ask) and len(told.ended_) == 1
    assert b"".join(told.body[0]) == TOKEN + DONE


def test_a_refusal_of_something_else_passes() -> None:
    refused = head(JSON, b"Content-Length: 9\r\n", status=b"400 Bad Request") + b'{"no": 1}'
    reply, told = through(
        Script([[refused]]), asking(request("/v1/chat/completions", json.dumps(ASK).encode()), until=b"0\r\n\r\n")
    )
    assert reply.startswith(b"HTTP/1.1 400 Bad Request") and unchunked(split(reply)[1]) == b'{"no": 1}'
    assert (told.ended_[0].status, told.ended_[0].error) == (400, None)


def test_a_target_over_tls_is_reached_where_its_authority_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATE))
    script = Script([[head(SSE, CHUNKED) + chunked([TOKEN, DONE])]], tls=True)
    reply, told = through(script, asking(request("/v1/chat/completions", json.dumps(ASK).encode()), until=b"0\r\n\r\n"))
    assert unchunked(split(reply)[1]) == TOKEN + DONE and told.ended_[0].error is None
    monkeypatch.delenv("SSL_CERT_FILE")
    refused, _ = through(script, asking(request("/v1/models", method="GET"), until=b"}}"))
    assert refused.startswith(b"HTTP/1.1 502") and b"certificate" in refused


def test_a_client_that_goes_ends_its_request_upstream() -> None:
    script = Script([[head(SSE, CHUNKED) + b"%x\r\n%b\r\n" % (len(TOKEN), TOKEN), ...]])

    async def use(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(request("/v1/chat/completions", json.dumps(ASK).encode()))
        await reader.readuntil(b"delta")
        writer.transport.abort()
        await script.left.wait()

    _, told = through(script, use)
    assert [exchange.error for exchange in told.ended_] == ["cancelled"]


def test_an_upstream_that_goes_amid_a_reply_cuts_the_clients() -> None:
    script = Script([[head(SSE, CHUNKED) + b"%x\r\n%b\r\n" % (len(TOKEN), TOKEN), None]])

    async def use(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        writer.write(request("/v1/chat/completions", json.dumps(ASK).encode()))
        return await reader.read()

    reply, told = through(script, use)
    assert reply.endswith(b"%x\r\n%b\r\n" % (len(TOKEN), TOKEN)) and told.ended_[0].error == "stream_cut"


def test_an_upstream_that_is_not_there_is_told_in_a_line() -> None:
    ask = request("/v1/messages", b"{}")
    reply, told = through(Script([[]]), asking(ask, until=b"}}"), url="http://127.0.0.1:1")
    lines, body = split(reply)
    assert (
        lines[0] == b"HTTP/1.1 502 Bad Gateway" and "cannot reach 127.0.0.1:1" in json.loads(body)["error"]["message"]
    )
    assert told.ended_[0].error == "connect" and told.ended_[0].api == "messages"


def test_requests_follow_each_other_on_one_connection_even_sent_at_once() -> None:
    script = Script([[head(b"Content-Length: 1\r\n") + b"%d" % n] for n in range(3)])
    ahead = request("/v1/models", method="GET")

    async def use(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        found = b""
        for n in range(3):
            writer.write(ahead if n else request("/v1/responses", b"{}"))
            found += (await reader.readuntil(b"\r\n\r\n") + await reader.readexactly(1))[-1:]
        return found

    found, told = through(script, use)
    assert found == b"012" and script.connections == 1 and len(told.ended_) == 1


def test_a_tool_servers_requests_go_where_it_is() -> None:
    stream = b'event: message\ndata: {"jsonrpc":"2.0","id":1,"result":{}}\n\n'
    script = Script([[head(SSE, CHUNKED) + chunked([stream])]])
    reply, told = through(script, asking(request("/mcp", b'{"jsonrpc": "2.0"}'), until=b"0\r\n\r\n"))
    assert script.requests[0].startswith(b"POST /tools/mcp HTTP/1.1") and split(reply)[1] == chunked([stream])
    assert told.ended_[0].api == "mcp"


def test_a_reply_that_ends_with_its_connection_does_so_here_too() -> None:
    async def use(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        writer.write(request("/v1/completions", b"{}"))
        return await reader.read()

    reply, told = through(Script([[head(JSON) + b"all of it", None]]), use)
    assert split(reply) == ([b"HTTP/1.1 200 OK", JSON.strip(), b"Connection: close"], b"all of it")
    assert told.ended_[0].error is None


def test_a_body_in_chunks_and_one_that_waits_to_be_asked_for_arrive_whole() -> None:
    ask = json.dumps({"prompt": "a"}).encode()
    sent = request("/v1/completions", None, "Transfer-Encoding: chunked", "Expect: 100-continue") + chunked(
        in_parts(ask, 3)
    )
    script = Script([[head(b"Content-Length: 2\r\n") + b"ok"]])
    reply, told = through(script, asking(sent, until=b"ok"))
    assert reply.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK") and told.began_ == [ask]
    assert script.requests[0].endswith(b"Content-Length: %d\r\n\r\n" % len(ask) + ask)


@pytest.mark.parametrize(
    "raw", [b"GET http://x/ HTTP/1.1", b"GET / HTTP/2", b"nonsense", b"GET / HTTP/1.1\r\nNo colon"]
)
def test_what_is_no_request_is_refused(raw: bytes) -> None:
    with pytest.raises(BadRequest):
        request_head(raw)


@pytest.mark.parametrize("url", ["ftp://h/v1", "h:80", "http://u:p@h/v1", "http://h:x/v1", "http://h/v1?k=1"])
def test_what_is_no_target_is_refused(url: str) -> None:
    with pytest.raises(ScenarioError, match="--target"):
        upstream("default", url, "/v1", target=True, flag="--target")


@pytest.mark.parametrize(
    ("url", "path", "there"),
    [
        ("http://h/v1", "/v1/models", "/v1/models"),
        ("http://h/v1/", "/tokenize", "/tokenize"),
        ("https://h/openai/v2", "/v1/chat/completions?a=1", "/openai/v2/chat/completions?a=1"),
        ("http://h", "/v1/models", "/models"),
        ("http://h/v1", "/v1x", "/v1x"),
    ],
)
def test_paths_are_the_targets(url: str, path: str, there: str) -> None:
    assert upstream("default", url, "/v1", target=True, flag="--target").goes_to(path) == there


@given(st.lists(st.integers(1, 40)), st.sampled_from([b"\n\n", b"\r\n\r\n"]))
def test_the_usage_chunk_is_taken_out_however_the_stream_is_cut(sizes: list[int], end: bytes) -> None:
    filtered = b'data: {"choices": [], "prompt_filter_results": [1]}\n\n'
    told = b'data: {"choices": [{"delta": {"content": "\\"usage\\""}}], "usage": null}\n\n'
    stream, kept = (b"".join([filtered, told, TOKEN, *usage, DONE]).replace(b"\n\n", end) for usage in ([USAGE], []))
    filter, found, place = WithoutUsage(), b"", 0
    for size in [*sizes, len(stream)]:
        found += filter.feed(stream[place : place + size])
        place += size
    assert found + filter.close() == kept


def test_a_request_that_wants_usage_or_streams_nothing_stays_as_it_is() -> None:
    for fields in ({"stream": False}, {"stream_options": {"include_usage": True}}, {"stream": None}):
        assert with_usage(json.dumps({**ASK, **fields}).encode()) is None
    assert with_usage(b"[1") is None and with_usage(b"[]") is None
    changed = with_usage(json.dumps({**ASK, "stream_options": {"include_usage": False, "x": 1}}).encode())
    assert changed is not None and json.loads(changed)["stream_options"] == {"include_usage": True, "x": 1}


@given(st.lists(st.integers(1, 60)))
def test_what_passed_is_told_whole_however_it_is_cut(sizes: list[int]) -> None:
    frames: list[Frame] = [
        Began(1, "chat", {"traceparent": "t"}, b"{}", 1.5),
        More(1, 200, "text/event-stream", [(2.0, b"a"), (2.5, b"b" * 70)]),
        Ended(1, 200, "text/event-stream", [], 1.6, None, 3.0, None),
        beat(ClientState(cpu_s=1.0), 7),
    ]
    data, found, place = b"".join(map(packed, frames)), list[Frame](), 0
    unpacker = Unpacker(found.append)
    for size in [*sizes, len(data)]:
        unpacker.feed(data[place : place + size])
        place += size
    assert found == frames and isinstance(found[-1], Beat) and found[-1].state.cpu_s == 1.0
