"""A chat endpoint, in a thread of the tests, that says back all it was told, in whatever way it is asked to fail. For tests only."""

import json
import ssl
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import quote


@dataclass(frozen=True)
class Asked:
    """One request as it came."""

    method: str
    path: str
    headers: dict[str, str]
    body: Any


@dataclass
class Echo:
    """What the server does, and what it was asked. `listed` is the status of /models, `call` how a call ends: a status, or "malformed",
    "error-event", "finish", "cut", "sent-on", "well". At /mcp it is a tool server: `tools_listed` is the status of what comes before a
    tool call, `tool` how a tool call ends: a status, "rpc-error", "tool-error", "malformed", "well"."""

    models: tuple[str, ...] = ("echo", "lora")
    listed: int = 200
    call: int | str = "well"
    tools_listed: int = 200
    tool: int | str = "well"
    scrape: str | None = None  # where metrics are read while a call is under way
    asked: list[Asked] = field(default_factory=list)
    scraped: list[str] = field(default_factory=list)
    url: str = ""

    @property
    def tool_calls(self) -> list[Asked]:
        return [asked for asked in self.asked if asked.path == "/mcp" and asked.body["method"] == "tools/call"]

    @property
    def calls(self) -> list[Asked]:
        return [
            asked for asked in self.asked if asked.method == "POST" and asked.path.startswith("/v1/chat/completions")
        ]


def _handler(echo: Echo) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            """Silent."""

        def _said(self) -> str:
            """All that this request told, as a careless server logs it."""
            return (
                f"{self.path} {json.dumps(dict(self.headers))} {dict(self.headers)} {json.dumps(echo.asked[-1].body)}"
            )

        def _send(self, status: int, body: bytes, kind: str = "application/json") -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _error(self, status: int, pad: int = 0) -> None:
            self._send(status, json.dumps({"error": {"message": "." * pad + self._said()}}).encode())

        def do_GET(self) -> None:
            echo.asked.append(Asked("GET", self.path, dict(self.headers), None))
            if not self.path.partition("?")[0].endswith("/models"):
                self._error(404)
            elif echo.listed != 200:
                self._error(echo.listed)
            else:
                self._send(200, json.dumps({"data": [{"id": name} for name in echo.models]}).encode())

        def do_CONNECT(self) -> None:
            echo.asked.append(Asked("CONNECT", self.path, dict(self.headers), None))
            self._error(407)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            echo.asked.append(Asked("POST", self.path, dict(self.headers), body))
            if self.path == "/mcp":
                return self._tools(body)
            if not self.path.startswith("/v1/chat/completions"):
                return self._error(404)
            if echo.scrape is not None:
                with urllib.request.urlopen(echo.scrape, timeout=5) as metrics:
                    echo.scraped.append(metrics.read().decode())
            if isinstance(echo.call, int):
                return self._error(
                    echo.call, pad=270 - len(self.path) - 60
                )  # secrets across the place where a message is cut
            if echo.call == "sent-on":
                self.send_response(308)
                self.send_header("Location", "/elsewhere?" + quote(self._said()))
                self.send_header("Content-Length", "0")
                return self.end_headers()
            return self._stream(body)

        def _tools(self, body: Any) -> None:
            method, said = body["method"], self._said()
            ends = echo.tool if method == "tools/call" else echo.tools_listed
            if isinstance(ends, int) and ends != 200:
                if ends == 401:
                    return self._error(ends, pad=200)  # JSON, but no JSON-RPC
                return self._send(ends, ("." * 215 + said).encode(), "text/plain")
            reply: dict[str, Any] = {"jsonrpc": "2.0", "id": body.get("id")}
            if method == "tools/list":
                tool = {
                    "name": f"search {said[-20:]}",
                    "description": said,
                    "inputSchema": {"type": "object", "title": said},
                }
                reply["result"] = {"tools": [{**tool, "annotations": {"readOnlyHint": True}}]}
            elif method == "tools/call" and ends == "rpc-error":
                reply["error"] = {"code": -32050, "message": said}
            elif method == "tools/call":
                reply["result"] = {"content": [{"type": "text", "text": said}], "isError": ends == "tool-error"}
            elif method == "initialize":
                reply["result"] = {
                    "protocolVersion": "2025-11-25",
                    "capabilities": {},
                    "serverInfo": {"name": said, "version": "1"},
                }
            else:
                return self._send(202 if "id" not in body else 404, b"")
            self._send(200, said.encode() if ends == "malformed" else json.dumps(reply).encode())

        def _stream(self, body: Any) -> None:
            n = int(body.get("max_tokens", 1))
            chunks: list[Any] = [{"choices": [{"index": 0, "delta": {"content": "word "}}]} for _ in range(n)]
            finish = self._said() if echo.call == "finish" else "length"
            chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]})
            chunks.append({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": n, "total_tokens": 7 + n}})
            events = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks] + ["data: [DONE]\n\n"]
            if echo.call == "malformed":
                events = [f"data: {{ {self._said()}\n\n"]
            elif echo.call == "error-event":
                events = [f"data: {json.dumps({'error': {'message': self._said(), 'code': 500}})}\n\n"]
            data = "".join(events).encode()
            self._send(200, data[: len(data) // 2] if echo.call == "cut" else data, "text/event-stream")

    return Handler


@contextmanager
def echoing(echo: Echo, tls: ssl.SSLContext | None = None) -> Iterator[Echo]:
    """The server, listening at `url`; it has ended when the block ends."""

    class Server(ThreadingHTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            """Silent: clients that go away are what the tests are about."""

    server = Server(("127.0.0.1", 0), _handler(echo))
    server.daemon_threads = True
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    echo.url = f"{'http' if tls is None else 'https'}://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield echo
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
