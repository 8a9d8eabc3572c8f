"""The run's sums as Prometheus metrics, made when they are scraped: nothing here is on the hot path."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

from fanmark.loadgen.errors import ScenarioError
from fanmark.loadgen.health import WORDS, worst
from fanmark.loadgen.records import bucket_gap_s
from fanmark.loadgen.tally import GAPS_S, ArmTally, Histogram, Tally

if TYPE_CHECKING:
    from prometheus_client.core import Metric

_STOP_WITHIN_S = 0.05  # the server looks so often whether it is to end
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


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    total, found = 0, []
    for bound, count in zip([*map(float, histogram.bounds), float("inf")], histogram.counts, strict=True):
        total += count
        found.append(("+Inf" if bound == float("inf") else repr(bound), float(total)))
    return found


class Collector:
    """Reads a Tally at each scrape."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally

    def collect(self) -> Iterator["Metric"]:
        """All metric families of a run."""
        yield from self._counters()
        yield from self._gauges()
        yield from self._histograms()
        yield from self._client()

    def _each(self) -> list[tuple[str, ArmTally]]:
        return list(self._tally.arms.items())

    def _counters(self) -> Iterator["Metric"]:
        from prometheus_client.core import CounterMetricFamily

        def family(name: str, text: str, labels: list[str], rows: Callable[[ArmTally], Any]) -> CounterMetricFamily:
            found = CounterMetricFamily(name, text, labels=["arm", "topology", *labels])
            for arm, tally in self._each():
                for values, count in rows(tally):
                    found.add_metric([arm, tally.topology, *values], count)
            return found

        yield family("fanmark_queries_started", "Queries started", [], lambda t: [((), t.started)])
        yield family(
            "fanmark_queries_finished",
            "Queries finished, by outcome",
            ["outcome"],
            lambda t: [((o,), t.finished[o]) for o in ("completed", "failed", "abandoned")],
        )
        yield family("fanmark_calls", "Calls ended, by outcome", ["role", "outcome"], lambda t: list(t.calls.items()))
        yield family("fanmark_call_retries", "Attempts of calls that were sent again", [], lambda t: [((), t.retries)])
        yield family(
            "fanmark_tool_calls", "Tool calls ended", ["tool", "outcome"], lambda t: list(t.tool_calls.items())
        )
        yield family(
            "fanmark_tool_result_bytes",
            "Bytes of tools' results",
            ["tool"],
            lambda t: [((tool,), n) for tool, n in list(t.tool_bytes.items())],
        )
        yield family(
            "fanmark_tokens",
            "Tokens of ended calls",
            ["kind"],
            lambda t: [((k,), n) for k, n in list(t.tokens.items())],
        )

    def _gauges(self) -> Iterator["Metric"]:
        from prometheus_client.core import GaugeMetricFamily

        labels = ["arm", "topology"]
        in_flight = GaugeMetricFamily("fanmark_calls_in_flight", "Calls and tool calls in flight", labels=labels)
        queries = GaugeMetricFamily("fanmark_queries_in_flight", "Queries in flight", labels=labels)
        expected = GaugeMetricFamily(
            "fanmark_expected_calls", "Calls a query by the closed form, mean so far", labels=labels
        )
        ratio = GaugeMetricFamily(
            "fanmark_amplification_ratio",
            "Mean per query divided by the baseline's, so far",
            labels=[*labels, "resource"],
        )
        for arm, tally in self._each():
            in_flight.add_metric([arm, tally.topology], tally.calls_in_flight)
            queries.add_metric([arm, tally.topology], tally.in_flight)
            if tally.completed:
                expected.add_metric([arm, tally.topology], tally.expected_calls / tally.completed)
            for resource in AMPLIFIED:
                value = self._tally.amplification(arm, resource)
                if value is not None:
                    ratio.add_metric([arm, tally.topology, resource], value)
        valid = GaugeMetricFamily(
            "fanmark_validity", "Whether a validity tick holds; set at the end, absent where unknown", labels=["tick"]
        )
        for tick, ok in self._tally.validity.items():
            valid.add_metric([tick], float(ok))
        yield from (in_flight, queries, expected, ratio, valid)

    def _histograms(self) -> Iterator["Metric"]:
        from prometheus_client.core import HistogramMetricFamily

        def family(
            name: str, text: str, labels: list[str], rows: Callable[[ArmTally], list[tuple[tuple[str, ...], Histogram]]]
        ) -> HistogramMetricFamily:
            found = HistogramMetricFamily(name, text, labels=["arm", "topology", *labels])
            for arm, tally in self._each():
                for values, h in rows(tally):
                    found.add_metric([arm, tally.topology, *values], buckets=_buckets(h), sum_value=h.sum)
            return found

        yield family("fanmark_query_duration_seconds", "Query latency", [], lambda t: [((), t.query_s)])
        yield family("fanmark_query_calls", "Calls of a query", [], lambda t: [((), t.query_calls)])
        yield family(
            "fanmark_query_tokens",
            "Tokens of a query, by kind",
            ["kind"],
            lambda t: [((k,), h) for k, h in t.query_tokens.items()],
        )
        yield family("fanmark_call_duration_seconds", "Time from send to last token", [], lambda t: [((), t.call_s)])
        yield family("fanmark_call_ttft_seconds", "Time from send to first token", [], lambda t: [((), t.ttft_s)])
        yield family("fanmark_call_itl_seconds", "Gaps between chunks with tokens", [], lambda t: [((), t.itl_s)])
        yield family(
            "fanmark_tool_call_duration_seconds",
            "Tool call duration",
            ["tool"],
            lambda t: [((tool,), h) for tool, h in list(t.tool_s.items())],
        )
        yield family(
            "fanmark_tool_queue_seconds",
            "Time of tool calls in their server's queue, where it tells",
            ["tool"],
            lambda t: [((tool,), h) for tool, h in list(t.tool_queued_s.items())],
        )
        yield family(
            "fanmark_tool_session_start_seconds",
            "Time that tool calls took to start their session, where they had to",
            [],
            lambda t: [((), t.tool_session_s)],
        )
        lag: Counter[int] = Counter()
        for state in list(self._tally.clients.values()):
            lag.update(dict(state.loop_lag))  # a copy: the run goes on in another thread
        for name, text, counts in (
            ("fanmark_client_loop_lag_seconds", "Lateness of the client's event loop", lag),
            (
                "fanmark_client_send_delay_seconds",
                "From due to sent, of a call, less connecting",
                self._tally.send_delay,
            ),
        ):
            histogram = Histogram(GAPS_S)
            for bucket, times in dict(counts).items():
                histogram.add(bucket_gap_s(bucket), times)
            found = HistogramMetricFamily(name, text, labels=[])
            found.add_metric([], buckets=_buckets(histogram), sum_value=histogram.sum)
            yield found

    def _client(self) -> Iterator["Metric"]:
        """The client's own CPU and memory by worker, how many chunks it read together, and its verdict as of now."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        cpu = CounterMetricFamily("fanmark_client_cpu_seconds", "CPU time of the client", labels=["worker"])
        memory = GaugeMetricFamily("fanmark_client_memory_bytes", "Largest resident memory so far", labels=["worker"])
        verdict = GaugeMetricFamily(
            "fanmark_client_verdict", "1 for the verdict on the client as it is now", labels=["verdict"]
        )
        states = dict(self._tally.clients)
        for worker, state in states.items():
            cpu.add_metric([str(worker)], state.cpu_s)
            memory.add_metric([str(worker)], state.rss_mb * 2**20)
        word = worst([state.verdict for state in states.values()])
        for each in WORDS:
            verdict.add_metric([each], float(each == word))
        yield from (cpu, memory, verdict)
        for name, text, value in (
            ("fanmark_client_chunks", "Chunks with tokens that were read", self._tally.chunks),
            ("fanmark_client_coalesced_chunks", "Chunks that came together with the one before", self._tally.coalesced),
        ):
            yield CounterMetricFamily(name, text, value=value)


def serve(tally: Tally, port: int) -> tuple[int, Callable[[], None]]:
    """Serves /metrics on loopback from a thread; gives the port and what ends it. Raises ScenarioError where the port is taken."""
    from socketserver import ThreadingMixIn
    from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

    class Silent(WSGIRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            """Logs nothing."""

    class Threading(ThreadingMixIn, WSGIServer):
        daemon_threads = True

    @cache
    def app() -> Callable[..., Any]:  # made at the first scrape: most short runs see none
        from prometheus_client import CollectorRegistry, make_wsgi_app

        registry = CollectorRegistry()
        registry.register(Collector(tally))
        return make_wsgi_app(registry)

    try:
        server = make_server("127.0.0.1", port, lambda *request: app()(*request), Threading, Silent)
    except OSError as e:
        raise ScenarioError(
            f"--metrics-port {port}: {e.strerror}: choose another, or leave it out for a free one"
        ) from None

    thread = threading.Thread(target=server.serve_forever, args=(_STOP_WITHIN_S,), daemon=True)
    thread.start()

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return server.server_port, stop
