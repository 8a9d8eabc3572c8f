"""Running sums of a run, told by the runtime; the live view and the metrics read them. Nothing here decides a result.

A call that ends is only put down; it is added to the sums when somebody looks, which the sampler does each second, or when MOST_PENDING
have ended. So what stands between a reply and the next call is a fifth of a microsecond (benchmarks/metrics.py), and no look
takes long.
"""

import bisect
from collections import Counter, defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

from fanmark.loadgen.costs import COUNTS
from fanmark.loadgen.health import ClientState
from fanmark.loadgen.records import Call, Query, bucket_gap_s, gap_bucket
from fanmark.loadgen.statistics import ratio_interval

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600)
GAPS_S = (0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 60, 600)
CALLS = (0, 1, 2, 3, 4, 6, 10, 16, 25, 50, 100, 200, 500)
TOKENS = (100, 200, 500, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 2e5, 5e5, 1e6, 1e7)
MOST_NAMES = 100  # of roles, and of tools, of an arm: what comes after them is "other"
_LONGEST_NAME = 100  # characters
MOST_PENDING = 100  # calls: adding them takes less than a millisecond
LEAST_QUERIES = 10  # of an arm, for an interval while the run goes on
TOKEN_KINDS = {
    "input": "input_tokens",
    "cached": "cached_tokens",
    "fresh": "fresh_tokens",
    "output": "output_tokens",
    "reasoning": "reasoning_tokens",
}


class Histogram:
    """Counts by upper bound, as Prometheus wants them. `exemplars` are the last value of each bucket and the query that it is of."""

    __slots__ = ("bounds", "counts", "exemplars", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0
        self.exemplars: dict[int, tuple[float, int]] = {}

    def add(self, value: float, times: int = 1, query: int | None = None) -> None:
        i = bisect.bisect_left(self.bounds, value)
        self.counts[i] += times
        self.sum += value * times
        if query is not None:
            self.exemplars[i] = (value, query)

    def merge(self, other: "Histogram") -> None:
        """Takes in the counts of another with the same bounds."""
        self.counts = [mine + theirs for mine, theirs in zip(self.counts, other.counts, strict=True)]
        self.sum += other.sum
        self.exemplars |= other.exemplars


def role_label(role: str) -> str:
    """A role without its number: agent-12 is an agent."""
    stem = role.rstrip("0123456789")
    return (stem[:-1] if stem != role and stem.endswith("-") else role) or "?"


def bounded(value: str, known: set[str], most: int) -> str:
    """The name for a role or tool: itself while there are few; `known` grows."""
    if value not in known and len(known) >= most:
        return "other"
    known.add(value)
    return value


def _of(found: dict[str, Histogram], key: str, bounds: tuple[float, ...]) -> Histogram:
    histogram = found.get(key)
    if histogram is None:
        histogram = found[key] = Histogram(bounds)
    return histogram


def _histograms(bounds: tuple[float, ...], names: Sequence[str]) -> dict[str, Histogram]:
    return {name: Histogram(bounds) for name in names}


@dataclass
class ArmTally:
    """One arm's sums. Warm-up queries are in none of them but the calls in flight. Tokens that no server told of have no entry."""

    topology: str
    started: int = 0
    finished: Counter[str] = field(default_factory=Counter)
    calls_in_flight: int = 0
    calls: Counter[tuple[str, str, str]] = field(default_factory=Counter)  # (role_label, target, outcome)
    retries: int = 0
    tool_calls: Counter[tuple[str, str]] = field(default_factory=Counter)  # (tool, outcome)
    tokens: Counter[str] = field(default_factory=Counter)
    sums: Counter[str] = field(default_factory=Counter)  # resources of completed queries
    squares: Counter[str] = field(default_factory=Counter)  # of the same
    known: Counter[str] = field(default_factory=Counter)  # how many completed queries know a resource
    ttft: Counter[int] = field(default_factory=Counter)  # of calls, by log bucket (records.gap_bucket), as the next
    latency: Counter[int] = field(default_factory=Counter)  # of completed queries
    expected: Counter[str] = field(default_factory=Counter)  # by the closed form, of completed queries
    mismatched: int = 0
    query_s: Histogram = field(default_factory=lambda: Histogram(SECONDS))
    query_calls: Histogram = field(default_factory=lambda: Histogram(CALLS))
    query_tool_calls: Histogram = field(default_factory=lambda: Histogram(CALLS))
    query_depth: Histogram = field(default_factory=lambda: Histogram(CALLS))
    query_tokens: dict[str, Histogram] = field(default_factory=lambda: _histograms(TOKENS, list(TOKEN_KINDS)))
    call_s: dict[str, Histogram] = field(default_factory=dict)  # by target, as the next two
    ttft_s: dict[str, Histogram] = field(default_factory=dict)
    itl_s: dict[str, Histogram] = field(default_factory=dict)
    tool_s: dict[str, Histogram] = field(default_factory=dict)
    tool_bytes: Counter[str] = field(default_factory=Counter)
    tool_queued_s: dict[str, Histogram] = field(default_factory=dict)
    tool_session_s: Histogram = field(default_factory=lambda: Histogram(SECONDS))

    def add_tool_call(self, call: Call, tool: str, outcome: str) -> None:
        """A tool call that ended."""
        self.tool_calls[tool, outcome] += 1
        self.tool_bytes[tool] += call.bytes or 0
        _of(self.tool_s, tool, SECONDS).add(call.seconds, query=call.query)
        if call.queued_s is not None:
            _of(self.tool_queued_s, tool, SECONDS).add(call.queued_s)
        if call.opened_session and call.session_s is not None:
            self.tool_session_s.add(call.session_s)

    def add_tokens(self, call: Call) -> None:
        """What the server told of a call that ended."""
        tokens, read, cached = self.tokens, call.input_tokens, call.cached_tokens
        if read is not None:
            tokens["input"] += read
            if cached is not None:
                tokens["cached"] += cached
                tokens["fresh"] += read - cached
        if call.output_tokens is not None:
            tokens["output"] += call.output_tokens
        if call.reasoning_tokens is not None:
            tokens["reasoning"] += call.reasoning_tokens

    @property
    def completed(self) -> int:
        return self.finished["completed"]

    @property
    def in_flight(self) -> int:
        """Queries started and not finished."""
        return self.started - sum(self.finished.values())


class Tally:
    """All arms' sums, and the client's own delays. Without `compared` no arm is set against the baseline."""

    def __init__(self, arms: dict[str, str], baseline: str, *, compared: bool = True) -> None:
        self._arms = {name: ArmTally(topology) for name, topology in arms.items()}
        self._ended: deque[Call] = deque()  # and not yet added
        self._adding = Lock()  # those who look do so from several threads
        self.baseline = baseline
        self.compared = compared
        self.send_delay: Counter[int] = Counter()  # of calls, by log bucket (records.gap_bucket), as the next
        self.ttft: Counter[int] = Counter()
        self.chunks = self.coalesced = 0  # a call's first chunk included
        self.clients: dict[int, ClientState] = {}
        self.begun: list[float] = []  # when arms began to be counted, block after block, in the run's time
        self._names: defaultdict[tuple[str, str], set[str]] = defaultdict(set)  # roles and tools, by arm
        self.validity: dict[str, bool] = {}  # the ticks that are known, set at the run's end

    @property
    def arms(self) -> dict[str, ArmTally]:
        """All sums until now."""
        self._add_ended()
        return self._arms

    def _add_ended(self) -> None:
        with self._adding:
            for _ in range(len(self._ended)):
                self._add(self._ended.popleft())

    def become(self, arms: dict[str, ArmTally], begun: list[float], run: Mapping[str, Any]) -> None:
        """Becomes the sum of workers' tallies; `run` are the run's own sums by name."""
        self._arms, self.begun = arms, begun
        vars(self).update(run)

    def call_started(self, call: Call) -> None:
        self._arms[call.arm].calls_in_flight += 1

    def call_finished(self, call: Call) -> None:
        self.call_landed(call)
        if call.query >= 0:
            self.call_told(call)

    def call_landed(self, call: Call) -> None:
        """It is in flight no more; what it was will be told."""
        self._arms[call.arm].calls_in_flight -= 1

    def call_told(self, call: Call) -> None:
        """What a call was that has ended."""
        self._ended.append(call)
        if len(self._ended) >= MOST_PENDING:
            self._add_ended()

    def _named(self, call: Call) -> str:
        """The call's role, or the tool call's tool, as it is counted: whatever is made up, there are not many."""
        name = role_label(call.role) if call.kind == "call" else call.tool or "?"
        return bounded(name[:_LONGEST_NAME], self._names[call.arm, call.kind], MOST_NAMES)

    def _add(self, call: Call) -> None:
        arm, name = self._arms[call.arm], self._named(call)
        outcome = call.error or call.refused or ("tool_error" if call.tool_error else "completed")
        if call.kind == "tool_call":
            arm.add_tool_call(call, name, outcome)
            return
        target = call.target or "?"
        arm.calls[name, target, outcome] += 1
        arm.add_tokens(call)
        delay_s = call.send_delay_s
        if call.sent_at is None or delay_s is None:
            return
        self.send_delay[gap_bucket(delay_s)] += 1
        self.chunks += call.chunks
        self.coalesced += call.coalesced
        _of(arm.call_s, target, SECONDS).add(call.seconds, query=call.query)
        if call.first_at is not None:
            ttft_s = call.first_at - call.sent_at
            _of(arm.ttft_s, target, SECONDS).add(ttft_s, query=call.query)
            bucket = gap_bucket(ttft_s)
            arm.ttft[bucket] += 1
            self.ttft[bucket] += 1
        if call.gaps:
            gaps = _of(arm.itl_s, target, GAPS_S)
            for bucket, times in call.gaps.items():
                gaps.add(bucket_gap_s(bucket), times)

    def call_retried(self, call: Call) -> None:
        """An attempt failed and the call will be sent again; it stays in flight meanwhile."""
        if call.query >= 0:
            self._arms[call.arm].retries += 1

    def query_started(self, arm: str) -> None:
        self._arms[arm].started += 1

    def query_finished(self, query: Query) -> None:
        arm = self._arms[query.arm]
        arm.finished[query.outcome] += 1
        if query.outcome != "completed":
            return
        arm.query_s.add(query.resources["latency_s"] or 0.0, query=query.query)
        arm.latency[gap_bucket(query.resources["latency_s"] or 0.0)] += 1
        arm.query_calls.add(query.resources["calls"] or 0)
        arm.query_tool_calls.add(query.resources.get("tool_calls") or 0)
        arm.query_depth.add(query.resources.get("depth") or 0)
        arm.expected.update({name: value for name, value in query.expected.items() if value is not None})
        arm.mismatched += bool(query.mismatches)
        for name, value in query.resources.items():
            if value is not None:
                arm.known[name] += 1
                arm.sums[name] += value  # type: ignore[assignment]  # a Counter of floats
                arm.squares[name] += value * value  # type: ignore[assignment]
        for kind, name in TOKEN_KINDS.items():
            tokens = query.resources[name]
            if tokens is not None:
                arm.query_tokens[kind].add(tokens)

    def amplification(self, arm: str, resource: str) -> float | None:
        """The ratio of means so far, None before both arms have completed a query or where the baseline has none of it."""
        own, base = self.arms[arm], self.arms[self.baseline]
        if not self.compared or not own.completed or not base.completed or not base.sums[resource]:
            return None
        return (own.sums[resource] / own.completed) / (base.sums[resource] / base.completed)

    def interval(self, arm: str, resource: str) -> tuple[float, float] | None:
        """The 95 % interval of that ratio so far; None for times, whose queries meet in the server, and below 10 queries of either arm. It
        does not know which queries of the arms belong together, so it is wider than the run's own."""
        own, base = self.arms[arm], self.arms[self.baseline]
        least = min(own.completed, base.completed)
        if (
            not self.compared
            or resource not in COUNTS
            or least < LEAST_QUERIES
            or not own.sums[resource]
            or not base.sums[resource]
        ):
            return None
        if own is base:
            return (1.0, 1.0)
        return ratio_interval(*((a.completed, a.sums[resource], a.squares[resource]) for a in (own, base)))
