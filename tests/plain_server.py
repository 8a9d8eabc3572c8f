"""A strict chat endpoint as a hosted API offers it: no /tokenize, no /metrics, refusing what it does not know. For tests only.

usage: plain_server.py KEY      prints its URL; every word is a token; a reply has `max_completion_tokens` words, but for every third one.
"""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KNOWN = {"model", "messages", "max_completion_tokens", "stream", "stream_options", "tools", "tool_choice"}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""

    def _json(self, status: int, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _error(self, status: int, message: str, param: str | None = None) -> None:
        self._json(
            status, {"error": {"message": message, "type": "invalid_request_error", "param": param, "code": None}}
        )

    def _allowed(self) -> bool:
        if self.headers["Authorization"] == f"Bearer {sys.argv[1]}":
            return True
        self._error(401, "Incorrect API key provided.")
        return False

    def do_GET(self) -> None:
        if self.path != "/v1/models":
            self._error(404, f"Unknown path {self.path}")
        elif self._allowed():
            self._json(200, {"object": "list", "data": [{"id": "hosted", "object": "model"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v1/chat/completions":
            return self._error(404, f"Unknown path {self.path}")
        if not self._allowed():
            return None
        unknown = sorted(body.keys() - KNOWN)
        if unknown:
            return self._error(400, f"Unrecognized request argument supplied: {unknown[0]}", unknown[0])
        prompt = " ".join(m["content"] for m in body["messages"])
        words = body["max_completion_tokens"] - (len(prompt) % 3 == 0)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for i in range(words):
            self._event({"choices": [{"index": 0, "delta": {"content": f"word{i} "}, "finish_reason": None}]})
        self._event({"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]})
        read = len(prompt.split())
        self._event(
            {"choices": [], "usage": {"prompt_tokens": read, "completion_tokens": words, "total_tokens": read + words}}
        )
        self._chunk(b"data: [DONE]\n\n")
        self._chunk(b"")
        return None

    def _event(self, value: dict[str, Any]) -> None:
        self._chunk(
            b"data: " + json.dumps({"object": "chat.completion.chunk", "model": "hosted", **value}).encode() + b"\n\n"
        )

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")


class Server(ThreadingHTTPServer):
    request_queue_size = 128  # a burst of connections is none too many


if __name__ == "__main__":
    server = Server(("127.0.0.1", 0), Handler)
    print(f"http://127.0.0.1:{server.server_port}/v1", flush=True)
    server.serve_forever()
