"""The embedded MCP server: eight read-only tools over streamable HTTP, in a process of its own.

    python -m fanmark.servers.tools [--host H] [--port P] [--latency-s X|JSON] [--result-tokens N] [--seed N] [--parent-pipe]

When it listens, one line of JSON is printed: {"url": "http://127.0.0.1:PORT/mcp", "pid": N}. A tool call waits its
latency and returns text of exactly N tokens by fanmark.servers.tokenizer. Two keys of a request's `_meta` rule both:
"fanmark/seed" (what latency and text are drawn from: equal seeds give equal results; left out, a seed per call) and
"fanmark/result_tokens" (in place of N). Speaks both eras of the protocol.
"""

import argparse
import asyncio
import json
import os
import signal
import socket
import sys
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from fanmark.servers.tool_specs import MAX_RESULT_TOKENS, Behaviour, Latency, check_latency

KEEP_ALIVE_S = 75  # longer than a client keeps an idle connection, or the server closes one that is being reused
BACKLOG = 2048
MAX_SESSIONS = 10_000


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


@asynccontextmanager
async def serving(sock: socket.socket, behaviour: Behaviour) -> AsyncIterator[None]:
    """Answers on `sock` while the context lasts."""
    from aiohttp import web

    from fanmark.servers.mcp_app import McpApp
    from fanmark.servers.tool_calls import ToolCalls

    app = McpApp(ToolCalls(behaviour), MAX_SESSIONS)
    server = web.Server(app.handle, access_log=None, handler_cancellation=True, keepalive_timeout=KEEP_ALIVE_S)
    runner = web.ServerRunner(server, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.SockSite(runner, sock).start()
        yield
    finally:
        await runner.cleanup()


async def _serve_for_good(sock: socket.socket, host: str, behaviour: Behaviour) -> None:
    async with serving(sock, behaviour):
        port = sock.getsockname()[1]
        name = f"[{host}]" if ":" in host else host
        print(json.dumps({"url": f"http://{name}:{port}/mcp", "pid": os.getpid()}), flush=True)
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


def serve_tools(
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    latency_s: Latency = 0.2,
    result_tokens: int = 300,
    seed: int = 0,
    parent_pipe: bool = False,
) -> int:
    """Serve until SIGTERM, SIGINT or, with `parent_pipe`, the end of standard input; those end the process with 0.

    Returns 2, with one line on standard error, where a value is wrong or the port is taken. For a process of its own:
    it installs signal handlers and never returns otherwise.
    """
    try:
        check_latency(latency_s)
        if not 0 <= result_tokens <= MAX_RESULT_TOKENS:
            raise ValueError(f"result_tokens = {result_tokens}: it must be from 0 to {MAX_RESULT_TOKENS}")
        if not 0 <= port <= 65535:
            raise ValueError(f"port = {port}: it must be from 0 (a free one) to 65535")
    except ValueError as error:
        print(f"fanmark serve tools: {error}", file=sys.stderr)
        return 2
    try:
        sock = listen(host, port)
    except OSError as error:
        print(
            f"fanmark serve tools: cannot listen on {host}:{port} ({error.strerror}); choose another --port, or 0",
            file=sys.stderr,
        )
        return 2
    if parent_pipe:
        threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        import uvloop
    except ImportError:
        factory = None
    else:
        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(_serve_for_good(sock, host, Behaviour(latency_s, result_tokens, seed)))
    return 0


def _latency(text: str) -> Latency:
    try:
        latency: Latency = json.loads(text) if text.lstrip().startswith("{") else float(text)
        check_latency(latency)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from None
    return latency


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: see the module."""
    # without a usage text, a wrong flag is answered by one line
    parser = argparse.ArgumentParser(prog="fanmark serve tools", usage=argparse.SUPPRESS)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument(
        "--latency-s", type=_latency, default=0.2, help='seconds, or {"dist": "lognormal", "mean": 0.2}'
    )
    parser.add_argument("--result-tokens", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parent-pipe", action="store_true", help="end when standard input does")
    return serve_tools(**vars(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
