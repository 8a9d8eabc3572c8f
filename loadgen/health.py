"""Is the client the bottleneck? The loop lag and send delays of its workers, their CPU and memory, and the verdict."""

import asyncio
import math
import resource
import time
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import msgspec

from fanmark.loadgen.records import bucket_gap_s, gap_bucket
from fanmark.loadgen.reduced import CallKind, Rows, ttft_s
from fanmark.loadgen.statistics import ascending, distribution, gap_distribution

_BEAT_S = 0.05
_BUSY_S = 5  # so many seconds on end of a busy processor count
WORDS = ("ok", "strained", "client-limited")  # from good to bad


class ClientState(msgspec.Struct):
    """What one worker has measured of itself so far. `loop_lag` counts beats by log bucket of their lateness (records.gap_bucket);
    `busy_seconds` is the longest stretch of seconds above 90 % CPU; `lost_at` is when the worker died, if it did; `verdict` is as of
    the last second, warm-up included. `node` is where it works, None on the driver's own machine, and `clock_offset_s` what that node's
    time of day is ahead of the driver's. `lost_queries` are those of its last snapshot, by arm and outcome, where its records are lost;
    `journal` is where they are left, if they are. `cpu_share` is of one core over the last second, None once it has ended; queries are
    those of all arms, warm-up left out."""

    loop_lag: Counter[int] = msgspec.field(default_factory=Counter)
    busy_seconds: int = 0
    cpu_s: float = 0.0
    rss_mb: float = 0.0
    lost_at: float | None = None
    verdict: str = "ok"
    node: str | None = None
    clock_offset_s: float = 0.0
    lost_queries: dict[str, dict[str, int]] | None = None
    journal: str | None = None
    cpu_share: float | None = None
    queries_running: int = 0
    queries_done: int = 0


class Queries(Protocol):
    """An arm's, so far."""

    @property
    def completed(self) -> int: ...

    @property
    def in_flight(self) -> int: ...


class Delays(Protocol):
    """The calls' send delays and times to first token so far, by log bucket; and where the workers' states are shown."""

    send_delay: Counter[int]
    ttft: Counter[int]
    clients: dict[int, "ClientState"]

    @property
    def arms(self) -> Mapping[str, Queries]:
        """By name."""


class Health:
    """Watches the process that it runs in. `now` is the run's clock."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.state = ClientState()
        self._now = now
        self._cpu_start_s = time.process_time()
        self._delays: Delays | None = None

    async def watch(self, delays: Delays, worker: int = 0) -> None:
        """Beats until cancelled; each beat's lateness is the loop's lag. Counts the seconds in a row above 90 % CPU, and judges."""
        delays.clients[worker], self._delays = self.state, delays
        try:
            await self._beat(delays)
        finally:
            self.state.cpu_share = None
            self.look()

    async def _beat(self, delays: Delays) -> None:
        in_a_row = 0
        cpu_s, at = time.process_time(), self._now()
        while True:
            due_at = self._now() + _BEAT_S
            await asyncio.sleep(_BEAT_S)
            lag_s = max(0.0, self._now() - due_at)
            self.state.loop_lag[gap_bucket(lag_s)] += 1
            if self._now() - at >= 1.0:
                self.state.cpu_share = (time.process_time() - cpu_s) / (self._now() - at)
                in_a_row = in_a_row + 1 if self.state.cpu_share > 0.9 else 0
                self.state.busy_seconds = max(self.state.busy_seconds, in_a_row)
                cpu_s, at = time.process_time(), self._now()
                self.look()
                ttft_s = bucket_quantile(delays.ttft, 0.5)
                self.state.verdict = judge(self.state, bucket_quantile(delays.send_delay, 0.99), ttft_s).word

    def look(self) -> ClientState:
        """The state, with CPU time, memory and queries as they are now."""
        arms = list(self._delays.arms.values()) if self._delays is not None else []
        self.state.queries_running = sum(arm.in_flight for arm in arms)
        self.state.queries_done = sum(arm.completed for arm in arms)
        self.state.cpu_s = time.process_time() - self._cpu_start_s
        self.state.rss_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        return self.state


class Judged(NamedTuple):
    """One worker's verdict, with its reasons and the figures that they rest on."""

    word: str
    reasons: list[str]
    lag_p99_s: float | None


def judge(state: ClientState, delay_p99_s: float | None, median_ttft_s: float | None) -> Judged:
    """The verdict on one worker."""
    lag_p99_s = bucket_quantile(state.loop_lag, 0.99)
    word, reasons = verdict(lag_p99_s, delay_p99_s, median_ttft_s, state.busy_seconds)
    if state.lost_at is not None:
        word, reasons = WORDS[-1], [f"died at {state.lost_at:.1f} s", *reasons]
    return Judged(word, reasons, lag_p99_s)


def worst(words: Sequence[str]) -> str:
    """The worst of some verdicts; of none, ok."""
    return max(words, key=WORDS.index, default=WORDS[0])


def told_by(calls: Rows[CallKind]) -> dict[str, Any]:
    """What of the `client` part is known from the counted calls that were sent alone."""
    reused = calls.unknown("connect_s")
    return {
        "send_delay_s": distribution(calls.known("send_delay_s")),
        "connections": {"new": len(calls) - reused, "reused": reused},
        "coalesced_share": sum(calls["coalesced"]) / sum(calls["chunks"]) if len(calls) else 0.0,
    }


def send_delay_p99_s(calls: Rows[CallKind]) -> dict[int, float]:
    """By worker, of its calls."""
    delays: dict[int, array[float]] = defaultdict(lambda: array("d"))
    for worker, delay_s in calls.rows("worker", "send_delay_s"):
        delays[worker].append(delay_s)
    return {worker: p99(mine) for worker, mine in delays.items()}


def client_part(states: Mapping[int, ClientState], calls: Rows[CallKind], host_busy_seconds: int = 0) -> dict[str, Any]:
    """The `client` part of summary.json from the workers' states and the counted calls that were sent: the verdict is the worst worker's,
    CPU and memory are sums. A host that was busy for `host_busy_seconds` on end strains the client, whoever made it so."""
    ttft = ascending(ttft_s(calls))
    median_ttft_s = ttft[len(ttft) // 2] if ttft else None
    del ttft
    p99_s = send_delay_p99_s(calls)
    judged = {worker: judge(state, p99_s.get(worker), median_ttft_s) for worker, state in states.items()}
    host = [f"the host's CPU was above 80 % for {host_busy_seconds} s"] if host_busy_seconds >= _BUSY_S else []
    word = worst([each.word for each in judged.values()] + [WORDS[1]] * bool(host))
    return {
        "verdict": word,
        "reasons": [
            f"worker {worker}: {reason}" if len(states) > 1 else reason
            for worker, each in judged.items()
            if each.word == word
            for reason in each.reasons
        ]
        + host,
        "loop_lag_s": gap_distribution(sum((state.loop_lag for state in states.values()), Counter[int]())),
        **told_by(calls),
        "cpu_s": sum(state.cpu_s for state in states.values()),
        "rss_mb": sum(state.rss_mb for state in states.values()),
        "host_busy_seconds": host_busy_seconds,
        "workers": len(states),
        "degraded": any(state.lost_at is not None for state in states.values()),
        "clock_offset_s": max((state.clock_offset_s for state in states.values()), key=abs, default=0.0),
        "by_worker": {
            str(worker): {
                "verdict": judged[worker].word,
                "loop_lag_p99_s": judged[worker].lag_p99_s,
                "send_delay_p99_s": p99_s.get(worker),
                "cpu_s": state.cpu_s,
                "rss_mb": state.rss_mb,
                "lost_at": state.lost_at,
                "node": state.node,
                "clock_offset_s": state.clock_offset_s,
                "lost_queries": state.lost_queries,
                "journal": state.journal,
            }
            for worker, state in states.items()
        },
    }


def bucket_quantile(counts: Mapping[int, int], q: float) -> float | None:
    """A quantile of values counted by log bucket, the largest where there are few; None where there is none."""
    rank, seen = math.ceil(q * (sum(counts.values()) - 1)), 0
    for bucket in sorted(counts):
        seen += counts[bucket]
        if seen > rank:
            return bucket_gap_s(bucket)
    return None


def p99(values: Sequence[float]) -> float:
    """The 99th percentile, the largest value where there are fewer than 100."""
    return ascending(values)[math.ceil(0.99 * (len(values) - 1))] if values else 0.0


def verdict(
    lag_p99_s: float | None, delay_p99_s: float | None, median_ttft_s: float | None, busy_seconds: int
) -> tuple[str, list[str]]:
    """strained: p99 of loop lag or send delay above max(5 ms, 5 % of the median TTFT); client-limited: above max(25 ms, 20 %), or above
    90 % CPU for 5 s. Gives the word and the reasons."""
    ttft_s = median_ttft_s or 0.0
    limits = {"client-limited": max(0.025, 0.2 * ttft_s), "strained": max(0.005, 0.05 * ttft_s)}
    measured = {"loop lag": lag_p99_s, "send delay": delay_p99_s}
    if busy_seconds >= _BUSY_S:
        return "client-limited", [f"above 90 % CPU for {busy_seconds} s"]
    for word, limit_s in limits.items():
        reasons = [
            f"p99 of {name} is {value * 1e3:.1f} ms, above {limit_s * 1e3:.1f} ms"
            for name, value in measured.items()
            if value is not None and value > limit_s
        ]
        if reasons:
            return word, reasons
    return "ok", []
