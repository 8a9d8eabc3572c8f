"""The MCP server `fanmark serve tools`: read-only tools over streamable HTTP, both eras of the protocol, in a process of its own.

When it listens, one line of JSON is printed: {"url": "http://127.0.0.1:PORT/mcp", "pid": N}; /metrics beside it is for Prometheus. A call
takes one of --concurrency slots, after waiting in --queue for it, and waits its latency. Then a tool does its small offline work; or, where
a length is asked for (--result-tokens), it returns exactly so many tokens of filler by fanmark.servers.tokenizer, as it does in a run that
has no tool server of its own. Three keys of a request's `_meta` rule both: "fanmark/seed" (what they are drawn from: equal seeds give equal
results; left out, a seed per call), "fanmark/result_tokens" and "fanmark/latency_s" (in place of the flags).
"""

import argparse
import asyncio
import json
import os
import signal
import socket
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fanmark.servers.faults import FaultError
from fanmark.servers.tool_faults import KINDS, ToolFault, parse_tool_fault
from fanmark.servers.tool_specs import ALL_TOOLS, MAX_RESULT_TOKENS, Behaviour, Latency, check_latency

if TYPE_CHECKING:
    from aiohttp import web

Handler = Callable[["web.BaseRequest"], Awaitable["web.StreamResponse"]]
KEEP_ALIVE_S = 75  # longer than a client keeps an idle connection, or the server closes one that is being reused
BACKLOG = 2048


class ToolsError(Exception):
    """The server cannot be started: one line that says why."""


@dataclass(frozen=True)
class ToolsOptions:
    """What the command line says."""

    behaviour: Behaviour
    host: str
    port: int
    max_sessions: int
    replicas: int
    parent_pipe: bool


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket; OSError where host or port cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # named TCP, not left at 0, or asyncio would not turn Nagle's algorithm off: 40 ms more for each call
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


def bound(options: ToolsOptions) -> socket.socket:
    """Where the options say. Raises ToolsError."""
    try:
        return listen(options.host, options.port)
    except OSError as error:
        raise ToolsError(
            f"cannot listen on {options.host}:{options.port} ({error.strerror}); choose another --port, or 0"
        ) from None


@asynccontextmanager
async def serving(sock: socket.socket, behaviour: Behaviour, max_sessions: int = 10_000) -> AsyncIterator[None]:
    """Answers on `sock` while the context lasts."""
    from fanmark.servers.mcp_app import McpApp
    from fanmark.servers.tool_calls import ToolCalls

    async with answering(sock, McpApp(ToolCalls(behaviour), max_sessions).handle):
        yield


@asynccontextmanager
async def answering(sock: socket.socket, handle: Handler) -> AsyncIterator[None]:
    """Has `handle` answer on `sock` while the context lasts."""
    from aiohttp import web

    server = web.Server(handle, access_log=None, handler_cancellation=True, keepalive_timeout=KEEP_ALIVE_S)
    runner = web.ServerRunner(server, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.SockSite(runner, sock).start()
        yield
    finally:
        await runner.cleanup()


def tell(sock: socket.socket, host: str, **more: Any) -> None:
    """Prints the line of JSON that says where it listens."""
    name = f"[{host}]" if ":" in host else host
    url = f"http://{name}:{sock.getsockname()[1]}/mcp"
    print(json.dumps({"url": url, "pid": os.getpid(), **more}), flush=True)


async def _serve_for_good(options: ToolsOptions) -> None:
    with bound(options) as sock:
        async with serving(sock, options.behaviour, options.max_sessions):
            tell(sock, options.host)
            loop = asyncio.get_running_loop()
            for each in (
                signal.SIGTERM,
                signal.SIGINT,
            ):  # at once: there is nothing to save, and a call may have minutes to wait
                loop.add_signal_handler(each, os._exit, 0)
            await asyncio.Event().wait()


def _end_with_parent() -> None:
    while os.read(0, 4096):  # not sys.stdin: its lock, held here, would abort the interpreter on its way out
        pass
    os._exit(0)


def serve_tools(options: ToolsOptions, argv: Sequence[str]) -> int:
    """Serve until SIGTERM, SIGINT or, with `parent_pipe`, the end of standard input; those end the process with 0. `argv`: the options as
    they were given, for replicas of their own.

    Returns 2, with one line on standard error, where the port is taken or a replica does not start. For a process of its own: it installs
    signal handlers.
    """
    if options.parent_pipe:
        threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        import uvloop
    except ImportError:
        factory = None
    else:
        factory = uvloop.new_event_loop
    try:
        with asyncio.Runner(loop_factory=factory) as runner:
            if options.replicas == 1:
                runner.run(_serve_for_good(options))
            else:
                from fanmark.servers.tool_router import serve

                runner.run(serve(options, argv))
    except ToolsError as error:
        print(f"fanmark serve tools: {error}", file=sys.stderr)
        return 2
    return 0


def _distribution(text: str) -> Latency:
    try:
        latency: Latency = json.loads(text) if text.lstrip().startswith("{") else float(text)
        check_latency(latency)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from None
    return latency


def _whole(name: str, low: int, high: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not text.lstrip("-").isdigit() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{name} = {text}: it must be from {low} to {high}")
        return int(text)

    return read


def _names(text: str) -> tuple[str, ...]:
    names, known = tuple(text.split(",")), [spec.name for spec in ALL_TOOLS]
    for name in names:
        if name not in known:
            raise argparse.ArgumentTypeError(f"{name}: there is no such tool, but {', '.join(known)}")
    return names


def _fault(text: str) -> ToolFault:
    try:
        return parse_tool_fault(text)
    except FaultError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parse_options(argv: Sequence[str]) -> ToolsOptions:
    """The command line: see the module. A wrong flag ends the process with 2, after one line."""
    # without a usage text, a wrong flag is answered by one line
    more = "With --ray ADDRESS|auto, --replicas are put on the nodes of that Ray cluster."
    parser = argparse.ArgumentParser(
        prog="fanmark serve tools", usage=argparse.SUPPRESS, allow_abbrev=False, epilog=more
    )
    add, like = parser.add_argument, 'or {"dist": "lognormal", "mean": 0.2, "cv": 1}'
    add("--host", default="127.0.0.1")
    add("--port", type=_whole("port", 0, 65_535), default=0, help="0 takes a free one")
    add("--latency-s", type=_distribution, default=0.2, help=f"seconds, {like}")
    add(
        "--result-tokens",
        type=_whole("result_tokens", 0, MAX_RESULT_TOKENS),
        help="default: what the tool's work gives",
    )
    add("--synthetic-latency-s", type=_distribution, help="of the tool `synthetic`; default: --latency-s")
    add("--synthetic-tokens", type=_distribution, default=Behaviour().synthetic_tokens, help=f"a number, {like}")
    add("--concurrency", type=_whole("concurrency", 1, 1_000_000), help="calls at once; default: no limit")
    add("--queue", type=_whole("queue", 0, 1_000_000), help="calls that may wait, beyond: 503; default: no limit")
    add("--tools", type=_names, default=Behaviour().tools, metavar="NAME,...", help="default: all")
    add(
        "--fault",
        dest="faults",
        type=_fault,
        action="append",
        default=[],
        help=f"KIND:key=value,...; {', '.join(KINDS)}",
    )
    add("--max-sessions", type=_whole("max_sessions", 1, 1_000_000), default=10_000, help="of the handshake era")
    add("--seed", type=int, default=0)
    text = "servers behind one address, each with these limits; sessions stay on theirs; default: 1"
    add("--replicas", type=_whole("replicas", 1, 10_000), default=1, help=text)
    add("--parent-pipe", action="store_true", help="end when standard input does")
    given = vars(parser.parse_args(argv))
    process = {name: given.pop(name) for name in ("host", "port", "max_sessions", "replicas", "parent_pipe")}
    return ToolsOptions(Behaviour(**given), **process)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: see the module."""
    given = sys.argv[1:] if argv is None else argv
    return serve_tools(parse_options(given), given)


if __name__ == "__main__":
    sys.exit(main())
