"""Fixtures: MCP servers in processes of their own, ours and other people's."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EVERYTHING = "@modelcontextprotocol/server-everything@2026.8.31"
StartTools = Callable[..., "ToolsProcess"]


class ToolsProcess:
    """Our MCP server as a process; `url` is what it printed."""

    def __init__(self, *flags: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fanmark.servers.tools", "--parent-pipe", *flags],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"no line from the server: {self.stop()}"
        started = json.loads(line)
        assert started["pid"] == self.process.pid
        self.url: str = started["url"]

    @property
    def port(self) -> str:
        return self.url.removesuffix("/mcp").rpartition(":")[2]

    def connections(self) -> int:
        """How many it has open, by the system's table."""
        rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        return sum(row[1].endswith(f":{int(self.port):04X}") and row[3] == "01" for row in rows)

    def stop(self) -> str:
        """Kill it; what it has written on standard error since the last time."""
        self.process.kill()
        self.process.wait()
        with ExitStack() as stack:
            for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
                assert pipe is not None
                stack.callback(pipe.close)
            assert self.process.stderr is not None
            return "" if self.process.stderr.closed else self.process.stderr.read().decode()


@pytest.fixture
def start_tools() -> Iterator[StartTools]:
    """A function that starts our server with the given flags; it ends with the test."""
    with ExitStack() as stack:

        def start(*flags: str) -> ToolsProcess:
            server = ToolsProcess(*flags)
            stack.callback(server.stop)
            return server

        yield start


@pytest.fixture(scope="session")
def tools_url() -> Iterator[str]:
    """One server of ours for all tests that need nothing special: no latency, 30 tokens."""
    server = ToolsProcess("--latency-s", "0", "--result-tokens", "30")
    yield server.url
    assert server.stop() == ""


@contextmanager
def everything_over_http(program: str, port: int = 0) -> Iterator[str]:
    """server-everything as an HTTP server: its URL, at once. It answers a little later."""
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        s.bind(("127.0.0.1", port))
        port = s.getsockname()[1]
    environment = {**os.environ, "PORT": str(port)}
    process = subprocess.Popen(
        [program, "streamableHttp"], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield f"http://127.0.0.1:{port}/mcp"
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def everything_program() -> str:
    """Path of the official reference server, which has every feature; installed once into the checkout's .cache."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm is not installed, and server-everything is an npm package")
    folder = ROOT / ".cache" / "npm" / EVERYTHING.rpartition("@")[2]
    program = folder / "node_modules" / ".bin" / "mcp-server-everything"
    if not program.exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = [npm, "install", "--no-audit", "--no-fund", "--prefix", str(folder), EVERYTHING]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    return str(program)


@pytest.fixture(scope="session")
def everything_url(everything_program: str) -> Iterator[str]:
    with everything_over_http(everything_program) as url:
        yield url


# The SDK's own server: read-only sums, a slow tool that tells of its progress and of its end, errors of both kinds, and a tool that asks
# the client for something.
SDK_SERVER = """
import asyncio, sys
import mcp_types as t
import uvicorn
from mcp.server import MCPServer
from mcp.server.mcpserver import Context
from mcp.shared.exceptions import MCPError
from pydantic import BaseModel

server, cancelled = MCPServer("judge"), False

class Count(BaseModel):
    n: int

@server.tool(annotations=t.ToolAnnotations(read_only_hint=True))
async def add(a: int, b: int) -> str:
    return "cancelled" if cancelled and a < 0 else str(a + b)

@server.tool()
async def slow(steps: int, context: Context) -> str:
    global cancelled
    try:
        for step in range(steps):
            await context.report_progress(step, steps, "working")
            await asyncio.sleep(0.01)
    except asyncio.CancelledError:
        cancelled = True
        raise
    return "done"

@server.tool()
async def broken() -> str:
    raise ValueError("no such thing")

@server.tool()
async def refused() -> str:
    raise MCPError(-32050, "refused")

@server.tool()
async def curious(context: Context) -> str:
    try:
        await context.elicit("How many?", Count)
    except Exception:
        return "nobody to ask"
    return "asked"

app = server.streamable_http_app(json_response=sys.argv[2] == "True")
uvicorn.run(app, port=int(sys.argv[1]), log_level="critical", timeout_keep_alive=75)
"""


@contextmanager
def sdk_server(*, json_response: bool = False) -> Iterator[str]:
    """A server on the official SDK: its URL, when it answers."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-c", SDK_SERVER, str(port), str(json_response)],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        while True:
            assert process.poll() is None, "the SDK's server ended"
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except ConnectionRefusedError:
                time.sleep(0.02)
        yield f"http://127.0.0.1:{port}/mcp"
    finally:
        process.kill()
        process.wait()
