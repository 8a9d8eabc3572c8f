"""The embedded MCP server, by the official SDK's client in both eras of the protocol, and as a process."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar, cast

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]
from mcp import Client
from mcp.shared.exceptions import MCPError
from mcp_peers import StartTools

from fanmark.servers.prose import Filler
from fanmark.servers.tokenizer import Tokenizer, vocabulary
from fanmark.servers.tool_arguments import mistake_in
from fanmark.servers.tool_specs import ALL_TOOLS, Behaviour, ToolSpec, check_latency, draw_latency_s
from fanmark.servers.tools import listen, serving

T = TypeVar("T")
ERAS = [("auto", "2026-07-28"), ("legacy", "2025-11-25")]


def with_client(server: Any, mode: str, use: Callable[[Client], Awaitable[T]]) -> T:
    async def run() -> T:
        async with Client(server, mode=mode) as client:
            return await use(client)

    return asyncio.run(run())


def in_process(use: Callable[[Client], Awaitable[T]]) -> T:
    async def run() -> T:
        with listen("127.0.0.1", 0) as sock:
            url = f"http://127.0.0.1:{sock.getsockname()[1]}/mcp"
            async with serving(sock, Behaviour(latency_s=0, result_tokens=7, seed=1)), Client(url) as client:
                return await use(client)

    return asyncio.run(run())


async def search(client: Client, **meta: Any) -> str:
    result = await client.call_tool(
        "search", {"query": "x"}, meta=cast(Any, {f"fanmark/{k}": v for k, v in meta.items()})
    )
    assert not result.is_error
    (block,) = result.content
    assert block.type == "text"
    return block.text


@pytest.mark.parametrize(("mode", "version"), ERAS)
def test_sdk_client_lists_and_calls_over_http(tools_url: str, mode: str, version: str) -> None:
    async def use(client: Client) -> None:
        assert client.protocol_version == version
        tools = (await client.list_tools()).tools
        assert [(t.name, t.description, t.input_schema) for t in tools] == [
            (spec.name, spec.description, spec.input_schema) for spec in ALL_TOOLS
        ]
        assert all(t.annotations is not None and t.annotations.read_only_hint for t in tools)
        assert Tokenizer(vocabulary()).count(await search(client)) == 30
        assert await search(client, seed=5) == await search(client, seed="5") != await search(client, seed=6)

    with_client(tools_url, mode, use)


@pytest.mark.parametrize("tokens", [0, 1, 300, 20_000])
def test_result_has_exactly_the_tokens_asked_for(tokens: int) -> None:
    text = in_process(lambda client: search(client, result_tokens=tokens))
    assert len(Tokenizer(vocabulary()).encode(text)) == tokens


def test_calls_without_a_seed_differ_and_repeat_with_the_server() -> None:
    async def two(client: Client) -> list[str]:
        return [await search(client), await search(client)]

    first, second = in_process(two), in_process(two)
    assert first == second
    assert first[0] != first[1]


@pytest.mark.parametrize(
    ("tool", "arguments", "expected"),
    [
        pytest.param("search", {}, "'query' is a required property", id="missing"),
        pytest.param("search", {"query": 3}, "$.query: 3 is not of type 'string'", id="wrong type"),
        pytest.param("fetch", {"url": "http://x", "max_length": 5}, "less than the minimum of 100", id="out of bounds"),
        pytest.param("calculator", {"expression": "1", "base": 2}, "'base' was unexpected", id="unknown argument"),
    ],
)
def test_bad_arguments_are_the_tools_own_error(tool: str, arguments: dict[str, Any], expected: str) -> None:
    result = in_process(lambda client: client.call_tool(tool, arguments))
    assert result.is_error
    assert expected in result.content[0].text  # type: ignore[union-attr]


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 2_000_000)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=300),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
)


@given(st.sampled_from(ALL_TOOLS), st.data())
def test_arguments_are_judged_as_json_schema_does(spec: ToolSpec, data: st.DataObject) -> None:
    names = [*spec.input_schema["properties"], "other"]
    offered = st.sampled_from(["any", "week", "sales", "python", "metric", 1, 1.0, 5, 20, "x"]) | json_values
    arguments = data.draw(st.dictionaries(st.sampled_from(names), offered, max_size=4))
    valid = Draft202012Validator(dict(spec.input_schema)).is_valid(arguments)
    assert (mistake_in(spec.input_schema, arguments) is None) is valid


@pytest.mark.parametrize(
    ("tool", "meta", "expected"),
    [
        pytest.param("nope", {}, "unknown tool 'nope': there are search, ", id="no such tool"),
        pytest.param("search", {"fanmark/seed": [1]}, "must be a number or a string", id="seed is a list"),
        pytest.param("search", {"fanmark/result_tokens": -1}, "must be a whole number from 0", id="negative length"),
        pytest.param("search", {"fanmark/result_tokens": True}, "must be a whole number from 0", id="boolean length"),
    ],
)
def test_wrong_requests_are_protocol_errors(tool: str, meta: dict[str, Any], expected: str) -> None:
    async def use(client: Client) -> None:
        with pytest.raises(MCPError, match=expected):
            await client.call_tool(tool, {"query": "x"}, meta=cast(Any, meta))

    in_process(use)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, "end of standard input"])
def test_ends_at_once_and_silently_with_a_call_in_flight(start_tools: StartTools, how: signal.Signals | str) -> None:
    server = start_tools("--latency-s", "3600")
    address = ("127.0.0.1", int(server.port))
    params = {
        "name": "search",
        "arguments": {"query": "x"},
        "_meta": {
            "io.modelcontextprotocol/protocolVersion": "2026-07-28",
            "io.modelcontextprotocol/clientInfo": {"name": "test", "version": "0"},
            "io.modelcontextprotocol/clientCapabilities": {},
        },
    }
    body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params})
    head = (
        f"POST /mcp HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nContent-Type: application/json\r\n"
        "Accept: application/json, text/event-stream\r\nMCP-Protocol-Version: 2026-07-28\r\nMcp-Method: tools/call\r\n"
        f"Mcp-Name: search\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection(address) as first, socket.create_connection(address) as second:
        first.sendall((head + body).encode())
        second.sendall(f"GET /nothing HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n\r\n".encode())
        assert second.recv(12) == b"HTTP/1.1 404"  # the server has read the call before this
        if isinstance(how, signal.Signals):
            server.process.send_signal(how)
        else:
            assert server.process.stdin is not None
            server.process.stdin.close()
        assert server.process.wait(timeout=10) == 0
    assert server.process.stderr is not None
    assert server.process.stderr.read() == b""


@pytest.mark.parametrize("header", ["", "MCP-Protocol-Version: 2026-07-28\r\nMcp-Method: tools/list\r\n"])
def test_a_client_that_goes_away_while_it_asks_is_not_reported(start_tools: StartTools, header: str) -> None:
    server = start_tools()
    address = ("127.0.0.1", int(server.port))
    with socket.create_connection(address) as leaving:
        leaving.sendall(
            f"POST /mcp HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nContent-Type: application/json\r\n"
            f"Accept: application/json, text/event-stream\r\n{header}Content-Length: 100\r\n\r\n{{".encode()
        )
    with_client(server.url, "auto", lambda client: client.list_tools())
    assert server.stop() == ""


def run_tools(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fanmark.servers.tools", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=30)


def test_port_taken_is_one_line_and_exit_2(tools_url: str) -> None:
    port = tools_url.removesuffix("/mcp").rpartition(":")[2]
    done = run_tools("--port", port)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"fanmark serve tools: cannot listen on 127.0.0.1:{port} (Address already in use); choose another --port, or 0\n"
    )


def test_answers_leave_at_once() -> None:
    """Nagle's algorithm is off on connections accepted from the listener: asyncio does that for a socket named TCP."""
    with listen("127.0.0.1", 0) as sock:
        assert sock.proto == socket.IPPROTO_TCP


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--port", "70000"], "port = 70000: it must be from 0 to 65535"),
        (["--result-tokens", "-1"], "result_tokens = -1: it must be from 0 to 1000000"),
        (["--concurrency", "0"], "concurrency = 0: it must be from 1 to 1000000"),
        (["--tools", "search,fly"], "fly: there is no such tool, but search, fetch"),
        (["--fault", "flood"], "unknown fault 'flood'; there is: error, rpc-error"),
        (["--latency-s", "-1"], "it must be a number >= 0"),
        (["--latency-s", "inf"], "latency_s = inf: it must be at most 1e+06"),
        (["--latency-s", "soon"], "soon: could not convert string to float"),
        (["--latency-s", '{"dist": "gamma", "mean": 1, "cv": 101}'], "cv = 101: it must be at most 100"),
        (
            ["--latency-s", '{"dist": "normal", "mean": 1}'],
            "must be one of constant, uniform, exponential, lognormal, gamma",
        ),
        (["--latency-s", '{"dist": "uniform", "mean": 1}'], "a uniform distribution needs min and max"),
        (["--latency-s", '{"dist": "gamma", "mean": 1, "sd": 2}'], "'sd' is no part of a distribution"),
    ],
)
def test_wrong_flags_exit_2(flags: list[str], message: str) -> None:
    done = run_tools(*flags)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("latency", "mean", "spread"),
    [
        pytest.param(0.25, 0.25, 0.0, id="a number is itself"),
        pytest.param({"dist": "constant", "mean": 2}, 2.0, 0.0, id="constant is constant"),
        pytest.param({"dist": "uniform", "min": 1, "max": 3}, 2.0, 2 / 12**0.5, id="uniform: (max - min) / sqrt 12"),
        pytest.param({"dist": "exponential", "mean": 0.5}, 0.5, 0.5, id="exponential: as wide as its mean"),
        pytest.param({"dist": "lognormal", "mean": 2, "cv": 0.5}, 2.0, 1.0, id="lognormal: cv x mean"),
        pytest.param({"dist": "gamma", "mean": 2, "cv": 0.5}, 2.0, 1.0, id="gamma: cv x mean"),
    ],
)
def test_latencies_have_the_mean_and_spread_of_their_distribution(latency: Any, mean: float, spread: float) -> None:
    drawn = [draw_latency_s(latency, seed) for seed in range(20_000)]
    found = sum(drawn) / len(drawn)
    assert found == pytest.approx(mean, rel=0.02)
    assert (sum((x - found) ** 2 for x in drawn) / len(drawn)) ** 0.5 == pytest.approx(spread, rel=0.04, abs=1e-9)


@given(
    st.sampled_from(["constant", "exponential", "lognormal", "gamma"]),
    st.floats(0, 100),
    st.floats(0.05, 3),
    st.floats(0, 50),
    st.floats(0, 50),
    st.integers(),
)
def test_latency_stays_within_its_ends(kind: str, mean: float, cv: float, low: float, width: float, seed: int) -> None:
    latency = {"dist": kind, "mean": mean, "cv": cv, "min": low, "max": low + width}
    check_latency(latency)
    drawn = draw_latency_s(latency, seed)
    assert low <= drawn <= low + width
    assert drawn == draw_latency_s(latency, seed)


FILLER = Filler()


@given(st.integers(0, 500), st.integers() | st.text())
def test_result_text_counts_and_repeats(tokens: int, seed: int | str) -> None:
    text = FILLER.text(tokens, seed)
    assert len(Tokenizer(vocabulary()).encode(text)) == tokens and text.isascii()
    assert text == FILLER.text(tokens, seed)


def test_sessions_are_limited_ended_and_kept_from_other_origins() -> None:
    """The third of two is 503 until one is deleted; a session that ended is 404; a web page may not call."""
    asked = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "test", "version": "0"}}
    opening = {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": asked}

    async def run() -> None:
        with listen("127.0.0.1", 0) as sock:
            url = f"http://127.0.0.1:{sock.getsockname()[1]}/mcp"
            async with serving(sock, Behaviour(), max_sessions=2), aiohttp.ClientSession() as http:

                async def post(body: Any, **headers: str) -> tuple[int, str]:
                    async with http.post(url, json=body, headers=headers) as response:
                        return response.status, response.headers.get("Mcp-Session-Id", "")

                first, second, third = [await post(opening) for _ in range(3)]
                assert (first[0], second[0], third[0]) == (200, 200, 503)
                ping = {"jsonrpc": "2.0", "id": 2, "method": "ping"}
                assert (await post(ping, **{"Mcp-Session-Id": first[1]}))[0] == 200
                assert (await post(ping))[0] == 400
                async with http.delete(url, headers={"Mcp-Session-Id": first[1]}) as response:
                    assert response.status == 200
                assert (await post(ping, **{"Mcp-Session-Id": first[1]}))[0] == 404
                assert (await post(opening))[0] == 200
                assert (await post(ping, Origin="http://example.com"))[0] == 403
                assert (await post(ping, Origin="http://localhost:3000"))[0] == 400

    asyncio.run(run())
