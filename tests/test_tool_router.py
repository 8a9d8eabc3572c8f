"""The router of tool servers: who is asked by whom, with our thin client and the SDK's, in both eras of the protocol."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import aiohttp
import pytest
from mcp import Client
from mcp_peers import StartTools
from processes import children, gone

from fanmark.loadgen.lanes.mcp import ToolServerSpec, Trip
from fanmark.loadgen.lanes.mcp_model import RemoteTool
from fanmark.loadgen.lanes.mcp_thin import ThinConnection
from fanmark.servers import mcp_codec as codec
from fanmark.servers.replicas import Replicas
from fanmark.servers.tool_router import ToolRouter
from fanmark.servers.tool_specs import Behaviour
from fanmark.servers.tools import answering, listen, serving

CALL_S = 20.0
SEARCH, SLOW = RemoteTool("search", "", {}, True), RemoteTool("slow_job", "", {}, True)
Call = Callable[..., Awaitable[str]]


class Fleet:
    """Two tool servers in this process, and their router."""

    def __init__(self, url: str, client: aiohttp.ClientSession, ends: list[AsyncExitStack]) -> None:
        self.url, self.client, self._ends = url, client, ends

    async def told(self, name: str) -> list[float]:
        """A metric's sum, by server."""
        async with self.client.get(self.url.replace("/mcp", "/metrics")) as reply:
            found: Counter[str] = Counter()
            for place, value in re.findall(rf'^{name}{{replica="(\d)".*}} (\S+)$', await reply.text(), re.MULTILINE):
                found[place] += float(value)
        return [found["0"], found["1"]]

    async def post(self, session: str, method: str = "tools/list") -> int:
        """The status of a request in this session."""
        body = codec.encode(codec.Request(1, method, {}))
        headers = {codec.SESSION_HEADER: session, "Content-Type": "application/json"}
        async with self.client.post(self.url, data=body, headers=headers) as reply:
            return reply.status

    async def lose(self, place: int) -> None:
        await self._ends[place].aclose()


@asynccontextmanager
async def fleet() -> AsyncIterator[Fleet]:
    async with AsyncExitStack() as stack:
        ends, urls = [], []
        for _ in range(2):
            end = await stack.enter_async_context(AsyncExitStack())
            sock = end.enter_context(listen("127.0.0.1", 0))
            await end.enter_async_context(serving(sock, Behaviour(latency_s=0, result_tokens=5)))
            urls.append(f"http://127.0.0.1:{sock.getsockname()[1]}/mcp")
            ends.append(end)
        client = await stack.enter_async_context(aiohttp.ClientSession())
        sock = stack.enter_context(listen("127.0.0.1", 0))
        await stack.enter_async_context(answering(sock, ToolRouter(Replicas(urls, client)).handle))
        yield Fleet(f"http://127.0.0.1:{sock.getsockname()[1]}/mcp", client, ends)


@asynccontextmanager
async def agent(kind: str, url: str) -> AsyncIterator[Call]:
    """A session with the router, of the handshake era unless `kind` says else: what calls a tool in it."""
    if kind == "sdk":
        async with Client(url, mode="legacy") as client:
            assert client.protocol_version == codec.LATEST_HANDSHAKE

            async def by_sdk(tool: RemoteTool = SEARCH, **arguments: Any) -> str:
                result = await client.call_tool(tool.name, arguments or {"query": "x"})
                assert not result.is_error
                return str(result.content[0])

            yield by_sdk
        return
    connection = ThinConnection(ToolServerSpec(url=url), codec.MODERN if kind == "modern" else codec.LATEST_HANDSHAKE)
    await connection.start(CALL_S)

    async def by_thin(tool: RemoteTool = SEARCH, **arguments: Any) -> str:
        result = await connection.call(tool, arguments or {"query": "x"}, CALL_S, {}, Trip())
        assert not result.is_error
        return result.text

    try:
        yield by_thin
    finally:
        await connection.close()


def with_fleet(use: Callable[[Fleet], Awaitable[None]]) -> None:
    async def run() -> None:
        async with fleet() as found:
            await use(found)

    asyncio.run(run())


@pytest.mark.parametrize("kind", ["thin", "sdk"])
def test_sessions_take_turns_and_stay_where_they_are(kind: str) -> None:
    async def use(fleet: Fleet) -> None:
        async with AsyncExitStack() as stack:
            agents = [await stack.enter_async_context(agent(kind, fleet.url)) for _ in range(3)]
            for call, times in zip(agents, (3, 1, 4), strict=True):
                for _ in range(times):
                    await call()
            assert await fleet.told("fanmark_tools_sessions") == [2, 1]
            assert await fleet.told("fanmark_tools_calls_total") == [7, 1]
            await agents[1](SLOW, steps=2, seconds=0.01)  # a stream of events, with its progress
            assert await fleet.told("fanmark_tools_calls_total") == [7, 2]
        assert await fleet.told("fanmark_tools_sessions") == [0, 0]  # each was ended where it was

    with_fleet(use)


def test_calls_without_a_session_take_turns() -> None:
    async def use(fleet: Fleet) -> None:
        async with agent("modern", fleet.url) as call:
            for _ in range(6):
                await call()
        assert await fleet.told("fanmark_tools_calls_total") == [3, 3]
        assert await fleet.told("fanmark_tools_sessions") == [0, 0]

    with_fleet(use)


def test_a_session_that_nobody_opened_or_that_was_ended_is_404() -> None:
    async def use(fleet: Fleet) -> None:
        for name in ("", "x", "0", "0-", "0-x", "1-x", "2-x", "-1-x", "²-x"):
            assert await fleet.post(name) == 404, name
        hello = {"protocolVersion": codec.LATEST_HANDSHAKE, "capabilities": {}, "clientInfo": {"name": "x"}}
        asked = codec.encode(codec.Request(1, "initialize", hello))
        async with fleet.client.post(fleet.url, data=asked) as reply:
            name = reply.headers[codec.SESSION_HEADER]
        assert await fleet.post(name) == 200 and await fleet.post(f"1-{name[2:]}") == 404
        async with fleet.client.get(fleet.url, headers={codec.SESSION_HEADER: name}) as reply:
            assert reply.status == 405 and reply.headers["Allow"] == "POST, DELETE"
        async with fleet.client.delete(fleet.url, headers={codec.SESSION_HEADER: name}) as reply:
            assert reply.status == 200
        assert await fleet.post(name) == 404

    with_fleet(use)


@pytest.mark.parametrize("kind", ["thin", "modern"])
def test_a_lost_server_s_sessions_go_on_at_the_others(kind: str) -> None:
    async def use(fleet: Fleet) -> None:
        async with agent(kind, fleet.url) as first, agent(kind, fleet.url) as second:
            await fleet.lose(0)
            for call in (first, second, first, second):
                await call()
            async with agent(kind, fleet.url) as third:
                await third()
            await fleet.lose(1)
            async with fleet.client.post(fleet.url, data=b"{}") as reply:
                assert reply.status == 502 and "replica" in await reply.text()
            async with fleet.client.get(fleet.url.replace("/mcp", "/metrics")) as reply:
                assert reply.status == 502

    with_fleet(use)


@pytest.mark.parametrize("version", [codec.MODERN, codec.LATEST_HANDSHAKE])
def test_a_call_that_is_given_up_ends_at_its_server(version: str) -> None:
    """By going away in the modern era, by a message in the other."""

    async def use(fleet: Fleet) -> None:
        connection = ThinConnection(ToolServerSpec(url=fleet.url), version)
        await connection.start(CALL_S)
        call = asyncio.ensure_future(
            connection.call(SEARCH, {"query": "x"}, CALL_S, {"fanmark/latency_s": 3600}, Trip())
        )
        async with asyncio.timeout(CALL_S):
            while sum(await fleet.told("fanmark_tools_in_flight")) == 0:  # noqa: ASYNC110 - the server tells
                await asyncio.sleep(0.01)
            call.cancel()
            while sum(await fleet.told("fanmark_tools_in_flight")):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert sum(await fleet.told("fanmark_tools_calls_total")) == 1
        await connection.close()

    with_fleet(use)


@pytest.mark.real
def test_as_processes_they_have_seeds_of_their_own_and_end_with_the_router(start_tools: StartTools) -> None:
    server = start_tools("--replicas", "3", "--latency-s", "0", "--result-tokens", "9", "--seed", "4")

    async def first_words() -> list[str]:
        async with AsyncExitStack() as stack:
            agents = [await stack.enter_async_context(agent("thin", server.url)) for _ in range(3)]
            return [await call() for call in agents]

    assert len(set(asyncio.run(first_words()))) == 3
    replicas = children(server.process.pid)
    assert len(replicas) == 3
    with socket.create_connection(("127.0.0.1", int(server.port))) as leaving:
        leaving.sendall(b"POST /mcp HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100\r\n\r\n{")
    asyncio.run(first_words())
    os.kill(server.process.pid, signal.SIGTERM)
    assert server.process.wait(timeout=20) == 0 and gone(replicas)
    assert server.process.stderr is not None and server.process.stderr.read() == b""


@pytest.mark.real
def test_killed_it_takes_the_servers_along(start_tools: StartTools) -> None:
    server = start_tools("--replicas", "2")
    replicas = children(server.process.pid)
    server.process.kill()
    assert len(replicas) == 2 and gone(replicas)
