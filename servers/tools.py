"""The embedded MCP server: eight read-only tools over streamable HTTP, on the `mcp` SDK, in a process of its own.

    python -m fanmark.servers.tools [--host H] [--port P] [--latency-s X|JSON] [--result-tokens N] [--seed N] [--parent-pipe]

When it listens, one line of JSON is printed: {"url": "http://127.0.0.1:PORT/mcp", "pid": N}. A tool call waits its
latency and returns text of exactly N tokens by fanmark.servers.tokenizer. Two keys of a request's `_meta` rule both:
"fanmark/seed" (what latency and text are drawn from: equal seeds give equal results; left out, a seed per call) and
"fanmark/result_tokens" (in place of N). Speaks both eras of the protocol, as the SDK does.
"""

import argparse
import asyncio
import json
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fanmark.servers.tokenizer import vocabulary
from fanmark.servers.tool_specs import (
    MAX_RESULT_TOKENS,
    RESULT_TOKENS_META,
    SEED_META,
    TOOLS,
    Latency,
    check_latency,
    draw_latency_s,
    result_text,
)

if TYPE_CHECKING:
    from mcp.server.lowlevel import Server

KEEP_ALIVE_S = 75  # longer than a client keeps an idle connection, or the server closes one that is being reused
BACKLOG = 2048


@dataclass(frozen=True)
class Behaviour:
    """How the tools answer: latency in seconds (a number or a distribution), length in tokens, seed of the draws."""

    latency_s: Latency = 0.2
    result_tokens: int = 300
    seed: int = 0


def _meta_value(meta: Mapping[str, Any], key: str) -> Any:
    """The value of one of our keys; MCPError (invalid parameters) where it has the wrong type."""
    from mcp.shared.exceptions import MCPError
    from mcp_types import INVALID_PARAMS

    value = meta.get(key)
    if value is None:
        return None
    if key == SEED_META:
        valid, allowed = isinstance(value, int | str), "a number or a string"
    else:
        valid = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_RESULT_TOKENS
        allowed = f"a whole number from 0 to {MAX_RESULT_TOKENS}"
    if not valid:
        raise MCPError(INVALID_PARAMS, f"_meta {key} = {value!r}: it must be {allowed}")
    return value


def build_server(behaviour: Behaviour) -> "Server[Any]":
    """The MCP server object, without a transport (tests may hand it to an SDK client as it is)."""
    import mcp_types as types
    from jsonschema import Draft202012Validator  # type: ignore[import-untyped]
    from jsonschema.exceptions import best_match  # type: ignore[import-untyped]
    from mcp.server.lowlevel import Server
    from mcp.shared.exceptions import MCPError

    words = vocabulary()
    validators = {spec.name: Draft202012Validator(dict(spec.input_schema)) for spec in TOOLS}
    listing = types.ListToolsResult(
        tools=[
            types.Tool(
                name=spec.name,
                description=spec.description,
                input_schema=dict(spec.input_schema),
                annotations=types.ToolAnnotations(read_only_hint=True, open_world_hint=False),
            )
            for spec in TOOLS
        ]
    )
    calls = 0

    async def list_tools(ctx: Any, params: types.PaginatedRequestParams | None) -> types.ListToolsResult:
        return listing

    async def call_tool(ctx: Any, params: types.CallToolRequestParams) -> types.CallToolResult:
        nonlocal calls
        calls += 1
        validator = validators.get(params.name)
        if validator is None:
            raise MCPError(types.INVALID_PARAMS, f"unknown tool {params.name!r}: there are {', '.join(validators)}")
        if error := best_match(validator.iter_errors(params.arguments or {})):
            text = f"bad arguments: {error.json_path}: {error.message}"
            return types.CallToolResult(content=[types.TextContent(text=text)], is_error=True)
        meta: Mapping[str, Any] = ctx.meta or {}
        seed = _meta_value(meta, SEED_META)
        if seed is None:
            seed = f"{behaviour.seed} {calls}"
        tokens = _meta_value(meta, RESULT_TOKENS_META)
        await asyncio.sleep(draw_latency_s(behaviour.latency_s, seed))
        text = result_text(words, behaviour.result_tokens if tokens is None else tokens, seed)
        return types.CallToolResult(content=[types.TextContent(text=text)])

    return Server("fanmark-tools", on_list_tools=list_tools, on_call_tool=call_tool)


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


async def _serve(sock: socket.socket, host: str, behaviour: Behaviour) -> None:
    import uvicorn
    from starlette.requests import ClientDisconnect

    def is_news(record: logging.LogRecord) -> bool:
        """A client that goes away while it asks is no error of the server, though uvicorn and the SDK log it as one."""
        return not (record.exc_info and isinstance(record.exc_info[1], ClientDisconnect))

    errors = logging.StreamHandler()
    errors.addFilter(is_news)
    logging.basicConfig(level=logging.WARNING, handlers=[errors])

    class Announcing(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            port = sock.getsockname()[1]
            name = f"[{host}]" if ":" in host else host
            print(json.dumps({"url": f"http://{name}:{port}/mcp", "pid": os.getpid()}), flush=True)

        @contextmanager
        def capture_signals(self) -> Generator[None, None, None]:
            yield  # uvicorn would wait for the calls in flight; `_end` does not

    app = build_server(behaviour).streamable_http_app(host=host, max_sessions=None, session_idle_timeout=None)
    config = uvicorn.Config(app, timeout_keep_alive=KEEP_ALIVE_S, access_log=False, log_config=None, ws="none")
    await Announcing(config).serve([sock])


def _end(signum: int, frame: object) -> None:
    """End at once: there is nothing to save, and a tool call in flight may have minutes to wait."""
    os._exit(0)


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
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, _end)
    if parent_pipe:
        threading.Thread(target=_end_with_parent, daemon=True).start()
    asyncio.run(_serve(sock, host, Behaviour(latency_s, result_tokens, seed)))
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
