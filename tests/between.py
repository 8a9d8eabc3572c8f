"""A pass-through in front of a server, for tests: it may refuse parameters, or play another client that sends the same prompts."""

import http.client
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

Before = Callable[[dict[str, Any]], list[dict[str, Any]]]


def none_before(body: dict[str, Any]) -> list[dict[str, Any]]:
    return []


@contextmanager
def between(url: str, refused: tuple[str, ...] = (), before: Before = none_before) -> Iterator[str]:
    """Its address. `before` gives the bodies that somebody else sends before a call with this body goes on."""
    upstream = urlsplit(url)

    def send(method: str, path: str, data: bytes | None) -> tuple[int, str, bytes]:
        connection = http.client.HTTPConnection(upstream.hostname or "", upstream.port, timeout=30)
        try:
            connection.request(method, path, data, {"Content-Type": "application/json"})
            reply = connection.getresponse()
            return reply.status, reply.headers["Content-Type"] or "", reply.read()
        finally:
            connection.close()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            """Silent."""

        def _reply(self, status: int, kind: str, data: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            self._reply(*send("GET", self.path, None))

        def do_POST(self) -> None:
            data = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path.endswith("completions"):
                body = json.loads(data)
                for name in refused:
                    if name in body:
                        error = {"error": {"message": f"Unrecognized request argument: {name}", "param": name}}
                        return self._reply(400, "application/json", json.dumps(error).encode())
                for other in before(body):
                    assert send("POST", self.path, json.dumps(other).encode())[0] == 200
            return self._reply(*send("POST", self.path, data))

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
