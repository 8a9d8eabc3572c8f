"""The MCP lane against real servers: ours, mcp-server-time, server-everything, and servers that break."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
from mcp_peers import StartTools, everything_over_http

from fanmark.loadgen.lanes.mcp import (
    Tool,
    ToolProtocolError,
    ToolServerError,
    ToolServers,
    ToolServerSpec,
    ToolTransportError,
    Trip,
    arguments_for,
)
from fanmark.servers.tokenizer import Tokenizer, vocabulary
from fanmark.servers.tool_specs import ALL_TOOLS
from fanmark.servers.vllm import free_port

# Our server, but calls of one tool are turned away by status 503, as an overloaded gateway does.
BUSY_SERVER = """
import asyncio, sys
from aiohttp import web
from fanmark.servers.mcp_app import McpApp
from fanmark.servers.tool_calls import ToolCalls
from fanmark.servers.tool_specs import Behaviour

async def main():
    app = McpApp(ToolCalls(Behaviour(latency_s=0.5, result_tokens=3)), 10)

    async def gateway(request):
        if request.headers.get("Mcp-Name") == "calculator":
            return web.Response(status=503, text="busy")
        return await app.handle(request)

    runner = web.ServerRunner(web.Server(gateway))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", int(sys.argv[1])).start()
    await asyncio.Event().wait()

asyncio.run(main())
"""

T = TypeVar("T")
TIME_SERVER = str(Path(sys.executable).with_name("mcp-server-time"))
READY_S = 30.0
CALL_S = 20.0

# Three pages of tools; "picture" returns no text, "broken" a JSON-RPC error.
PAGES_SERVER = """
import asyncio, mcp_types as t
from mcp.server.lowlevel import Server
from mcp.server.stdio import stdio_server
from mcp.shared.exceptions import MCPError

NAMES = ["picture", "broken", "dotted.name"]

async def list_tools(ctx, params):
    page = int(params.cursor or 0) if params else 0
    tool = t.Tool(name=NAMES[page], input_schema={"type": "object"})
    return t.ListToolsResult(tools=[tool], next_cursor=str(page + 1) if page < 2 else None)

async def call_tool(ctx, params):
    if params.name == "broken":
        raise MCPError(-32050, "no such thing")
    picture = t.ImageContent(data="AAAA", mime_type="image/png")
    return t.CallToolResult(content=[t.TextContent(text="before "), picture, t.TextContent(text=" after")])

async def main():
    server = Server("pages", on_list_tools=list_tools, on_call_tool=call_tool)
    async with stdio_server() as (read, write):
        await server.run(read, write, server.create_initialization_options())

asyncio.run(main())
"""


def with_servers(
    use: Callable[[ToolServers], Awaitable[T]], *specs: ToolServerSpec, ready_s: float = READY_S, **how: Any
) -> T:
    async def run() -> T:
        servers = await ToolServers.open(specs, ready_s, **how)
        try:
            return await use(servers)
        finally:
            await servers.close()
            assert asyncio.all_tasks() == {asyncio.current_task()}

    return asyncio.run(run())


def seeded(seed: int) -> dict[str, Any]:
    return {"fanmark/seed": seed}


async def outcome(servers: ToolServers, name: str, arguments: dict[str, Any]) -> str:
    """Text of the result, or the class of the error."""
    try:
        return (await servers.call(name, arguments, timeout_s=CALL_S)).text
    except ToolTransportError:
        return "ToolTransportError"
    except ToolProtocolError:
        return "ToolProtocolError"


async def answer_to(servers: ToolServers, tool: Tool) -> str:
    arguments = arguments_for(tool.input_schema, random.Random(1))
    result = await servers.call(tool.name, arguments, timeout_s=CALL_S)
    assert not result.is_error, (tool.name, arguments, result.text)
    assert result.bytes == len(result.text.encode()) > 0
    return result.text


@pytest.mark.parametrize("transport", ["thin", "sdk"])
def test_embedded_server_through_the_lane(tools_url: str, transport: str) -> None:
    async def use(servers: ToolServers) -> None:
        assert [(t.name, t.input_schema, t.read_only) for t in servers.tools] == [
            (spec.name, spec.input_schema, True) for spec in ALL_TOOLS
        ]
        results = await asyncio.gather(
            *(servers.call("search", {"query": "x"}, timeout_s=CALL_S, meta=seeded(i % 40)) for i in range(80))
        )
        assert not any(r.is_error for r in results)
        assert {Tokenizer(vocabulary()).count(r.text) for r in results} == {30}
        assert len({r.text for r in results}) == 40
        failed = await servers.call("search", {}, timeout_s=CALL_S)
        assert failed.is_error
        assert failed.text == "bad arguments: $: 'query' is a required property"

    with_servers(use, ToolServerSpec(url=tools_url), transport=transport)


def test_two_servers_with_the_same_tools_keep_apart(tools_url: str) -> None:
    async def use(servers: ToolServers) -> None:
        names = [t.name for t in servers.tools]
        label = tools_url.removeprefix("http://").removesuffix("/mcp").replace(".", "_").replace(":", "_")
        assert names[0] == "search"
        assert names[10] == f"{label}__search"
        assert names[20] == "2__search"
        assert len(set(names)) == 30
        assert (await servers.call("2__search", {"query": "x"}, timeout_s=CALL_S)).is_error is False

    with_servers(use, *[ToolServerSpec(url=tools_url)] * 3)


def test_pages_names_and_results_of_a_foreign_server() -> None:
    async def use(servers: ToolServers) -> None:
        assert [(t.name, t.remote_name, t.read_only, t.description) for t in servers.tools] == [
            ("picture", "picture", False, ""),
            ("broken", "broken", False, ""),
            ("dotted_name", "dotted.name", False, ""),
        ]
        result = await servers.call("picture", {}, timeout_s=CALL_S)
        assert result.text == 'before \n{"type":"image","data":"AAAA","mimeType":"image/png"}\n after'
        with pytest.raises(ToolProtocolError, match="no such thing"):
            await servers.call("broken", {}, timeout_s=CALL_S)
        with pytest.raises(ToolProtocolError, match="no tool 'nope': there are picture, broken, dotted_name"):
            await servers.call("nope", {}, timeout_s=CALL_S)
        assert await outcome(servers, "dotted_name", {}) == result.text

    with_servers(use, ToolServerSpec(command=[sys.executable, "-c", PAGES_SERVER]))


def test_a_server_killed_in_a_call_costs_that_call_and_no_other(start_tools: StartTools) -> None:
    """In flight: a transport error, never a CancelledError. While it is away: the same, soon. After its return: results."""
    first = start_tools("--latency-s", "3600")

    async def use(servers: ToolServers) -> None:
        lost = [asyncio.create_task(outcome(servers, "search", {"query": "x"})) for _ in range(5)]
        probe = {"fanmark/seed": [0]}  # refused without a wait: answered, so the calls above are in flight
        with pytest.raises(ToolProtocolError, match="must be a number or a string"):
            await servers.call("search", {"query": "x"}, timeout_s=CALL_S, meta=probe)
        first.stop()
        assert await asyncio.gather(*lost) == ["ToolTransportError"] * 5
        assert await outcome(servers, "search", {"query": "x"}) == "ToolTransportError"
        start_tools("--port", first.port, "--latency-s", "0", "--result-tokens", "3")
        assert len((await outcome(servers, "search", {"query": "x"})).split()) == 3

    with_servers(use, ToolServerSpec(url=first.url))


def test_a_call_out_of_time_or_cancelled_costs_no_other(start_tools: StartTools) -> None:
    server = start_tools("--latency-s", '{"dist": "uniform", "min": 0, "max": 1.2}', "--result-tokens", "3")

    async def use(servers: ToolServers) -> None:
        other = asyncio.create_task(outcome(servers, "search", {"query": "x"}))
        cancelled = asyncio.create_task(outcome(servers, "search", {"query": "x"}))
        with pytest.raises(ToolTransportError, match="no answer within 0 s"):
            await servers.call("search", {"query": "x"}, timeout_s=0, meta=seeded(1))
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        assert len((await other).split()) == 3
        assert len((await outcome(servers, "search", {"query": "x"})).split()) == 3

    with_servers(use, ToolServerSpec(url=server.url))


def test_a_call_refused_by_a_status_costs_no_other() -> None:
    port = free_port("127.0.0.1")
    with subprocess.Popen([sys.executable, "-c", BUSY_SERVER, str(port)], stdin=subprocess.DEVNULL) as process:

        async def use(servers: ToolServers) -> None:
            other = asyncio.create_task(outcome(servers, "search", {"query": "x"}))
            await asyncio.sleep(0)
            assert await outcome(servers, "calculator", {"expression": "1"}) == "ToolTransportError"
            assert not other.done()
            assert len((await other).split()) == 3

        try:
            with_servers(use, ToolServerSpec(url=f"http://127.0.0.1:{port}/mcp"))
        finally:
            process.kill()


def test_opening_can_be_cancelled_at_any_time(tools_url: str) -> None:
    """Cancelled before its first step, or while it connects: CancelledError, and nothing is left behind."""

    async def run() -> None:
        for steps in range(12):
            specs = [ToolServerSpec(url=tools_url), ToolServerSpec(command=["cat"])]
            opening = asyncio.create_task(ToolServers.open(specs, READY_S))
            for _ in range(steps):
                await asyncio.sleep(0)
            opening.cancel()
            with pytest.raises(asyncio.CancelledError):
                await opening
            assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(run())


@pytest.mark.parametrize(
    ("spec", "ready_s", "message"),
    [
        pytest.param(
            ToolServerSpec(command=["no-such-program-here", "x"]),
            READY_S,
            "tool server no-such-program-here x does not start: FileNotFoundError: .*no-such-program-here'$",
            id="no such program",
        ),
        pytest.param(
            ToolServerSpec(command=["sh", "-c", "for i in 1 2 3 4 5 6 7 8 9 10; do echo line $i >&2; done; exit 3"]),
            READY_S,
            r"tool server sh -c .* does not start: .* \| line 3 \| line 4 \| line 5 \| line 6 \| line 7 \| line 8 \| line 9"
            r" \| line 10$",
            id="ends with a message: its last eight lines",
        ),
        pytest.param(
            ToolServerSpec(command=["sh", "-c", "cat > /dev/null"]),
            0.3,
            "does not start: no answer within 0.3 s$",
            id="says nothing",
        ),
        pytest.param(
            ToolServerSpec(url="http://127.0.0.1:9/mcp"),
            0.3,
            "tool server http://127.0.0.1:9/mcp does not start: ClientConnectorError: .*",
            id="nobody listens",
        ),
    ],
)
def test_a_server_that_does_not_start_is_named(spec: ToolServerSpec, ready_s: float, message: str) -> None:
    with pytest.raises(ToolServerError, match=f"(?s){message}"):
        with_servers(lambda servers: asyncio.sleep(0), spec, ready_s=ready_s)


def test_one_server_that_does_not_start_ends_the_others(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    good = ToolServerSpec(command=["sh", "-c", f"echo $$ > {pid_file}; exec {TIME_SERVER}"])
    bad = ToolServerSpec(command=["sh", "-c", f"until test -s {pid_file}; do sleep 0.01; done; exit 1"])
    with pytest.raises(ToolServerError, match="does not start"):
        with_servers(lambda servers: asyncio.sleep(0), good, bad)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)


def test_spec_is_a_url_or_a_command() -> None:
    for url, command in ((None, None), ("http://x/mcp", ["x"]), (None, [])):
        with pytest.raises(ValueError, match="either a url or a command"):
            ToolServerSpec(url, command)


@pytest.mark.real
def test_mcp_server_time_over_stdio(tmp_path: Path) -> None:
    """A modern-era server: both tools take what is drawn for them; killed, it is started again."""
    pid_file = tmp_path / "pid"
    command = ["sh", "-c", f"echo $$ > {pid_file}; exec {TIME_SERVER} --local-timezone UTC"]

    async def use(servers: ToolServers) -> None:
        assert [(t.name, t.read_only) for t in servers.tools] == [("get_current_time", True), ("convert_time", True)]
        assert all('"timezone": "UTC"' in text for text in [await answer_to(servers, t) for t in servers.tools])
        wrong = await servers.call("get_current_time", {"timezone": "Mars/Olympus"}, timeout_s=CALL_S)
        assert wrong.is_error
        killed = int(pid_file.read_text())
        os.kill(killed, signal.SIGKILL)
        after = [await outcome(servers, "get_current_time", {"timezone": "UTC"}) for _ in range(2)]
        assert '"timezone": "UTC"' in after[1]
        assert int(pid_file.read_text()) != killed

    with_servers(use, ToolServerSpec(command=command))


@pytest.mark.real
def test_a_command_has_a_process_for_each_session(tmp_path: Path) -> None:
    """One for the listing, which ends with it, and one for each query, which ends with that."""
    pids = tmp_path / "pids"
    command = ["sh", "-c", f"echo $$ >> {pids}; exec {TIME_SERVER} --local-timezone UTC"]

    async def use(servers: ToolServers) -> None:
        def lives(place: int) -> bool:
            try:
                os.kill(int(pids.read_text().split()[place]), 0)
            except ProcessLookupError:
                return False
            return True

        trips = [Trip(query, "agent") for query in (1, 2)]
        for trip in trips * 2:
            result = await servers.call("get_current_time", {"timezone": "UTC"}, timeout_s=CALL_S, trip=trip)
            assert not result.is_error
        assert all(trip.opened_session and (trip.session_s or 0) > 0 for trip in trips)
        assert [lives(place) for place in range(3)] == [False, True, True]
        servers.end(1)
        await asyncio.gather(*servers._ending)
        assert [lives(place) for place in range(3)] == [False, False, True]

    with_servers(use, ToolServerSpec(command=command), sessions="per_query")


async def exercise_everything(servers: ToolServers) -> None:
    names = {t.name for t in servers.tools}
    assert {"echo", "get-sum", "get-tiny-image", "get-structured-content", "get-resource-links"} <= names
    slow = {"trigger-long-running-operation", "simulate-research-query"}
    answers = {t.name: await answer_to(servers, t) for t in servers.tools if t.read_only and t.name not in slow}
    assert len(answers) >= 6
    assert '{"type":"image",' in answers["get-tiny-image"]
    assert await outcome(servers, "echo", {"message": "hello"}) == "Echo: hello"
    assert await outcome(servers, "get-sum", {"a": 2, "b": 3}) == "The sum of 2 and 3 is 5."
    assert (await servers.call("echo", {"message": 3}, timeout_s=CALL_S)).is_error
    texts = await asyncio.gather(*(outcome(servers, "echo", {"message": str(i)}) for i in range(50)))
    assert texts == [f"Echo: {i}" for i in range(50)]


@pytest.mark.real
def test_server_everything_over_http(everything_url: str) -> None:
    """A server of the 2025-11-25 protocol, with a session."""
    with_servers(exercise_everything, ToolServerSpec(url=everything_url))


@pytest.mark.real
def test_server_everything_over_stdio(everything_program: str) -> None:
    with_servers(exercise_everything, ToolServerSpec(command=[everything_program, "stdio"]))


@pytest.mark.real
def test_a_session_that_a_restarted_server_does_not_know_is_replaced(everything_program: str) -> None:
    async def run() -> None:
        with everything_over_http(everything_program) as url:
            servers = await ToolServers.open([ToolServerSpec(url=url)], READY_S)
            try:
                assert await outcome(servers, "echo", {"message": "1"}) == "Echo: 1"
            except BaseException:
                await servers.close()
                raise
        try:
            with everything_over_http(everything_program, port=int(url.removesuffix("/mcp").rpartition(":")[2])):
                probe = await ToolServers.open([ToolServerSpec(url=url)], READY_S)
                await probe.close()
                assert [await outcome(servers, "echo", {"message": "2"}) for _ in range(2)] == ["Echo: 2"] * 2
        finally:
            await servers.close()

    asyncio.run(run())
