"""The run's sums as Prometheus metrics, made when they are scraped: the run itself writes only to its own tally."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from fanmark.loadgen.exposition import CLASSIC, OPENMETRICS, Bars, Exposition, Value, labels
from fanmark.loadgen.health import WORDS, bucket_quantile, worst
from fanmark.loadgen.records import bucket_gap_s
from fanmark.loadgen.tally import (
    GAPS_S,
    LEAST_QUERIES,
    SECONDS,
    TOKEN_KINDS,
    ArmTally,
    Histogram,
    Tally,
    bounded,
    role_label,
)
from fanmark.loadgen.trace_headers import trace_id

AMPLIFIED = (
    "calls",
    "tool_calls",
    "input_tokens",
    "cached_tokens",
    "fresh_tokens",
    "output_tokens",
    "latency_s",
    "work_s",
)
EXPECTED = ("calls", "tool_calls", "input_tokens", "output_tokens")
QUERY_OUTCOMES = ("completed", "failed", "abandoned")
CALL_OUTCOMES = (
    "completed",
    *(
        "connect",
        "timeout",
        "http_429",
        "http_4xx",
        "http_5xx",
        "stream_cut",
        "bad_reply",
        "budget",
        "cancelled",
        "untold",
    ),
)
TOOL_OUTCOMES = ("completed", "tool_error", "tool_transport", "tool_protocol", "budget", "cancelled", "untold")
MOST_VALUES = 32  # of roles, and of tools, of an arm: what comes after them is "other"


@dataclass
class Told:
    """What a run tells beside its sums. `info` are the labels of fanmark_run_info; `roles` and `tools` are, by arm, those known before it
    starts, whose series begin at 0. `began_at` and `ended_at` are Unix time, `stages_s` how long after the count's start stages start."""

    run_id: str
    info: Mapping[str, str] = field(default_factory=dict)
    targets: Sequence[str] = ("default",)
    roles: Mapping[str, Sequence[str]] = field(default_factory=dict)
    tools: Mapping[str, Sequence[str]] = field(default_factory=dict)
    began_at: Callable[[], float | None] = lambda: None
    stages_s: Sequence[float] = ()
    time_scale: float = 1.0
    ended_at: float | None = None

    def marks(self, begun: Sequence[float], now: float) -> dict[str, float]:
        """The instants that have come, by name: `begun` are those of the run's time at which arms began to be counted."""
        began_at = self.began_at()
        if began_at is None:
            return {}
        found = {"start": began_at}
        for block, at in enumerate(begun, start=1):
            name = f"count {block}" if len(begun) > 1 else "count"
            found[name] = began_at + at * self.time_scale
            for stage, offset_s in enumerate(self.stages_s, start=1):
                found[f"{name}, stage {stage}"] = began_at + (at + offset_s) * self.time_scale
        return {mark: at for mark, at in found.items() if at <= now} | ({"end": self.ended_at} if self.ended_at else {})


class Metrics:
    """The scrapes of one run. `beside` gives the texts of servers that belong to it, in the classic format."""

    def __init__(
        self,
        tally: Tally,
        told: Told,
        beside: Callable[[], Sequence[str]] = lambda: (),
        now: Callable[[], float] = time.time,
    ) -> None:
        self._now = now
        self._tally = tally
        self._told = told
        self._beside = beside

    def scrape(self, accept: str) -> tuple[str, bytes]:
        """Content type and text, in the format that the request's Accept header asks for."""
        openmetrics = "application/openmetrics-text" in accept
        out = Exposition(openmetrics=openmetrics)
        self._run(out)
        self._queries(out)
        self._expected(out)
        self._calls(out)
        self._tools(out)
        self._client(out)
        for text in self._beside():
            out.classic(text)
        return (OPENMETRICS if openmetrics else CLASSIC), out.text().encode()

    def _arms(self) -> Iterator[tuple[str, ArmTally, str]]:
        """Each arm with its two labels."""
        for name, arm in list(self._tally.arms.items()):
            yield name, arm, labels({"arm": name, "topology": arm.topology})

    def _trace_of(self, arm: str) -> Callable[[int], str] | None:
        """What gives the trace of a query; what passes a tap has traces of its own, or none."""
        return partial(trace_id, self._told.run_id, arm) if self._tally.compared else None

    def _run(self, out: Exposition) -> None:
        info = labels({"run": self._told.run_id, **self._told.info})
        out.gauge("fanmark_run_info", "The run, as labels", [(info, 1)])
        marks = [
            (labels({"mark": mark}), at) for mark, at in self._told.marks(list(self._tally.begun), self._now()).items()
        ]
        out.gauge("fanmark_run_mark_timestamp_seconds", "Unix time of the run's start, of its stages and end", marks)
        ticks = [(labels({"tick": tick}), int(ok)) for tick, ok in self._tally.validity.items()]
        out.gauge("fanmark_validity", "Whether a validity tick holds; set at the end, absent where unknown", ticks)

    def _queries(self, out: Exposition) -> None:
        arms = list(self._arms())
        out.counter("fanmark_queries_started", "Queries started", [(label, arm.started) for _, arm, label in arms])
        out.counter(
            "fanmark_queries_finished",
            "Queries finished, by outcome",
            [(f'{label},outcome="{o}"', arm.finished[o]) for _, arm, label in arms for o in QUERY_OUTCOMES],
        )
        flying = [(label, arm.in_flight) for _, arm, label in arms]
        out.gauge("fanmark_queries_in_flight", "Queries in flight", flying)
        traces = {name: self._trace_of(name) for name, _, _ in arms}
        latency: list[Bars] = [(label, arm.query_s, traces[name]) for name, arm, label in arms]
        out.histogram("fanmark_query_duration_seconds", "Query latency", latency)
        out.histogram("fanmark_query_calls", "Calls of a query", [(lb, a.query_calls, None) for _, a, lb in arms])
        tool_calls: list[Bars] = [(label, arm.query_tool_calls, None) for _, arm, label in arms]
        out.histogram("fanmark_query_tool_calls", "Tool calls of a query", tool_calls)
        depth: list[Bars] = [(label, arm.query_depth, None) for _, arm, label in arms]
        out.histogram("fanmark_query_depth", "Calls on a query's longest chain of dependencies", depth)
        out.histogram(
            "fanmark_query_tokens",
            "Tokens of a query, by kind",
            [(f'{label},kind="{kind}"', h, None) for _, arm, label in arms for kind, h in arm.query_tokens.items()],
        )

    def _expected(self, out: Exposition) -> None:
        arms = list(self._arms())
        for resource in EXPECTED:
            rows = [
                (label, arm.expected[resource] / arm.completed)
                for _, arm, label in arms
                if arm.completed and resource in arm.expected
            ]
            words = resource.replace("_", " ")
            out.gauge(f"fanmark_expected_{resource}", f"{words.capitalize()} a query by the closed form, mean", rows)
        differ = [(label, arm.mismatched) for _, arm, label in arms]
        out.counter("fanmark_query_mismatches", "Completed queries that differ from their closed form", differ)
        ratios: list[Value] = []
        bounds: dict[str, list[Value]] = {"low": [], "high": []}
        base = self._tally.arms[self._tally.baseline]
        for name, arm, label in arms:
            if min(arm.completed, base.completed) < LEAST_QUERIES:
                continue
            for resource in AMPLIFIED:
                value = self._tally.amplification(name, resource)
                if value is not None:
                    ratios.append((f'{label},resource="{resource}"', value))
                if (interval := self._tally.interval(name, resource)) is not None:
                    for bound, end in zip(bounds, interval, strict=True):
                        bounds[bound].append((f'{label},resource="{resource}"', end))
        text = f"Mean per query divided by the baseline's, so far; absent below {LEAST_QUERIES} queries"
        out.gauge("fanmark_amplification_ratio", text, ratios)
        for bound, rows in bounds.items():
            out.gauge(f"fanmark_amplification_ratio_{bound}", f"Its 95 % interval, {bound} end", rows)

    def _calls(self, out: Exposition) -> None:
        arms = list(self._arms())
        out.counter("fanmark_calls", "Calls ended, by outcome", [v for n, a, lb in arms for v in self._ended(n, a, lb)])
        out.counter("fanmark_call_retries", "Attempts that were sent again", [(lb, a.retries) for _, a, lb in arms])
        flying = [(label, arm.calls_in_flight) for _, arm, label in arms]
        out.gauge("fanmark_calls_in_flight", "Calls and tool calls in flight", flying)
        out.counter(
            "fanmark_tokens",
            "Tokens of ended calls, by kind; absent where no server told of it",
            [
                (f'{label},kind="{kind}"', arm.tokens[kind])
                for _, arm, label in arms
                for kind in TOKEN_KINDS
                if kind in arm.tokens
            ],
        )
        times: list[tuple[str, str, tuple[float, ...], bool]] = [
            ("call_s", "fanmark_call_duration_seconds", SECONDS, True),
            ("ttft_s", "fanmark_call_ttft_seconds", SECONDS, True),
            ("itl_s", "fanmark_call_itl_seconds", GAPS_S, False),
        ]
        texts = ("Time from send to last token", "Time from send to first token", "Gaps between chunks with tokens")
        for (attribute, name, bounds, traced), text in zip(times, texts, strict=True):
            rows: list[Bars] = []
            for arm_name, arm, label in arms:
                trace = self._trace_of(arm_name) if traced else None
                by_target = {target: Histogram(bounds) for target in self._told.targets} | getattr(arm, attribute)
                rows += [(f"{label},{labels({'target': target})}", h, trace) for target, h in by_target.items()]
            out.histogram(name, text, rows)

    def _ended(self, name: str, arm: ArmTally, label: str) -> list[Value]:
        """Calls by role, target and outcome: those known from the start, and what else came."""
        found = Counter[tuple[str, str, str]]()
        roles = [role_label(role) for role in self._told.roles.get(name, ())]
        for role in roles:
            for target in self._told.targets:
                found.update(dict.fromkeys(((role, target, outcome) for outcome in CALL_OUTCOMES), 0))
        known = set(roles)
        for (role, target, outcome), times in list(arm.calls.items()):
            found[bounded(role, known, MOST_VALUES), target, outcome] += times
        return [
            (f"{label},{labels({'role': role, 'target': target, 'outcome': outcome})}", times)
            for (role, target, outcome), times in found.items()
        ]

    def _tools(self, out: Exposition) -> None:
        calls: list[Value] = []
        sizes: list[Value] = []
        times: dict[str, list[Bars]] = {"tool_s": [], "tool_queued_s": []}
        sessions: list[Bars] = []
        for name, arm, label in self._arms():
            known = set(self._told.tools.get(name, ()))
            ended = Counter(
                {(tool, outcome): 0 for tool in self._told.tools.get(name, ()) for outcome in TOOL_OUTCOMES}
            )
            for (tool, outcome), n in list(arm.tool_calls.items()):
                ended[bounded(tool, known, MOST_VALUES), outcome] += n
            calls += [(f"{label},{labels({'tool': tool, 'outcome': o})}", n) for (tool, o), n in ended.items()]
            bytes_of = Counter(dict.fromkeys(known, 0))
            for tool, n in list(arm.tool_bytes.items()):
                bytes_of[bounded(tool, known, MOST_VALUES)] += n
            sizes += [(f"{label},{labels({'tool': tool})}", n) for tool, n in bytes_of.items()]
            trace = self._trace_of(name)
            for attribute, rows in times.items():
                merged = {tool: Histogram(SECONDS) for tool in self._told.tools.get(name, ())}
                for tool, histogram in list(getattr(arm, attribute).items()):
                    merged.setdefault(bounded(tool, known, MOST_VALUES), Histogram(SECONDS)).merge(histogram)
                rows += [(f"{label},{labels({'tool': tool})}", h, trace) for tool, h in merged.items()]
            sessions.append((label, arm.tool_session_s, None))
        out.counter("fanmark_tool_calls", "Tool calls ended, by outcome", calls)
        out.counter("fanmark_tool_result_bytes", "Bytes of tools' results", sizes)
        out.histogram("fanmark_tool_call_duration_seconds", "Tool call duration", times["tool_s"])
        text = "Time of tool calls in their server's queue, where it tells"
        out.histogram("fanmark_tool_queue_seconds", text, times["tool_queued_s"])
        text = "Time that tool calls took to start their session, where they had to"
        out.histogram("fanmark_tool_session_start_seconds", text, sessions)

    def _client(self, out: Exposition) -> None:
        """The client's own delays, CPU and memory by worker, how many chunks it read together, and its verdict as of now."""
        states = dict(self._tally.clients)
        lag: Counter[int] = Counter()
        for state in states.values():
            lag.update(dict(state.loop_lag))  # a copy: the run goes on in another thread
        delays = (
            ("fanmark_client_loop_lag_seconds", "Lateness of the client's event loop", lag),
            (
                "fanmark_client_send_delay_seconds",
                "From due to sent, of a call, less connecting",
                self._tally.send_delay,
            ),
        )
        for name, text, counts in delays:
            histogram = Histogram(GAPS_S)
            for bucket, times in dict(counts).items():
                histogram.add(bucket_gap_s(bucket), times)
            out.histogram(name, text, [("", histogram, None)])
        worker = {name: labels({"worker": str(name)}) for name in states}
        cpu = [(worker[name], state.cpu_s) for name, state in states.items()]
        out.counter("fanmark_client_cpu_seconds", "CPU time of the client", cpu)
        memory = [(worker[name], state.rss_mb * 2**20) for name, state in states.items()]
        out.gauge("fanmark_client_memory_bytes", "Largest resident memory so far", memory)
        late = {n: bucket_quantile(dict(state.loop_lag), 0.99) for n, state in states.items()}
        text = "p99 of the lateness of a worker's event loop so far"
        out.gauge(
            "fanmark_client_worker_loop_lag_seconds", text, [(worker[n], s) for n, s in late.items() if s is not None]
        )
        text = "The verdict on a worker as it is now: 0 ok, 1 strained, 2 client-limited or lost"
        each = [(worker[n], WORDS.index(state.verdict)) for n, state in states.items()]
        out.gauge("fanmark_client_worker_verdict", text, each)
        word = worst([state.verdict for state in states.values()])
        verdicts = [(labels({"verdict": each}), int(each == word)) for each in WORDS]
        out.gauge("fanmark_client_verdict", "1 for the verdict on the client as it is now", verdicts)
        out.counter("fanmark_client_chunks", "Chunks with tokens that were read", [("", self._tally.chunks)])
        text = "Chunks that came together with the one before"
        out.counter("fanmark_client_coalesced_chunks", text, [("", self._tally.coalesced)])
