"""A scrape of a known tally: every metric that is promised, and its values."""

import socket
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator

import pytest
import two_arms
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families

from fanmark.loadgen.errors import ScenarioError
from fanmark.loadgen.exposition import Exposition, labels
from fanmark.loadgen.health import ClientState
from fanmark.loadgen.metrics import CALL_OUTCOMES, Metrics, Told
from fanmark.loadgen.metrics_server import Scrapes, serve
from fanmark.loadgen.records import Query, gap_bucket
from fanmark.loadgen.tally import Histogram, Tally
from fanmark.loadgen.trace_headers import trace_id
from fanmark.servers.vllm_metrics import Engine, EngineMetrics

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]

PROMISED = {
    "fanmark_queries_started": {"arm", "topology"},
    "fanmark_queries_finished": {"arm", "topology", "outcome"},
    "fanmark_query_duration_seconds": {"arm", "topology"},
    "fanmark_query_calls": {"arm", "topology"},
    "fanmark_query_tokens": {"arm", "topology", "kind"},
    "fanmark_query_tool_calls": {"arm", "topology"},
    "fanmark_query_mismatches": {"arm", "topology"},
    "fanmark_expected_tool_calls": {"arm", "topology"},
    "fanmark_expected_input_tokens": {"arm", "topology"},
    "fanmark_expected_output_tokens": {"arm", "topology"},
    "fanmark_call_duration_seconds": {"arm", "topology", "target"},
    "fanmark_call_ttft_seconds": {"arm", "topology", "target"},
    "fanmark_call_itl_seconds": {"arm", "topology", "target"},
    "fanmark_calls_in_flight": {"arm", "topology"},
    "fanmark_calls": {"arm", "topology", "role", "target", "outcome"},
    "fanmark_tokens": {"arm", "topology", "kind"},
    "fanmark_tool_call_duration_seconds": {"arm", "topology", "tool"},
    "fanmark_tool_calls": {"arm", "topology", "tool", "outcome"},
    "fanmark_expected_calls": {"arm", "topology"},
    "fanmark_client_loop_lag_seconds": set(),
    "fanmark_client_send_delay_seconds": set(),
    "fanmark_client_cpu_seconds": {"worker"},
    "fanmark_client_memory_bytes": {"worker"},
    "fanmark_client_worker_loop_lag_seconds": {"worker"},
    "fanmark_client_worker_verdict": {"worker"},
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


TOLD = Told(
    run_id="r1",
    info={"scenario": "two", "version": "1.2", "seed": "7", "baseline": "single"},
    targets=["t"],
    roles={"single": ["agent"], "debate": ["agent-1", "judge"]},
    tools={"debate": ["now"]},
)


def text(tally: Tally, told: Told = TOLD, accept: str = "") -> str:
    return Metrics(tally, told, now=lambda: 200.0).scrape(accept)[1].decode()


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
    for name, promised in PROMISED.items():
        found = {key for sample in families[name].samples for key in sample.labels} - {"le"}
        assert found == promised, name
    assert all(name.startswith("fanmark_") for name in families)
    for family in families.values():
        if family.type == "counter":
            assert all(sample.name.endswith("_total") for sample in family.samples)


def test_every_family_is_declared_before_anything_has_run() -> None:
    families = {family.name for family in text_string_to_metric_families(text(Tally({"a": "single"}, "a")))}
    assert families >= {*PROMISED, "fanmark_amplification_ratio_low", "fanmark_amplification_ratio_high"}


def test_counters(tally: Tally) -> None:
    found = scrape(tally)
    assert value(found, "fanmark_queries_started_total", arm="single") == 3  # warm-up is not counted
    assert value(found, "fanmark_queries_started_total", arm="debate") == 4
    finished = {
        o: value(found, "fanmark_queries_finished_total", arm="debate", outcome=o)
        for o in ("completed", "failed", "abandoned")
    }
    assert finished == {"completed": 2, "failed": 1, "abandoned": 0}
    assert value(found, "fanmark_calls_total", arm="debate", role="agent", target="t", outcome="completed") == 5
    assert value(found, "fanmark_calls_total", arm="debate", role="judge", target="t", outcome="completed") == 2
    assert value(found, "fanmark_calls_total", arm="debate", role="agent", target="t", outcome="http_5xx") == 1
    assert value(found, "fanmark_calls_total", arm="single", role="agent", target="t", outcome="completed") == 3
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

    assert value(found, "fanmark_expected_input_tokens", arm="debate") == 400
    assert value(found, "fanmark_query_mismatches_total", arm="debate") == 0
    assert not any(name.startswith("fanmark_amplification") for name, _ in found)  # below 10 queries there is none


def test_ratios_from_ten_queries_of_both_arms_on_with_their_bounds() -> None:
    found = Tally({"single": "single", "debate": "debate"}, "single")
    wrote = (10, 20)  # of alternate queries
    for arm, calls, queries in (("single", 1, 10), ("debate", 3, 9)):
        for i in range(queries):
            found.query_finished(answered(arm, i, calls, wrote[i % 2]))
    assert value(scrape(found), "fanmark_amplification_ratio", arm="debate", resource="calls") is None
    found.query_finished(answered("debate", 9, 3, wrote[1]))
    samples = scrape(found)

    def ratio(arm: str, resource: str, end: str = "") -> float | None:
        return value(samples, f"fanmark_amplification_ratio{end}", arm=arm, resource=resource)

    assert [ratio("debate", "calls", end) for end in ("_low", "", "_high")] == pytest.approx([3.0] * 3)
    low, high = ratio("debate", "output_tokens", "_low"), ratio("debate", "output_tokens", "_high")
    assert ratio("debate", "output_tokens") == 3.0 and low is not None and high is not None and low < 3.0 < high
    assert low * high == pytest.approx(9.0)  # the interval is on the logarithm
    assert (ratio("debate", "latency_s"), ratio("debate", "latency_s", "_low")) == (4.0, None)
    assert ratio("debate", "tool_calls") is None  # the baseline has none
    assert ratio("single", "calls") == 1.0


def answered(arm: str, number: int, calls: int, wrote: int) -> Query:
    made = [two_arms.call(i + 1, (0.0, 0.5, 1.0), (100, 0, wrote)) for i in range(calls)]
    return two_arms.query(arm, number, made, 0.0, {"single": 1.0, "debate": 4.0}[arm])


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
    assert histogram(found, "fanmark_query_calls", arm="debate") == {3: 2}
    assert histogram(found, "fanmark_query_tokens", arm="debate", kind="input") == {500: 2}
    assert histogram(found, "fanmark_query_tokens", arm="debate", kind="output") == {100: 2}
    assert value(found, "fanmark_query_tokens_sum", arm="debate", kind="fresh") == 480
    # the failed query's calls are calls: 3, 4, 4, 2, 4, 4, 1 and the one that broke off after 2 s
    assert histogram(found, "fanmark_call_duration_seconds", arm="debate", target="t") == {1: 1, 2: 2, 5: 5}
    assert value(found, "fanmark_call_duration_seconds_sum", arm="debate", target="t") == 24
    assert histogram(found, "fanmark_call_ttft_seconds", arm="debate", target="t") == {0.5: 1, 1: 6}
    assert histogram(found, "fanmark_tool_call_duration_seconds", arm="debate", tool="now") == {0.5: 1, 1: 1}
    assert histogram(found, "fanmark_call_itl_seconds", arm="single", target="t") == {
        0.2: 30
    }  # 0.1015 s, each ten times
    assert histogram(found, "fanmark_client_loop_lag_seconds") == {0.002: 1}
    assert histogram(found, "fanmark_client_send_delay_seconds") == {0.001: 11}


def test_the_client_tells_of_itself_by_worker(tally: Tally) -> None:
    found = scrape(tally)
    for worker, cpu_s, mb in (("0", 1.5, 2), ("1", 0.25, 1)):
        assert value(found, "fanmark_client_cpu_seconds_total", worker=worker) == cpu_s
        assert value(found, "fanmark_client_memory_bytes", worker=worker) == mb * 2**20
        assert value(found, "fanmark_client_worker_verdict", worker=worker) == int(worker)  # ok, strained
    lags = [value(found, "fanmark_client_worker_loop_lag_seconds", worker=worker) for worker in "01"]
    assert lags == [pytest.approx(0.0015, rel=0.011), None]
    words = {
        word: value(found, "fanmark_client_verdict", verdict=word) for word in ("ok", "strained", "client-limited")
    }
    assert words == {"ok": 0, "strained": 1, "client-limited": 0}  # the worst worker's
    assert value(found, "fanmark_client_chunks_total") == 11 + 100  # calls that were sent, and their gaps
    joined = two_arms.call(1, (0.0, 1.0, 2.0), (1, 0, 9), gaps={gap_bucket(0.11): 4}, coalesced=3)
    two_arms.query("single", 9, [joined], 0.0, 2.0)
    tally.call_finished(joined)
    assert value(scrape(tally), "fanmark_client_coalesced_chunks_total") == 3
    at_once = two_arms.call(1, (0.0, 1.0, 2.0), (1, 0, 9), gaps={}, coalesced=8)
    two_arms.query("single", 10, [at_once], 0.0, 2.0)
    tally.call_finished(at_once)
    assert value(scrape(tally), "fanmark_client_chunks_total") == 11 + 100 + (1 + 4) + (1 + 8)


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
    assert {n for (name, _), n in samples.items() if name == "fanmark_calls_total"} == {0}


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


def test_every_series_that_can_be_known_is_there_from_the_start_at_nought() -> None:
    samples = scrape(Tally({"single": "single", "debate": "debate"}, "single"))
    for role in ("agent", "judge"):
        for outcome in CALL_OUTCOMES:
            assert value(samples, "fanmark_calls_total", arm="debate", role=role, target="t", outcome=outcome) == 0
    assert value(samples, "fanmark_calls_total", arm="single", role="judge", target="t", outcome="completed") is None
    assert value(samples, "fanmark_tool_calls_total", arm="debate", tool="now", outcome="tool_error") == 0
    assert value(samples, "fanmark_tool_call_duration_seconds_count", arm="debate", tool="now") == 0
    assert value(samples, "fanmark_call_ttft_seconds_bucket", arm="single", target="t", le="600.0") == 0


@pytest.mark.parametrize("roles", [40, 400])
def test_labels_are_bounded_whatever_roles_a_topology_makes_up(roles: int) -> None:
    found = Tally({"debate": "debate"}, "debate")
    for i in range(roles):
        call = two_arms.call(1, (0.0, 0.5, 1.0), (1, 0, 1), role=f"voice {i}")
        two_arms.query("debate", i, [call], 0.0, 1.0)
        found.call_started(call)
        found.call_finished(call)
    counts = {
        dict(given)["role"]: n for (name, given), n in scrape(found).items() if name == "fanmark_calls_total" and n
    }
    assert len(counts) == 32 - 2 + 1 and sum(counts.values()) == roles  # agent and judge are known
    assert counts["other"] == roles - 30


def test_the_run_is_a_label_set_and_its_marks_are_instants() -> None:
    told = Told("r1", TOLD.info, began_at=lambda: 100.0, stages_s=[0.0, 10.0, 500.0], time_scale=2.0)
    found = Tally({"single": "single"}, "single")
    assert scrape(found)["fanmark_run_info", frozenset({"run": "r1", **TOLD.info}.items())] == 1

    def marks() -> dict[str, float]:
        families = text_string_to_metric_families(text(found, told))
        family = next(f for f in families if f.name == "fanmark_run_mark_timestamp_seconds")
        return {sample.labels["mark"]: sample.value for sample in family.samples}

    assert marks() == {"start": 100.0}
    found.begun.append(3.0)
    stages = {"count, stage 1": 106.0, "count, stage 2": 126.0}  # the third is still to come
    assert marks() == {"start": 100.0, "count": 106.0, **stages}
    told.ended_at = 150.0
    assert marks()["end"] == 150.0


def test_openmetrics_carries_the_trace_of_a_query_in_each_bucket(tally: Tally) -> None:
    kind, body = Metrics(tally, TOLD).scrape("application/openmetrics-text;version=1.0.0,text/plain;q=0.5")
    assert kind.startswith("application/openmetrics-text; version=1.0.0")
    families = {family.name: family for family in openmetrics_families(body.decode())}
    assert set(PROMISED) <= set(families)
    seen = {
        sample.labels["le"]: (sample.exemplar.labels["trace_id"], sample.exemplar.value)
        for sample in families["fanmark_query_duration_seconds"].samples
        if sample.exemplar is not None and sample.labels["arm"] == "single"
    }
    assert seen == {"2.0": (trace_id("r1", "single", 1), 1.5), "5.0": (trace_id("r1", "single", 2), 4.0)}
    assert "trace_id" not in text(tally)


def test_another_servers_classic_text_is_made_openmetrics() -> None:
    metrics = EngineMetrics("tiny", 4096, {"a": "b"}, 1.0)
    metrics.totals.prompt = 7
    out, classic = Exposition(openmetrics=True), metrics.render(Engine(running=3))
    out.classic(classic)
    families = {family.name: family for family in openmetrics_families(out.text())}
    assert {f.name for f in text_string_to_metric_families(classic) if not f.name.endswith("_created")} == set(families)
    assert [s.value for s in families["vllm:prompt_tokens"].samples] == [7]
    assert [s.value for s in families["vllm:num_requests_running"].samples] == [3]


def test_label_values_are_escaped() -> None:
    assert labels({"arm": 'a "b"\\c\n'}) == r'arm="a \"b\"\\c\n"'


@pytest.mark.parametrize(
    ("times", "seconds"), [([], 0), ([1.0], 0), ([1.0, 6.0], 10), ([1.0, 6.0, 7.0], 10), ([0.0, 600.0], 90)]
)
def test_the_pages_are_held_for_two_scrapes_where_somebody_scrapes(times: list[float], seconds: float) -> None:
    clock = iter(times)
    scrapes = Scrapes(lambda accept: ("", b""), lambda: next(clock))
    for _ in times:
        scrapes("")
    assert scrapes.hold_s == seconds


def test_metrics_are_served_on_a_free_port_until_stopped(tally: Tally) -> None:
    port, stop = serve({"/metrics": Metrics(tally, TOLD, now=lambda: 200.0).scrape}, 0)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as reply:
            assert reply.read().decode() == text(tally)
            assert reply.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/other", timeout=10)
    finally:
        stop()
    again, stop = serve({"/metrics": Metrics(tally, TOLD, now=lambda: 200.0).scrape}, port)  # the port is free again
    stop()
    assert again == port


def test_a_port_that_is_taken_is_told_with_the_mend(tally: Tally, taken: int) -> None:
    with pytest.raises(ScenarioError) as caught:
        serve({"/metrics": Metrics(tally, TOLD, now=lambda: 200.0).scrape}, taken)
    mend = "choose another, or leave it out for a free one"
    assert str(caught.value) == f"--metrics-port {taken}: Address already in use: {mend}"


def test_an_address_that_is_none_of_this_hosts_is_told(tally: Tally) -> None:
    with pytest.raises(
        ScenarioError, match=r"^--metrics-host 192\.0\.2\.9 --metrics-port 0: Cannot assign requested address: "
    ):
        serve({}, 0, "192.0.2.9")


def test_a_role_loses_its_number_once() -> None:
    tally = Tally({"single": "single"}, "single")
    call = two_arms.call(1, (0.0, 0.5, 1.0), (1, 0, 1), role="voter-2-7")
    two_arms.query("single", 0, [call], 0.0, 1.0)
    tally.call_started(call)
    tally.call_finished(call)
    assert (
        value(scrape(tally), "fanmark_calls_total", arm="single", role="voter-2", target="t", outcome="completed") == 1
    )
