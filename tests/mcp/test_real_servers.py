"""Eight MCP servers that others wrote (`make test-mcp`): each is listed and called, and all of them serve one run's tool chains."""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from fanmark.loadgen.lanes.mcp import Tool, ToolProtocolError, ToolServers, ToolServerSpec, arguments_for

pytestmark = pytest.mark.mcp

ROOT = Path(__file__).resolve().parents[2]
BIN = ROOT / ".mcp"
CALL_S, READY_S = 60.0, 60.0
SLOW = {"trigger-long-running-operation", "simulate-research-query"}  # ten seconds and more by their own default
# By server: how many tools it has, and how many of them, in a chain, take what is made from their schemas.
TOOLS = {
    "everything": (9, 9),
    "filesystem": (14, 7),
    "memory": (9, 7),
    "sequential-thinking": (1, 1),
    "time": (2, 2),
    "git": (12, 4),
    "fetch": (1, 1),
    "sqlite": (6, 5),
}


class Page(BaseHTTPRequestHandler):
    """What there is to fetch."""

    def do_GET(self) -> None:
        body = b"<html><body><h1>Trams</h1><p>They run.</p></body></html>"
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing is logged."""


@pytest.fixture(scope="module")
def page() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Page)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    thread.join()
    server.server_close()


def program(folder: str, name: str) -> str:
    path = BIN / folder / ("node_modules/.bin" if folder == "npm" else "bin") / name
    if not path.exists():
        pytest.skip("the servers are not installed: make test-mcp")
    return str(path)


def commands(folder: Path) -> Mapping[str, list[str]]:
    """By name, each server over files of its own in `folder`."""
    files, repository = folder / "files", folder / "repository"
    for each in (files, repository):
        each.mkdir(parents=True)
        (each / "a.txt").write_text("trams, buses\n")
    git = ["git", "-C", str(repository), "-c", "user.name=a", "-c", "user.email=a@example.com"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *arguments], check=True)
    memory = f"MEMORY_FILE_PATH={folder / 'memory.json'}"
    return {
        "everything": [program("npm", "mcp-server-everything"), "stdio"],
        "filesystem": ["env", "-C", str(files), program("npm", "mcp-server-filesystem"), str(files)],
        "memory": ["env", memory, program("npm", "mcp-server-memory")],
        "sequential-thinking": [program("npm", "mcp-server-sequential-thinking")],
        "time": [program("python", "mcp-server-time"), "--local-timezone", "UTC"],
        "git": ["env", "-C", str(repository), program("python", "mcp-server-git"), "--repository", str(repository)],
        "fetch": [program("python", "mcp-server-fetch"), "--ignore-robots-txt", "--allow-private-ips"],
        "sqlite": [program("sqlite", "mcp-server-sqlite"), "--db-path", str(folder / "f.db")],
    }


async def outcome(servers: ToolServers, tool: Tool, arguments: dict[str, object]) -> str:
    """A result, or the server's own error of either kind; any other exception fails the test."""
    try:
        result = await servers.call(tool.name, arguments, timeout_s=CALL_S)
    except ToolProtocolError:
        return "tool_protocol"
    assert result.bytes == len(result.text.encode())
    return "tool_error" if result.is_error else "completed"


@pytest.mark.parametrize("name", list(TOOLS))
def test_a_server_is_listed_and_each_of_its_tools_called(name: str, tmp_path: Path, page: str) -> None:
    """With arguments made from the schemas, in a chain and then all at once."""

    async def run() -> list[str]:
        spec = ToolServerSpec(command=commands(tmp_path)[name])
        servers = await ToolServers.open([spec], READY_S)
        try:
            tools = [tool for tool in servers.tools if tool.name not in SLOW]
            assert len(tools) >= TOOLS[name][0]
            rng = random.Random(7)
            given = [(tool, arguments_for(tool.input_schema, rng)) for tool in tools]
            given = [(tool, {**told, "url": page} if name == "fetch" else told) for tool, told in given]
            chain = [await outcome(servers, tool, told) for tool, told in given]
            assert chain.count("completed") >= TOOLS[name][1]
            return chain + await asyncio.gather(*(outcome(servers, tool, told) for tool, told in given))
        finally:
            await servers.close()

    assert set(asyncio.run(run())) <= {"completed", "tool_error"}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


@pytest.mark.parametrize("transport", ["thin", "sdk"])
def test_everything_by_url(transport: str) -> None:
    port = free_port()
    command = [program("npm", "mcp-server-everything"), "streamableHttp"]
    server = subprocess.Popen(
        command, env={**os.environ, "PORT": str(port)}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )

    async def run() -> Counter[str]:
        spec = ToolServerSpec(url=f"http://127.0.0.1:{port}/mcp")
        servers = await ToolServers.open([spec], READY_S, transport=transport)  # type: ignore[arg-type]
        try:
            rng = random.Random(7)
            tools = [tool for tool in servers.tools if tool.name not in SLOW]
            slow = next(tool for tool in servers.tools if tool.name == "trigger-long-running-operation")
            calls = [outcome(servers, tool, dict(arguments_for(tool.input_schema, rng))) for tool in tools]
            return Counter(await asyncio.gather(*calls, outcome(servers, slow, {"duration": 1, "steps": 4})))
        finally:
            await servers.close()

    try:
        found = asyncio.run(run())
    finally:
        server.kill()
        server.wait()
    assert set(found) <= {"completed", "tool_error"}
    assert found["completed"] >= 8


SCENARIO = """
[workload]
system = 50
question = 50
answer = 4
action = 4
[load]
mode = "closed"
concurrency = 4
queries = 4
warmup = 0
[[arm]]
name = "chain"
topology = "tool-chain"
baseline = true
tool_calls = 40
tools_per_step = 4
"""


def test_one_run_over_all_servers(tmp_path: Path) -> None:
    """Four agents at once, forty tool calls each, over all that the servers annotate read-only: every call has an outcome, errors are the
    servers' own, and the counts equal the closed form, the schemas' weight included."""
    scenario = tmp_path / "all.toml"
    listed = "".join(
        f"[[tools.server]]\ncommand = {json.dumps(command)}\n"
        for name, command in commands(tmp_path).items()
        if name != "fetch"
    )
    scenario.write_text(SCENARIO + "[tools]\nready_timeout_s = 60\ncall_timeout_s = 60\n" + listed)
    command = [
        sys.executable,
        "-m",
        "fanmark.loadgen.cli",
        "run",
        str(scenario),
        "--json",
        "--out",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    chain = found["arms"]["chain"]
    assert chain["queries"] == {"started": 4, "completed": 4, "failed": 0, "abandoned": 0}
    assert chain["expected"]["mismatches"] == 0
    assert sum(part["calls"] for part in chain["by_tool"].values()) == 160
    assert set(chain["errors"]) <= {"tool_error"}
    assert len(chain["by_tool"]) > 15
    assert found["tools"]["servers"] == 7
    assert found["tools"]["exposed"]["tokens"] > 8_000
