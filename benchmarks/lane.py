"""CPU of the client per streamed chunk, and what it reports for the time to the first one, lane against lane in one run.

usage: python benchmarks/lane.py [--streams N] [--chunks N] [--gap-ms MS] [--calls N] [--rounds N]

A server of a process of its own sends each of N streams a chunk of a vLLM-like size every MS (0: as fast as it can). The lanes take turns;
printed are medians over the rounds, and the ratios to the fast lane, which depend on the machine less than the figures do. The openai
lane, which one core holds few streams of, gets a tenth of them. Included is all that a lane does for a call, from the request to the
parsed reply; what a run does around it (prompts, records, start-up) is not.
"""

import argparse
import asyncio
import multiprocessing
import socket
import statistics
import time
from collections.abc import Callable
from typing import Any

import uvloop

from fanmark.loadgen.lanes.fast import FastLane
from fanmark.loadgen.lanes.http import HttpLane, Sent
from fanmark.loadgen.lanes.openai_sdk import OpenaiLane

FIRST_S = 0.1
BODY = b'{"model":"m","messages":[{"role":"user","content":"hi"}],"stream":true}'
LANES: dict[str, tuple[Callable[..., Any], float]] = {  # and what share of the streams each gets
    "fast": (FastLane, 1.0),
    "aiohttp": (HttpLane, 1.0),
    "openai": (OpenaiLane, 0.1),
}
EVENT = (
    b'data: {"id":"chatcmpl-000000009e3779b97f4a7c15","object":"chat.completion.chunk","created":1764000000,"model":"m",'
    b'"choices":[{"index":0,"delta":{"content":" token"},"logprobs":null,"finish_reason":%s,"token_ids":null}]}\n\n'
)
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":3,"total_tokens":4,"completion_tokens":1}}\n\ndata: [DONE]\n\n'
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def framed(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def serve(listener: socket.socket, chunks: int, gap_s: float) -> None:
    """Answers every request by `chunks` chunks, the first FIRST_S after it (at once where there is no gap)."""
    plain, last = framed(EVENT % b"null"), framed(EVENT % b'"length"') + framed(USAGE) + b"0\r\n\r\n"

    async def stream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        loop = asyncio.get_running_loop()
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0]))
                due_s = loop.time() + (FIRST_S if gap_s else 0.0)
                for i in range(chunks):
                    if gap_s:
                        await asyncio.sleep(due_s + i * gap_s - loop.time())
                    writer.write((HEAD if i == 0 else b"") + (plain if i < chunks - 1 else last))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def forever() -> None:
        server = await asyncio.start_server(stream, sock=listener, backlog=4096)
        await server.serve_forever()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(forever())


async def measure(
    make: Callable[..., Any], url: str, streams: int, calls: int, chunks: int
) -> tuple[float, float, float]:
    """(CPU per chunk in us, median and largest reported time to the first chunk in ms) of `calls` calls on each of `streams` users."""
    lane = make(time.monotonic)
    firsts: list[float] = []

    async def user(count: int) -> None:
        for _ in range(count):
            sent = Sent()
            reply = await lane.send(url, BODY, {}, stream=True, timeout_s=300, sent=sent)
            assert reply.finish == "length" and len(reply.text) == 6 * chunks and sent.at is not None
            firsts.append(reply.first_at - sent.at)

    await asyncio.gather(*(user(1) for _ in range(streams)))  # opens the connections
    firsts.clear()
    before_s = time.process_time()
    await asyncio.gather(*(user(calls) for _ in range(streams)))
    cpu_s = time.process_time() - before_s
    await lane.close()
    return cpu_s / (streams * calls * chunks) * 1e6, statistics.median(firsts) * 1e3, max(firsts) * 1e3


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("streams", 200), ("chunks", 100), ("calls", 1), ("rounds", 3)):
        options.add_argument(f"--{name}", type=int, default=default)
    options.add_argument("--gap-ms", type=float, default=20.0)
    given = options.parse_args()
    listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1/chat/completions"
    server = multiprocessing.Process(target=serve, args=(listener, given.chunks, given.gap_ms / 1e3), daemon=True)
    server.start()
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in LANES}
    try:
        for _ in range(given.rounds):
            for name, (make, share) in LANES.items():
                streams = max(1, round(given.streams * share))
                with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                    found[name].append(runner.run(measure(make, url, streams, given.calls, given.chunks)))
    finally:
        server.terminate()
        server.join()
    medians = {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in found.items()}
    print(
        f"{given.streams} streams of {given.chunks} chunks, {given.gap_ms:g} ms apart; medians of {given.rounds} rounds"
    )
    print(f"{'lane':8} {'CPU us/chunk':>12} {'x fast':>7} {'first chunk ms, median':>23} {'largest':>8}")
    for name, (cpu_us, median_ms, largest_ms) in medians.items():
        ratio = cpu_us / medians["fast"][0]
        print(f"{name:8} {cpu_us:12.1f} {ratio:7.2f} {median_ms:23.2f} {largest_ms:8.2f}")


if __name__ == "__main__":
    main()
