"""The verdict on the client, by its documented limits."""

import json

import pytest

from fanmark.loadgen.health import Health, p99, verdict


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


def test_the_report_is_the_client_part_of_the_summary() -> None:
    health = Health(lambda: 0.0)
    health.loop_lag_s += [0.001] * 99 + [0.030]
    found = health.report([0.002] * 40, 0.25, 0.1)
    assert found["verdict"] == "client-limited"
    assert found["reasons"] == ["p99 of loop lag is 30.0 ms, above 25.0 ms"]
    assert found["loop_lag_s"]["p50"] == 0.001 and found["loop_lag_s"]["n"] == 100
    assert found["loop_lag_s"]["p99"] is None  # too few for the quantile itself
    assert found["send_delay_s"]["p90"] == 0.002
    assert found["coalesced_share"] == 0.25 and found["workers"] == 1
    assert found["cpu_s"] >= 0 and found["rss_mb"] > 1
    json.dumps(found, allow_nan=False)
    empty = Health(lambda: 0.0).report([], 0.0, None)
    assert (empty["verdict"], empty["loop_lag_s"], empty["send_delay_s"]) == ("ok", None, None)
