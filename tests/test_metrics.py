"""A scrape of a known tally: every metric that is promised, and its values."""

import socket
import urllib.request
from collections import Counter
from collections.abc import Iterator

import pytest
import two_arms
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from fanmark.loadgen.errors import ScenarioError
from fanmark.loadgen.health import ClientState
from fanmark.loadgen.metrics import Collector, serve
from fanmark.loadgen.records import gap_bucket
from fanmark.loadgen.tally import Histogram, Tally

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]

PROMISED = {
    "fanmark_queries_started": {"arm", "topology"},
    "fanmark_queries_finished": {"arm", "topology", "outcome"},
    "fanmark_query_duration_seconds": {"arm", "topology"},
    "fanmark_query_calls": {"arm", "topology"},
    "fanmark_query_tokens": {"arm", "topology", "kind"},
    "fanmark_amplification_ratio": {"arm", "topology", "resource"},
    "fanmark_call_duration_seconds": {"arm", "topology"},
    "fanmark_call_ttft_seconds": {"arm", "topology"},
    "fanmark_call_itl_seconds": {"arm", "topology"},
    "fanmark_calls_in_flight": {"arm", "topology"},
    "fanmark_calls": {"arm", "topology", "role", "outcome"},
    "fanmark_tokens": {"arm", "topology", "kind"},
    "fanmark_tool_call_duration_seconds": {"arm", "topology", "tool"},
    "fanmark_tool_calls": {"arm", "topology", "tool", "outcome"},
    "fanmark_expected_calls": {"arm", "topology"},
    "fanmark_client_loop_lag_seconds": set(),
    "fanmark_client_send_delay_seconds": set(),
    "fanmark_client_cpu_seconds": {"worker"},
    "fanmark_client_memory_bytes": {"worker"},
    "fanmark_client_verdict": {"verdict"},
    "fanmark_client_chunks": set(),
    "fanmark_client_coalesced_chunks": set(),
    "fanmark_validity": {"tick"},
}


@pytest.fixture
def tally() -> Tally:
    """Fed as a run feeds it with the run made by hand, and one query of each arm that is still under way."""
    found = Tally({"single": "single", "debate": "debate"}, "single")
    for query in two_arms.queries():
        if not query.warmup:
            found.query_started(query.arm)
        for call in query.calls:
            found.call_started(call)
            found.call_finished(call)
        if not query.warmup:
            found.query_finished(query)
    running = two_arms.query("debate", 3, [two_arms.call(1, (9.0, None, 9.0), (None, None, None))], 9.0, 9.0)
    found.query_started("debate")
    found.call_started(running.calls[0])
    lags = Counter({gap_bucket(0.0015): 1})
    found.clients = {
        0: ClientState(lags, cpu_s=1.5, rss_mb=2.0),
        1: ClientState(Counter(), cpu_s=0.25, rss_mb=1.0, verdict="strained"),
    }
    found.validity = {"counted": True, "alone": False}
    return found


def text(tally: Tally) -> str:
    registry = CollectorRegistry()
    registry.register(Collector(tally))
    return generate_latest(registry).decode()


def scrape(tally: Tally) -> Samples:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text(tally))
        for sample in family.samples
    }


def value(samples: Samples, name: str, **labels: str) -> float | None:
    arm = {"topology": labels["arm"]} if "arm" in labels else {}
    return samples.get((name, frozenset((labels | arm).items())))


def test_every_promised_metric_is_there_with_its_labels(tally: Tally) -> None:
    families = {family.name: family for family in text_string_to_metric_families(text(tally))}
    for name, labels in PROMISED.items():
        found = {key for sample in families[name].samples for key in sample.labels} - {"le"}
        assert found == labels, name
    assert all(name.startswith("fanmark_") for name in families)
    for family in families.values():
        if family.type == "counter":
            assert all(sample.name.endswith("_total") for sample in family.samples)


def test_every_family_is_declared_before_anything_has_run() -> None:
    families = {family.name for family in text_string_to_metric_families(text(Tally({"a": "single"}, "a")))}
    assert families >= set(PROMISED)


def test_counters(tally: Tally) -> None:
    found = scrape(tally)
    assert value(found, "fanmark_queries_started_total", arm="single") == 3  # warm-up is not counted
    assert value(found, "fanmark_queries_started_total", arm="debate") == 4
    finished = {
        o: value(found, "fanmark_queries_finished_total", arm="debate", outcome=o)
        for o in ("completed", "failed", "abandoned")
    }
    assert finished == {"completed": 2, "failed": 1, "abandoned": 0}
    assert value(found, "fanmark_calls_total", arm="debate", role="agent-1", outcome="completed") == 3
    assert value(found, "fanmark_calls_total", arm="debate", role="agent-2", outcome="completed") == 2
    assert value(found, "fanmark_calls_total", arm="debate", role="agent-2", outcome="http_5xx") == 1
    assert value(found, "fanmark_calls_total", arm="single", role="agent", outcome="completed") == 3
    assert value(found, "fanmark_tool_calls_total", arm="debate", tool="now", outcome="completed") == 2
    tokens = {
        kind: value(found, "fanmark_tokens_total", arm="debate", kind=kind)
        for kind in ("input", "cached", "fresh", "output")
    }
    assert tokens == {"input": 900, "cached": 384, "fresh": 516, "output": 187}
    # no server told of reasoning: that is not 0 tokens, but unknown
    assert value(found, "fanmark_tokens_total", arm="debate", kind="reasoning") is None


def test_gauges(tally: Tally) -> None:
    found = scrape(tally)
    assert value(found, "fanmark_calls_in_flight", arm="debate") == 1
    assert value(found, "fanmark_calls_in_flight", arm="single") == 0
    assert value(found, "fanmark_queries_in_flight", arm="debate") == 1
    assert value(found, "fanmark_expected_calls", arm="debate") == 3
    assert value(found, "fanmark_expected_calls", arm="single") == 1

    def ratio(resource: str) -> float | None:
        return value(found, "fanmark_amplification_ratio", arm="debate", resource=resource)

    # so far, over completed queries alone
    assert (ratio("calls"), ratio("input_tokens"), ratio("latency_s")) == (3.0, 4.0, 8 / 2.5)
    assert ratio("output_tokens") == pytest.approx(83 / (58 / 3))
    assert ratio("tool_calls") is None  # the baseline has none
    assert value(found, "fanmark_amplification_ratio", arm="single", resource="calls") == 1.0


def histogram(samples: Samples, name: str, **labels: str) -> dict[float, float]:
    """How many values fell into each bucket that is not empty, by its upper bound."""
    wanted = labels | ({"topology": labels["arm"]} if "arm" in labels else {})
    found = {}
    for (sample, given), count in samples.items():
        own = dict(given)
        bound = own.pop("le", None)
        if sample == f"{name}_bucket" and own == wanted and bound is not None:
            found[float(bound)] = count
    below, counts = 0.0, {}
    for bound_s, total in sorted(found.items()):
        if total > below:
            counts[bound_s] = total - below
        below = total
    assert below == value(samples, f"{name}_count", **labels)
    return counts


def test_histograms(tally: Tally) -> None:
    found = scrape(tally)
    assert histogram(found, "fanmark_query_duration_seconds", arm="single") == {2: 2, 5: 1}  # 2, 1.5 and 4 s
    assert value(found, "fanmark_query_duration_seconds_sum", arm="single") == 7.5
    assert histogram(found, "fanmark_query_calls", arm="debate") == {4: 2}
    assert histogram(found, "fanmark_query_tokens", arm="debate", kind="input") == {500: 2}
    assert histogram(found, "fanmark_query_tokens", arm="debate", kind="output") == {100: 2}
    assert value(found, "fanmark_query_tokens_sum", arm="debate", kind="fresh") == 480
    # the failed query's calls are calls: 3, 4, 4, 2, 4, 4, 1 and the one that broke off after 2 s
    assert histogram(found, "fanmark_call_duration_seconds", arm="debate") == {1: 1, 2: 2, 5: 5}
    assert value(found, "fanmark_call_duration_seconds_sum", arm="debate") == 24
    assert histogram(found, "fanmark_call_ttft_seconds", arm="debate") == {0.5: 1, 1: 6}
    assert histogram(found, "fanmark_tool_call_duration_seconds", arm="debate", tool="now") == {0.5: 1, 1: 1}
    assert histogram(found, "fanmark_call_itl_seconds", arm="single") == {0.2: 30}  # 0.1015 s, each ten times
    assert histogram(found, "fanmark_client_loop_lag_seconds") == {0.002: 1}
    assert histogram(found, "fanmark_client_send_delay_seconds") == {0.001: 11}


def test_the_client_tells_of_itself_by_worker(tally: Tally) -> None:
    found = scrape(tally)
    for worker, cpu_s, mb in (("0", 1.5, 2), ("1", 0.25, 1)):
        assert value(found, "fanmark_client_cpu_seconds_total", worker=worker) == cpu_s
        assert value(found, "fanmark_client_memory_bytes", worker=worker) == mb * 2**20
    words = {
        word: value(found, "fanmark_client_verdict", verdict=word) for word in ("ok", "strained", "client-limited")
    }
    assert words == {"ok": 0, "strained": 1, "client-limited": 0}  # the worst worker's
    assert value(found, "fanmark_client_chunks_total") == 11 + 100  # calls that were sent, and their gaps
    joined = two_arms.call(1, (0.0, 1.0, 2.0), (1, 0, 9), gaps={gap_bucket(0.11): 4}, coalesced=3)
    two_arms.query("single", 9, [joined], 0.0, 2.0)
    tally.call_finished(joined)
    assert value(scrape(tally), "fanmark_client_coalesced_chunks_total") == 3


def test_ticks_that_are_known_are_one_or_nought(tally: Tally) -> None:
    samples = scrape(tally)
    assert value(samples, "fanmark_validity", tick="counted") == 1
    assert value(samples, "fanmark_validity", tick="alone") == 0
    assert value(samples, "fanmark_validity", tick="steady") is None


def test_warm_up_calls_show_only_while_they_are_in_flight() -> None:
    found = Tally({"single": "single"}, "single")
    warm = two_arms.queries()[0].calls[0]
    found.call_started(warm)
    assert value(scrape(found), "fanmark_calls_in_flight", arm="single") == 1
    found.call_finished(warm)
    samples = scrape(found)
    assert value(samples, "fanmark_calls_in_flight", arm="single") == 0
    assert not any(name == "fanmark_calls_total" for name, _ in samples)


def test_a_tools_own_error_is_an_outcome() -> None:
    found = Tally({"debate": "debate"}, "debate")
    call = two_arms.tool(1, 0.0, 1.0)
    call.query, call.arm, call.tool_error = 0, "debate", True
    found.call_started(call)
    found.call_finished(call)
    assert value(scrape(found), "fanmark_tool_calls_total", arm="debate", tool="now", outcome="tool_error") == 1


@pytest.mark.parametrize(("number", "bucket"), [(0.0, 0), (0.5, 0), (1.0, 0), (1.1, 1), (2.0, 1), (9.0, 2)])
def test_a_bucket_holds_its_upper_bound(number: float, bucket: int) -> None:
    histogram = Histogram([1.0, 2.0])
    histogram.add(number, 3)
    assert histogram.counts[bucket] == 3 and sum(histogram.counts) == 3 and histogram.sum == 3 * number


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        yield holder.getsockname()[1]


def test_metrics_are_served_on_a_free_port_until_stopped(tally: Tally) -> None:
    port, stop = serve(tally, 0)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as reply:
            assert reply.read().decode() == text(tally)
    finally:
        stop()
    again, stop = serve(tally, port)  # the port is free again
    stop()
    assert again == port


def test_a_port_that_is_taken_is_told_with_the_mend(tally: Tally, taken: int) -> None:
    with pytest.raises(ScenarioError) as caught:
        serve(tally, taken)
    mend = "choose another, or leave it out for a free one"
    assert str(caught.value) == f"--metrics-port {taken}: Address already in use: {mend}"
