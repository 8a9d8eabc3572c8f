"""A chat endpoint, in a thread of the tests, that knows the answers and errs by a rule: the k-th call of a query's session about line i is
right unless i + k is a multiple of three. For tests only."""

import json
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def right(line: int, k: int) -> bool:
    return (line + k) % 3 != 0


def _handler(answers: Mapping[str, tuple[int, str]]) -> type[BaseHTTPRequestHandler]:
    asked: Counter[str] = Counter()
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            """Silent."""

        def _send(self, body: bytes, kind: str, status: int = 200) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            known = self.path == "/v1/models"
            self._send(b'{"data": [{"id": "clerk"}]}' if known else b"{}", "application/json", 200 if known else 404)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path != "/v1/chat/completions":
                return self._send(b"{}", "application/json", 404)
            line, answer = next(answers[m["content"]] for m in body["messages"] if m["content"] in answers)
            with lock:
                k = asked[self.headers["X-Session-Id"]]
                asked[self.headers["X-Session-Id"]] += 1
            number = int(answer) + (not right(line, k))
            words = ["First ", "it ", "was ", "7, ", "so ", f"it is {number:,}.00"]
            chunks: list[dict[str, Any]] = [{"choices": [{"index": 0, "delta": {"content": word}}]} for word in words]
            chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
            read = sum(len(m["content"].split()) for m in body["messages"])
            usage = {"prompt_tokens": read, "completion_tokens": len(words), "total_tokens": read + len(words)}
            chunks.append({"choices": [], "usage": usage})
            data = b"".join(b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks)
            return self._send(data + b"data: [DONE]\n\n", "text/event-stream")

    return Handler


@contextmanager
def answering(answers: Mapping[str, tuple[int, str]]) -> Iterator[str]:
    """Its URL; `answers` gives number and answer of each question."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(answers))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
