"""The stub as a real process, for tests: started with a ready check, ended with the test."""

import http.client
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit


@dataclass(frozen=True)
class HttpReply:
    """Status, headers and body of one reply."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    def events(self) -> list[Any]:
        """The JSON values of a stream, [DONE] left out."""
        lines = [line[6:] for line in self.body.decode().split("\n") if line.startswith("data: ")]
        return [json.loads(line) for line in lines if line != "[DONE]"]


class Stub:
    """A running stub. Each request has a connection of its own."""

    def __init__(self, url: str, pid: int, process: "subprocess.Popen[str]") -> None:
        self.url, self.pid, self.process = url, pid, process

    def send(self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> HttpReply:
        """One request; a body that is not bytes goes as JSON."""
        parts = urlsplit(self.url)
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=30)
        try:
            data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            given = dict(headers or {})
            if data is not None and "content-type" not in map(str.lower, given):
                given["Content-Type"] = "application/json"
            connection.request(method, path, data, given)
            reply = connection.getresponse()
            return HttpReply(reply.status, dict(reply.getheaders()), reply.read())
        finally:
            connection.close()

    def chat(self, text: str, **more: Any) -> HttpReply:
        """A chat request with one user message."""
        return self.send("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": text}], **more})

    def metrics(self) -> dict[str, float]:
        """Samples of a scrape by their name and labels, as written."""
        lines = self.send("GET", "/metrics").body.decode().splitlines()
        samples = (line.rpartition(" ") for line in lines if not line.startswith("#"))
        return {name: float(value) for name, _, value in samples}

    def until(self, sample: str, value: float, timeout_s: float = 10.0) -> dict[str, float]:
        """The first scrape that shows this value; fails after the time-out."""
        deadline = time.monotonic() + timeout_s
        while (seen := self.metrics())[sample] != value:
            assert time.monotonic() < deadline, f"{sample} is {seen[sample]}, not {value}"
        return seen


@contextmanager
def running_stub(*flags: str) -> Iterator[Stub]:
    """A stub with these flags on a free port; it has ended when the block ends."""
    command = [sys.executable, "-m", "fanmark.servers.stub", "--parent-pipe", *flags]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        try:
            line = process.stdout.readline()
            if not line:
                raise AssertionError(f"the stub did not start: {process.stderr.read()}")
            ready = json.loads(line)
            yield Stub(ready["url"], ready["pid"], process)
        finally:
            process.stdin.close()
            process.wait(10)
