"""Sessions and what breaks them: our thin client and the SDK's against servers of both kinds, in both eras of the protocol."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from mcp_peers import StartTools, sdk_server

from fanmark.loadgen.lanes.mcp import Sessions, ToolProtocolError, ToolServers, ToolServerSpec, ToolTransportError, Trip
from fanmark.loadgen.lanes.mcp_model import RemoteTool
from fanmark.loadgen.lanes.mcp_thin import ThinConnection
from fanmark.servers import mcp_codec as codec

CALL_S = 20.0
ERAS = [codec.MODERN, codec.LATEST_HANDSHAKE]
ADD = RemoteTool("add", "", {}, True)


@asynccontextmanager
async def thin(url: str, version: str | None) -> AsyncIterator[ThinConnection]:
    connection = ThinConnection(ToolServerSpec(url=url), version)
    try:
        yield connection
    finally:
        await connection.close()
        assert asyncio.all_tasks() == {asyncio.current_task()}


async def text_of(connection: ThinConnection, tool: str, **arguments: Any) -> str:
    """What the tool said, or the class of the error."""
    try:
        return (await connection.call(RemoteTool(tool, "", {}, True), arguments, CALL_S, {}, Trip())).text
    except (ToolTransportError, ToolProtocolError) as error:
        return type(error).__name__


@pytest.mark.real
@pytest.mark.parametrize("json_response", [True, False])
@pytest.mark.parametrize("version", ERAS)
def test_the_thin_client_against_the_sdk_s_server(version: str, json_response: bool) -> None:
    """Results, errors, progress, a server that asks back: in both eras, as JSON and as events."""

    async def run(url: str) -> None:
        async with thin(url, version) as connection:
            await connection.start(CALL_S)
            assert connection.version == version
            assert [(tool.name, tool.read_only) for tool in connection.tools] == [
                ("add", True), ("slow", False), ("broken", False), ("refused", False), ("curious", False),
            ]  # fmt: skip
            assert await text_of(connection, "add", a=2, b=3) == "5"
            assert await text_of(connection, "slow", steps=3) == "done"
            assert await text_of(connection, "refused") == "ToolProtocolError"
            wrong = await connection.call(RemoteTool("broken", "", {}, True), {}, CALL_S, {}, Trip())
            assert wrong.is_error
            if not json_response:  # where there is no stream, a server cannot ask back
                assert await text_of(connection, "curious") == "nobody to ask"
            sums = await asyncio.gather(*(text_of(connection, "add", a=i, b=1) for i in range(40)))
            assert sums == [str(i + 1) for i in range(40)]

    with sdk_server(json_response=json_response) as url:
        asyncio.run(run(url))


@pytest.mark.real
@pytest.mark.parametrize("version", ERAS)
def test_a_call_that_is_given_up_ends_at_the_server(version: str) -> None:
    async def run(url: str) -> None:
        async with thin(url, version) as connection:
            await connection.start(CALL_S)
            with pytest.raises(ToolTransportError, match=r"no answer within 0\.2 s"):
                await connection.call(RemoteTool("slow", "", {}, True), {"steps": 1000}, 0.2, {}, Trip())
            async with asyncio.timeout(CALL_S):
                while await text_of(connection, "add", a=-1, b=0) != "cancelled":  # noqa: ASYNC110 - the server tells
                    await asyncio.sleep(0.02)

    with sdk_server() as url:
        asyncio.run(run(url))


async def ask(servers: ToolServers, query: int, agent: str) -> tuple[str, Trip]:
    trip = Trip(query, agent)
    try:
        result = await servers.call("search", {"query": "x"}, timeout_s=CALL_S, trip=trip)
        return "result" if not result.is_error else "tool_error", trip
    except (ToolTransportError, ToolProtocolError) as error:
        return f"{error.kind}: {error}", trip


class Recorder:
    """A tool server in this process that speaks the handshake era, and counts."""

    def __init__(self, max_sessions: int = 1000) -> None:
        self.max_sessions = max_sessions
        self.opened, self.ended = 0, 0
        self.sessions: set[str] = set()
        self.connections: set[Any] = set()

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        self.connections.add(id(request.transport))
        name = request.headers.get("Mcp-Session-Id", "")
        if request.method == "DELETE":
            self.sessions.discard(name)
            self.ended += 1
            return web.Response()
        message = codec.decode(await request.read())
        if isinstance(message, codec.Notification):
            return web.Response(status=202)
        assert isinstance(message, codec.Request)
        if message.method == "server/discover":
            return self.reply(codec.Failure(None, codec.INVALID_REQUEST, "no session"), 400)
        if message.method == "initialize":
            if len(self.sessions) >= self.max_sessions:
                return self.reply(codec.Failure(None, codec.INTERNAL_ERROR, "Too many open sessions"), 503)
            self.opened += 1
            self.sessions.add(f"s{self.opened}")
            version = {"protocolVersion": codec.LATEST_HANDSHAKE, "capabilities": {}, "serverInfo": {}}
            return self.reply(codec.Result(message.id, version), session=f"s{self.opened}")
        if name not in self.sessions:
            return self.reply(codec.Failure(None, codec.INVALID_REQUEST, "Session not found"), 404)
        if message.method == "tools/list":
            return self.reply(codec.Result(message.id, {"tools": [{"name": "search", "inputSchema": {}}]}))
        return self.reply(codec.Result(message.id, {"content": [{"type": "text", "text": name}]}))

    @staticmethod
    def reply(message: codec.Message, status: int = 200, session: str = "") -> web.Response:
        headers = {"Mcp-Session-Id": session} if session else {}
        return web.Response(body=codec.encode(message), content_type="application/json", status=status, headers=headers)


def with_recorder(recorder: Recorder, use: Callable[[str], Awaitable[None]]) -> None:
    async def run() -> None:
        runner = web.ServerRunner(web.Server(recorder.handle), shutdown_timeout=0.1)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            await use(f"http://127.0.0.1:{runner.addresses[0][1]}/mcp")
        finally:
            await runner.cleanup()

    asyncio.run(run())


async def asked_by(servers: ToolServers, agents: Sequence[tuple[int, str]], times: int = 2) -> list[tuple[str, Trip]]:
    found = [await asyncio.gather(*(ask(servers, *agent) for agent in agents)) for _ in range(times)]
    return [each for row in found for each in row]


@pytest.mark.parametrize(("sessions", "expected"), [("shared", 0), ("per_query", 3), ("per_agent", 6)])
def test_who_has_a_session_of_its_own(sessions: Sessions, expected: int) -> None:
    """Three queries of two agents: so many sessions beside the listing's, each timed, each ended, each on sockets of its own."""
    recorder = Recorder()
    agents = [(query, agent) for query in range(3) for agent in ("a", "b")]

    async def use(url: str) -> None:
        servers = await ToolServers.open([ToolServerSpec(url=url)], CALL_S, sessions=sessions)
        assert recorder.opened == 1
        assert recorder.sessions == ({"s1"} if sessions == "shared" else set())
        recorder.connections.clear()
        found = await asked_by(servers, agents)
        assert {outcome for outcome, _ in found} == {"result"}
        assert recorder.opened == 1 + expected
        timed = [trip for _, trip in found if trip.opened_session]
        assert len(timed) == expected
        assert all(trip.sent_at is not None and 0 < (trip.session_s or 0) < CALL_S for trip in timed)
        assert len(recorder.connections) >= expected
        for query in range(3):
            servers.end(query)
        await servers.close()
        assert recorder.sessions == set()

    with_recorder(recorder, use)


def test_a_server_with_fifty_sessions_and_two_hundred_agents() -> None:
    """Fifty work, the others are told why; a query that ends makes room."""
    recorder = Recorder(max_sessions=50)

    async def use(url: str) -> None:
        servers = await ToolServers.open([ToolServerSpec(url=url)], CALL_S, sessions="per_agent")
        found = await asked_by(servers, [(query, "a") for query in range(200)], times=1)
        outcomes = [outcome for outcome, _ in found]
        assert outcomes.count("result") == 50
        assert set(outcomes) == {
            "result",
            f"tool_transport: tool server {url}: HTTP 503: Too many open sessions",
        }
        assert all((trip.sent_at is None) == (outcome != "result") for outcome, trip in found)
        for query in range(200):
            servers.end(query)
        await asyncio.gather(*servers._ending)
        assert (await ask(servers, 500, "a"))[0] == "result"
        await servers.close()
        assert recorder.ended == recorder.opened == 52

    with_recorder(recorder, use)


def test_a_session_that_the_server_forgot_costs_no_call() -> None:
    """The server answers 404: it has run nothing, so all go on in one new session."""
    recorder = Recorder()

    async def use(url: str) -> None:
        servers = await ToolServers.open([ToolServerSpec(url=url)], CALL_S)
        recorder.sessions.clear()
        found = await asked_by(servers, [(query, "a") for query in range(30)], times=1)
        assert [outcome for outcome, _ in found] == ["result"] * 30
        assert recorder.opened == 2
        assert sum(trip.opened_session for _, trip in found) == 1
        assert all(trip.session_s is not None for _, trip in found)
        await servers.close()

    with_recorder(recorder, use)


@pytest.mark.parametrize(
    ("reply", "kind", "said"),
    [
        (b'{"jsonrpc":"2.0","id":1,"result":{"content":{}}}', "tool_protocol", "no list of blocks"),
        (b'{"jsonrpc":"2.0","id":1', "tool_protocol", "no JSON"),
        (b'{"jsonrpc":"2.0","id":99,"result":{}}', "tool_transport", "ended without a reply"),
        (
            b'{"jsonrpc":"2.0","id":1,"error":{"code":-32050,"message":"no such thing"}}',
            "tool_protocol",
            "no such thing",
        ),
        (None, "tool_transport", "connection lost"),
    ],
)
def test_a_reply_that_fails_costs_its_own_call(reply: bytes | None, kind: str, said: str) -> None:
    """The others, made at once and after it, have their results, in the same session."""

    class Failing(Recorder):
        async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
            body = await request.read()
            if b'"query":"7"' not in body:
                return await super().handle(request)
            if reply is None:
                assert request.transport is not None
                request.transport.abort()
                return web.Response()
            number = b'"id":%d' % codec.decode(body).id  # type: ignore[union-attr]
            return web.Response(body=reply.replace(b'"id":1', number, 1), content_type="application/json")

    recorder = Failing()

    async def use(url: str) -> None:
        servers = await ToolServers.open([ToolServerSpec(url=url)], CALL_S)

        async def call(number: int) -> str:
            try:
                return (await servers.call("search", {"query": str(number)}, timeout_s=CALL_S)).text
            except (ToolTransportError, ToolProtocolError) as error:
                return f"{error.kind}: {error}"

        for _ in range(2):
            outcomes = await asyncio.gather(*map(call, range(20)))
            assert [o for n, o in enumerate(outcomes) if n != 7] == ["s1"] * 19
            assert outcomes[7].startswith(f"{kind}: ")
            assert said in outcomes[7]
        await servers.close()

    with_recorder(recorder, use)


def test_a_server_that_sends_on_to_its_own_path_is_followed_and_to_another_host_not() -> None:
    class Moved(Recorder):
        async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
            if request.path == "/mcp":
                return web.Response(status=307, headers={"Location": "/mcp/"})
            if request.path == "/away":
                return web.Response(status=308, headers={"Location": "http://example.com/mcp"})
            return await super().handle(request)

    recorder = Moved()

    async def use(url: str) -> None:
        servers = await ToolServers.open([ToolServerSpec(url=url)], CALL_S)
        assert [o for o, _ in await asked_by(servers, [(1, "a")])] == ["result"] * 2
        await servers.close()
        connection = ThinConnection(ToolServerSpec(url=url.replace("/mcp", "/away")))
        with pytest.raises(ToolTransportError, match="HTTP 308"):
            await connection.start(CALL_S)
        await connection.close()

    with_recorder(recorder, use)


@pytest.mark.real
def test_a_run_by_url_does_not_need_the_sdk(start_tools: StartTools) -> None:
    server = start_tools("--latency-s", "0", "--result-tokens", "3")
    code = (
        "import asyncio, sys\nfrom fanmark.loadgen.lanes.mcp import ToolServers, ToolServerSpec\n"
        "async def main():\n"
        f"    servers = await ToolServers.open([ToolServerSpec(url='{server.url}')])\n"
        "    result = await servers.call('search', {'query': 'x'}, timeout_s=9)\n"
        "    print(len(result.text.split()), {'mcp', 'httpx2', 'pydantic'} & set(sys.modules))\n"
        "    await servers.close()\n"
        "asyncio.run(main())"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "3 set()\n"
