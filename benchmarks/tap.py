"""What the tap adds to a stream's chunks: their way from the server's send to the client's kernel, through the tap against direct.

usage: python benchmarks/tap.py [--streams N] [--seconds S] [--gap-ms MS] [--prompt BYTES] [--strip] [--burst]

The server stamps each chunk just before it goes to the kernel, the client takes the kernel's own receive stamps (Linux), so that neither
adds anything. Streams are paced, of 200 chunks each, and followed by the next call on the same connection, evenly out of step, or with
`--burst` all at once. Server and client share one core, what passes the bytes on has the other, all before other work as far as they may.
`--strip`: the client asks for no usage, so that the tap adds it, and takes its chunk out again. Printed: milliseconds direct, through the
tap, and the difference of the quantiles, of all chunks, and from the request to its first chunk.
"""

import argparse
import contextlib
import heapq
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fanmark.loadgen.lanes.stamps import ANCILLARY_BYTES, ReceiveClock

CHUNKS = 200
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
MODELS = b'{"data": [{"id": "paced"}]}'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":2000,"completion_tokens":200}}\n\ndata: [DONE]\n\n'


def on_core(core: int) -> Any:
    """What a child does before it starts."""

    def prepare() -> None:
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[core % len(cores)]})
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(2))

    return prepare


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def serve(gap_s: float) -> None:
    """Paced streams, until standard input ends."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    listener.setblocking(False)
    print(listener.getsockname()[1], flush=True)
    epoll, streams, due = select.epoll(), dict[int, socket.socket](), list[tuple[float, int, int]]()
    asked: dict[int, bytes] = {}
    for fd in (listener.fileno(), sys.stdin.fileno()):
        epoll.register(fd, select.EPOLLIN)
    while True:
        wait_s = max(0.0, due[0][0] - time.monotonic()) if due else 1.0
        for fd, _ in epoll.poll(wait_s):
            if fd == sys.stdin.fileno():
                return
            if fd == listener.fileno():
                sock, _ = listener.accept()
                sock.setblocking(False)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                streams[sock.fileno()] = sock
                epoll.register(sock.fileno(), select.EPOLLIN)
                continue
            try:
                data = asked.pop(fd, b"") + streams[fd].recv(1 << 20)
            except ConnectionError:
                data = b""
            if not data:
                epoll.unregister(fd)
                streams.pop(fd).close()
            elif data.startswith(b"GET"):
                streams[fd].send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(MODELS), MODELS))
            elif data.partition(b"\r\n\r\n")[2].endswith((b"}", b"]")) and data.count(b"{") == data.count(b"}"):
                streams[fd].send(HEAD)
                heapq.heappush(due, (time.monotonic() + gap_s, fd, 0))
            else:
                asked[fd] = data
        while due and due[0][0] <= time.monotonic():
            at, fd, n = heapq.heappop(due)
            if fd not in streams:
                continue
            if n == CHUNKS:
                finish = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
                streams[fd].send(chunk(finish + USAGE) + b"0\r\n\r\n")
            else:
                data = b'data: {"choices":[{"index":0,"delta":{"content":"%d"}}]}\n\n' % time.monotonic_ns()
                streams[fd].send(chunk(data))
                heapq.heappush(due, (at + gap_s, fd, n + 1))


def client(url: str, streams: int, seconds: float, prompt: int, gap_s: float, strip: bool, burst: bool) -> None:
    """Streams against a server, for so long; prints the delays of chunks and of first chunks in milliseconds."""
    host, _, port = url.removeprefix("http://").partition(":")
    options = "" if strip else '"stream_options": {"include_usage": true}, '
    body = f'{{"stream": true, {options}"messages": [{{"role": "user", "content": "{"word " * (prompt // 5)}"}}]}}'.encode()
    request = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    epoll, socks, asked_at = select.epoll(), dict[int, socket.socket](), dict[int, float]()
    clock, delays, firsts = ReceiveClock(time.monotonic, 1.0, time.time), list[float](), list[float]()
    apart_s = gap_s * (CHUNKS + (0 if burst else 1)) / streams  # all in step, or evenly out of it
    starts = [(time.monotonic() + i * apart_s, i) for i in range(streams)]
    end_s = time.monotonic() + seconds + gap_s * CHUNKS
    while time.monotonic() < end_s:
        while starts and starts[0][0] <= time.monotonic():
            starts.pop(0)
            sock = socket.create_connection((host, int(port)))
            clock.ask_stamps(sock)
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            socks[sock.fileno()] = sock
            epoll.register(sock.fileno(), select.EPOLLIN)
            asked_at[sock.fileno()] = time.monotonic()
            sock.sendall(request)
        ready = epoll.poll(0.01)
        clock.look()
        for fd, _ in ready:
            data, ancillary, _, _ = socks[fd].recvmsg(1 << 16, ANCILLARY_BYTES)
            at = clock.instant(ancillary, 0.0)
            if not data:
                raise SystemExit("the connection was closed")
            stamps = [int(part.partition(b'"')[0]) for part in data.split(b'"content":"')[1:]]
            if stamps:
                delays.append((at - stamps[-1] / 1e9) * 1e3)
                if fd in asked_at:
                    firsts.append((at - asked_at.pop(fd) - gap_s) * 1e3)
            if data.endswith(b"0\r\n\r\n"):
                asked_at[fd] = time.monotonic()
                socks[fd].sendall(request)
    print(json.dumps({"chunk": quantiles(delays), "first": quantiles(firsts)}))


def quantiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {f"p{q}": ordered[int(q / 100 * (len(ordered) - 1))] for q in (50, 90, 99)} | {"n": len(ordered)}


@contextlib.contextmanager
def tap(target: str, folder: Path) -> Iterator[str]:
    """A tap in front of the server."""
    command = [
        sys.executable,
        "-m",
        "fanmark.loadgen.cli",
        "tap",
        "--target",
        target,
        "--out",
        str(folder),
        "--idle",
        "2",
    ]
    with subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=on_core(1),
        env={**os.environ, "CI": "1"},
    ) as process:
        assert process.stderr is not None and process.stdout is not None
        lines = iter(process.stderr.readline, "")
        found = next((line.split()[1] for line in lines if line.startswith("tap ")), None)
        if found is None:
            raise SystemExit("the tap did not start")
        try:
            yield found.removesuffix("/v1")
        finally:
            process.send_signal(signal.SIGINT)
            process.stderr.read()
            print(
                "".join(f"  {line}\n" for line in process.stdout.read().splitlines() if line.startswith("client")),
                end="",
            )


def measured(url: str, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    command = [
        sys.executable,
        __file__,
        "--client",
        url,
        "--streams",
        str(args.streams),
        "--seconds",
        str(args.seconds),
    ]
    command += (
        ["--gap-ms", str(args.gap_ms), "--prompt", str(args.prompt)]
        + ["--strip"] * args.strip
        + ["--burst"] * args.burst
    )
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=on_core(0))
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, dict[str, float]] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--gap-ms", type=float, default=20.0)
    parser.add_argument("--prompt", type=int, default=8_000)
    parser.add_argument("--strip", action="store_true")
    parser.add_argument("--burst", action="store_true")
    parser.add_argument("--server", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--client", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.server:
        serve(args.gap_ms / 1e3)
        return
    if args.client:
        client(args.client, args.streams, args.seconds, args.prompt, args.gap_ms / 1e3, args.strip, args.burst)
        return
    command = [sys.executable, __file__, "--server", "--gap-ms", str(args.gap_ms)]
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=on_core(0)
        ) as server,
    ):
        assert server.stdout is not None and server.stdin is not None
        url = f"http://127.0.0.1:{server.stdout.readline().strip()}"
        direct = measured(url, args)
        with tap(f"{url}/v1", Path(folder) / "tap") as there:
            through = measured(there, args)
        server.stdin.close()
    print(f"{args.streams} streams, a chunk each {args.gap_ms:g} ms, prompts of {args.prompt:,} bytes")
    for what in ("chunk", "first"):
        for q in ("p50", "p90", "p99"):
            a, b = direct[what][q], through[what][q]
            print(
                f"{what:<6} {q}  direct {a:8.3f} ms  through {b:8.3f} ms  added {b - a:8.3f} ms   (n = {through[what]['n']:,})"
            )


if __name__ == "__main__":
    main()
