"""The verdict on the client, by its documented limits."""

import asyncio
import json
import math
import time
from collections import Counter

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from two_arms import call, calls_of

from fanmark.loadgen.health import ClientState, Health, bucket_quantile, client_part, p99, verdict
from fanmark.loadgen.records import Call, bucket_gap_s, gap_bucket
from fanmark.loadgen.tally import Tally


@pytest.mark.parametrize(
    ("lag_s", "delay_s", "ttft_s", "busy_s", "word", "reasons"),
    [
        # all is well below 5 ms
        (0.004, 0.004, 0.0, 0, "ok", []),
        # 5 ms is still allowed, whatever the server's pace
        (0.005, 0.005, 0.05, 0, "ok", []),
        # above 5 ms of loop lag
        (0.006, 0.001, 0.05, 0, "strained", ["p99 of loop lag is 6.0 ms, above 5.0 ms"]),
        # above 5 ms of send delay
        (0.001, 0.006, 0.05, 0, "strained", ["p99 of send delay is 6.0 ms, above 5.0 ms"]),
        # a slow server allows more: 5 % of 400 ms
        (0.019, 0.019, 0.4, 0, "ok", []),
        (0.021, 0.0, 0.4, 0, "strained", ["p99 of loop lag is 21.0 ms, above 20.0 ms"]),
        # above 25 ms the client is the limit
        (0.026, 0.0, 0.05, 0, "client-limited", ["p99 of loop lag is 26.0 ms, above 25.0 ms"]),
        # where 20 % of the first token's time is more, that is the limit
        (0.026, 0.0, 0.4, 0, "strained", ["p99 of loop lag is 26.0 ms, above 20.0 ms"]),
        (0.0, 0.081, 0.4, 0, "client-limited", ["p99 of send delay is 81.0 ms, above 80.0 ms"]),
        # both are named
        (
            0.03,
            0.04,
            None,
            0,
            "client-limited",
            ["p99 of loop lag is 30.0 ms, above 25.0 ms", "p99 of send delay is 40.0 ms, above 25.0 ms"],
        ),
        # the worse word tells only what earned it
        (0.03, 0.01, None, 0, "client-limited", ["p99 of loop lag is 30.0 ms, above 25.0 ms"]),
        # four seconds above 90 % CPU are none
        (0.0, 0.0, 0.1, 4, "ok", []),
        # five are
        (0.0, 0.0, 0.1, 5, "client-limited", ["above 90 % CPU for 5 s"]),
        # nothing measured speaks against nobody
        (0.0, 0.0, None, 0, "ok", []),
    ],
)
def test_verdict(
    lag_s: float, delay_s: float, ttft_s: float | None, busy_s: int, word: str, reasons: list[str]
) -> None:
    assert verdict(lag_s, delay_s, ttft_s, busy_s) == (word, reasons)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], 0.0),  # nothing was measured
        ([3.0], 3.0),
        ([1.0, 3.0, 2.0], 3.0),  # too few for a 99th percentile: the largest
        ([float(i) for i in range(100)], 99.0),
        ([float(i) for i in range(101)], 99.0),
        ([float(i) for i in range(1001)], 990.0),
    ],
)
def test_p99_is_the_largest_of_few_and_the_99th_percentile_of_many(values: list[float], expected: float) -> None:
    assert p99(values) == expected


def sent(worker: int, delay_s: float, ttft_s: float, gaps: dict[int, int], coalesced: int = 0) -> Call:
    return call(
        1,
        (1.0 + delay_s, 1.0 + delay_s + ttft_s, 3.0),
        (100, 0, 10),
        due_at=1.0,
        worker=worker,
        gaps=gaps,
        coalesced=coalesced,
    )


def lagging(worst_s: float) -> ClientState:
    lags = {gap_bucket(0.001): 98, gap_bucket(worst_s): 2}
    return ClientState(Counter(lags), cpu_s=1.5, rss_mb=40.0)


def test_the_client_part_of_a_run_in_one_process() -> None:
    found = client_part({0: lagging(0.030)}, calls_of([sent(0, 0.002, 0.1, {7: 3}, coalesced=1)] * 40))
    assert found["verdict"] == "client-limited"
    assert found["reasons"] == [
        f"p99 of loop lag is {bucket_gap_s(gap_bucket(0.03)) * 1e3:.1f} ms, above 25.0 ms"
    ]  # as exact as a log bucket
    assert found["loop_lag_s"]["p50"] == pytest.approx(0.001, rel=0.01) and found["loop_lag_s"]["n"] == 100
    assert found["loop_lag_s"]["p99"] is None  # too few for the quantile itself
    assert found["send_delay_s"]["p90"] == pytest.approx(0.002)
    assert found["coalesced_share"] == 0.25 and found["workers"] == 1  # 3 gaps and a first chunk a call
    assert (found["cpu_s"], found["rss_mb"]) == (1.5, 40.0)
    assert found["connections"] == {"new": 0, "reused": 40}
    json.dumps(found, allow_nan=False)
    empty = client_part({0: ClientState()}, calls_of([]))
    assert (empty["verdict"], empty["loop_lag_s"], empty["send_delay_s"]) == ("ok", None, None)


@pytest.mark.parametrize(
    ("gaps", "coalesced", "share"),
    [({}, 9, 0.9), ({}, 0, 0.0), ({7: 1}, 8, 8 / 9), ({7: 9}, 9, 0.9)],
    ids=["all at once", "one chunk", "nearly all with the first", "all but the first together"],
)
def test_never_more_chunks_are_coalesced_than_came(gaps: dict[int, int], coalesced: int, share: float) -> None:
    found = client_part({0: lagging(0.001)}, calls_of([sent(0, 0.002, 0.1, gaps, coalesced=coalesced)] * 3))
    assert found["coalesced_share"] == pytest.approx(share)


def test_connecting_is_not_the_clients_delay() -> None:
    late = msgspec.structs.replace(sent(0, 0.152, 0.1, {}), connect_s=0.15)
    calls = [sent(0, 0.002, 0.1, {}), late, late, late]
    found = client_part({0: lagging(0.001)}, calls_of(calls))
    assert (found["verdict"], found["connections"]) == ("ok", {"new": 3, "reused": 1})
    assert found["send_delay_s"]["max"] == pytest.approx(0.002)


def test_the_worst_worker_is_the_verdict_and_is_named() -> None:
    states = {0: lagging(0.001), 1: lagging(0.001), 2: ClientState(lost_at=12.34)}
    calls = [sent(0, 0.001, 0.1, {}), sent(1, 0.019, 0.1, {})]
    found = client_part(states, calls_of(calls))
    assert found["verdict"] == "client-limited" and found["reasons"] == ["worker 2: died at 12.3 s"]
    assert (found["workers"], found["cpu_s"], found["rss_mb"]) == (3, 3.0, 80.0)
    assert {worker: each["verdict"] for worker, each in found["by_worker"].items()} == {
        "0": "ok", "1": "strained", "2": "client-limited"
    }  # fmt: skip
    assert found["by_worker"]["1"]["send_delay_p99_s"] == pytest.approx(0.019)
    assert found["by_worker"]["2"]["send_delay_p99_s"] is found["by_worker"]["2"]["loop_lag_p99_s"] is None
    del states[2]
    found = client_part(states, calls_of(calls))
    assert found["verdict"] == "strained"
    assert found["reasons"] == ["worker 1: p99 of send delay is 19.0 ms, above 5.0 ms"]


def test_a_busy_host_strains_the_client_and_makes_no_verdict_better() -> None:
    calls = [sent(0, 0.001, 0.1, {})]
    busy = "the host's CPU was above 80 % for 5 s"
    for state, host_s, word, last in (
        (lagging(0.001), 4, "ok", None),
        (lagging(0.001), 5, "strained", busy),
        (lagging(0.030), 5, "client-limited", busy),
    ):
        found = client_part({0: state}, calls_of(calls), host_s)
        assert (found["verdict"], found["host_busy_seconds"]) == (word, host_s)
        assert (found["reasons"][-1] if found["reasons"] else None) == last


def test_a_watch_measures_the_process_it_runs_in() -> None:
    async def watch_for(seconds: float) -> Tally:
        health, tally = Health(time.monotonic), Tally({"single": "single"}, "single")
        tally.send_delay[gap_bucket(0.2)] = 1  # far too late
        for _ in range(3):
            tally.query_started("single")
        watching = asyncio.ensure_future(health.watch(tally, 3))
        await asyncio.sleep(seconds)
        state = tally.clients[3]
        assert state.cpu_share is not None and (state.queries_running, state.queries_done) == (3, 0)
        tally.arms["single"].finished["completed"] = 1
        assert (health.look().queries_running, state.queries_done) == (2, 1)  # with the sums of the same instant
        tally.arms["single"].finished["completed"] = 2
        watching.cancel()
        return tally

    state = asyncio.run(watch_for(1.2)).clients[3]
    assert state.cpu_share is None and (state.queries_running, state.queries_done) == (1, 2)  # as it ended
    assert 10 <= sum(state.loop_lag.values()) <= 24
    assert state.cpu_s > 0 and state.rss_mb > 1 and state.verdict == "client-limited"


@given(st.lists(st.floats(1e-5, 10), max_size=300), st.sampled_from([0.0, 0.5, 0.9, 0.99, 1.0]))
def test_a_quantile_of_buckets_is_that_of_the_values_to_one_percent(values: list[float], q: float) -> None:
    found = bucket_quantile(Counter(map(gap_bucket, values)), q)
    if not values:
        assert found is None
    else:
        assert found == pytest.approx(sorted(values)[math.ceil(q * (len(values) - 1))], rel=0.0101)
