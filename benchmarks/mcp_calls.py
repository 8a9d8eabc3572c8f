"""What a tool call costs the client and our tool server: the thin transport beside the SDK's, one call after another and many at once.

usage: python benchmarks/mcp_calls.py [--calls N] [--concurrency N ...] [--sdk-calls N] [--result-tokens N]

The server is a process of its own; where the machine has two processors, client and server keep to one each. The bars: the thin transport
takes at most 0.6 ms of client CPU a call and makes 1,000 calls/s at 64 at once; the server answers 2,000 a second of its own CPU.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from typing import Literal

import uvloop

from fanmark.loadgen.lanes.mcp import ToolServers, ToolServerSpec

Transport = Literal["thin", "sdk"]


def cpu_s(pid: int) -> float:
    """CPU time of a process so far, by the system's count."""
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def measure(url: str, pid: int, transport: Transport, concurrency: int, calls: int) -> tuple[float, float, float]:
    """Calls a second, CPU ms a call of the client and of the server."""
    servers = await ToolServers.open([ToolServerSpec(url=url)], transport=transport)

    async def agent(count: int) -> None:
        for number in range(count):
            result = await servers.call("synthetic", {}, timeout_s=60, meta={"fanmark/seed": number})
            assert not result.is_error

    try:
        await asyncio.gather(*(agent(2) for _ in range(concurrency)))  # opens the connections
        before = time.perf_counter(), time.process_time(), cpu_s(pid)
        each = -(-calls // concurrency)
        await asyncio.gather(*(agent(each) for _ in range(concurrency)))
        took = [
            after - b for after, b in zip((time.perf_counter(), time.process_time(), cpu_s(pid)), before, strict=True)
        ]
    finally:
        await servers.close()
    made = each * concurrency
    return made / took[0], took[1] / made * 1e3, took[2] / made * 1e3


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--calls", type=int, default=10_000)
    options.add_argument("--sdk-calls", type=int, default=600)
    options.add_argument("--concurrency", type=int, nargs="*", default=[1, 64, 256])
    options.add_argument("--result-tokens", type=int, default=60)
    given = options.parse_args()
    command = [sys.executable, "-m", "fanmark.servers.tools", "--parent-pipe", "--latency-s", "0"]
    server = subprocess.Popen(
        [*command, "--result-tokens", str(given.result_tokens)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert server.stdout is not None
    url = json.loads(server.stdout.readline())["url"]
    processors = sorted(os.sched_getaffinity(0))
    if len(processors) > 1:
        os.sched_setaffinity(0, processors[:1])
        os.sched_setaffinity(server.pid, processors[1:2])
    print(f"{'transport':10} {'at once':>7} {'calls/s':>8} {'client CPU ms':>14} {'server CPU ms':>14}")
    try:
        transports: list[tuple[Transport, int]] = [("thin", given.calls), ("sdk", given.sdk_calls)]
        for transport, calls in transports:
            for concurrency in given.concurrency:
                with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                    found = runner.run(measure(url, server.pid, transport, concurrency, calls))
                print(f"{transport:10} {concurrency:7} {found[0]:8,.0f} {found[1]:14.3f} {found[2]:14.3f}", flush=True)
    finally:
        server.kill()
        server.wait()


if __name__ == "__main__":
    main()
