"""What the metrics cost a run: CPU of the event loop for each call that ends, and for each scrape.

usage: python benchmarks/metrics.py [--arms N] [--calls N]

"a call" is what stands between its reply and what comes next (call_started and call_finished); "added" is what adding it to all sums
takes afterwards, those of the live view and of the client's verdict included, at most 100 calls at a time. A call has 150 gaps between its
tokens in as many buckets as is printed. "a scrape" is the thread CPU that writing the text takes,
in which the loop may stand still, and what a loop of 1 ms beats saw of it: how late its latest beat was, with scrapes and without.
Medians, of a tally in which each arm has 8 tools, 5 roles and 2 targets.
"""

import argparse
import asyncio
import random
import statistics
import subprocess
import sys
import time

from fanmark.loadgen.metrics import Metrics, Told
from fanmark.loadgen.metrics_server import serve
from fanmark.loadgen.records import Call, gap_bucket
from fanmark.loadgen.tally import MOST_PENDING, Tally

ROUNDS = 7
SCRAPER = """
import sys, time, urllib.request
while True:
    urllib.request.urlopen(sys.argv[1]).read()
    time.sleep(0.2)
"""
TOOLS = [f"tool_{i}" for i in range(8)]
ROLES = ["agent", "judge", "worker", "critic", "leader"]


def call(rng: random.Random, arm: str, kinds: int) -> Call:
    gaps = {gap_bucket(0.01 * 1.01**i): 150 // kinds for i in range(kinds)}
    return Call(
        query=rng.randrange(1000), arm=arm, call=1, after=[], kind="call", role=f"{rng.choice(ROLES)}-1", round=1,
        target=rng.choice(["big", "small"]), due_at=0.0, sent_at=rng.uniform(0.0001, 0.001), first_at=rng.uniform(0.05, 0.2),
        done_at=rng.uniform(1, 9), input_tokens=900, cached_tokens=500, output_tokens=151, reasoning_tokens=0, gaps=gaps,
    )  # fmt: skip


def tool_call(rng: random.Random, arm: str) -> Call:
    return Call(
        query=1, arm=arm, call=2, after=[1], kind="tool_call", role="agent", round=1, tool=rng.choice(TOOLS),
        due_at=0.0, sent_at=0.0, done_at=rng.uniform(0.1, 1.0), bytes=900, queued_s=0.01,
    )  # fmt: skip


def per_call_us(tally: Tally, calls: list[Call]) -> tuple[float, float]:
    """CPU of one call on its path, the loop around it taken off, and of adding it."""
    on_path, added = [], []
    batches = [calls[start : start + MOST_PENDING - 1] for start in range(0, len(calls), MOST_PENDING - 1)]
    for _ in range(ROUNDS):
        path_s = add_s = 0.0
        for batch in batches:
            at = [time.process_time()]
            for _ in batch:
                pass
            at.append(time.process_time())
            for each in batch:
                tally.call_started(each)
                tally.call_finished(each)
            at.append(time.process_time())
            assert tally.arms
            at.append(time.process_time())
            path_s += (at[2] - at[1]) - (at[1] - at[0])
            add_s += at[3] - at[2]
        on_path.append(path_s / len(calls) * 1e6)
        added.append(add_s / len(calls) * 1e6)
    return statistics.median(on_path), statistics.median(added)


def cpu_ms(metrics: Metrics, accept: str) -> tuple[float, int]:
    """CPU of one scrape's text, and its size."""
    times = []
    for _ in range(ROUNDS * 3):
        start_s = time.thread_time()
        _, body = metrics.scrape(accept)
        times.append(time.thread_time() - start_s)
    return statistics.median(times) * 1e3, len(body)


async def latest_beat_ms(seconds: float = 3.0) -> float:
    """The median over fifths of a second of the latest of a loop's 1 ms beats."""
    loop, worst, end_at = asyncio.get_running_loop(), [], time.monotonic() + seconds
    while time.monotonic() < end_at:
        late_s, until = 0.0, time.monotonic() + 0.2
        while time.monotonic() < until:
            due_at = loop.time() + 0.001
            await asyncio.sleep(0.001)
            late_s = max(late_s, loop.time() - due_at)
        worst.append(late_s)
    return statistics.median(worst) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--arms", type=int, default=6)
    parser.add_argument("--calls", type=int, default=20_000)
    given = parser.parse_args()
    rng, names = random.Random(1), [f"arm-{i}" for i in range(given.arms)]
    tally = Tally(dict.fromkeys(names, "debate"), names[0])
    for kinds in (1, 5, 21):
        calls = [call(rng, rng.choice(names), kinds) for _ in range(given.calls)]
        print("a call     {:6.2f} us, added {:.2f} us  with gaps of {} kinds".format(*per_call_us(tally, calls), kinds))
    calls = [tool_call(rng, rng.choice(names)) for _ in range(given.calls)]
    print("tool call  {:6.2f} us, added {:.2f} us".format(*per_call_us(tally, calls)))
    told = Told("r", targets=["big", "small"], roles=dict.fromkeys(names, ROLES), tools=dict.fromkeys(names, TOOLS))
    metrics = Metrics(tally, told)
    for name, accept in (("classic", ""), ("OpenMetrics", "application/openmetrics-text")):
        ms, size = cpu_ms(metrics, accept)
        print(f"a scrape   {ms:6.2f} ms  of CPU, {name}, {size / 1e3:.0f} kB")
    port, stop = serve({"/metrics": metrics.scrape}, 0)
    print(f"late beat  {asyncio.run(latest_beat_ms()):6.2f} ms  without scrapes")
    with subprocess.Popen([sys.executable, "-c", SCRAPER, f"http://127.0.0.1:{port}/metrics"]) as scraper:
        print(f"late beat  {asyncio.run(latest_beat_ms()):6.2f} ms  with five scrapes a second")
        scraper.kill()
    stop()


if __name__ == "__main__":
    main()
