"""Intervals and verdicts held against a queue whose truth is known; benchmarks/coverage.py does it with more seeds, and on the engine."""

import math

import pytest
from crowd import counted, crowd, truth
from hypothesis import given, settings
from hypothesis import strategies as st

from fanmark.loadgen.amplification import Counted, amplification
from fanmark.loadgen.records import Window
from fanmark.loadgen.reduced import reduced
from fanmark.loadgen.statistics import by_batches, by_repeats
from fanmark.loadgen.steadiness import judge

BUSY, SERVERS, SEEDS = 0.7, 4, 40


@pytest.fixture(scope="module")
def true() -> tuple[float, float]:
    """The ratio of the mean latencies in the long run, and the longer one's p90."""
    return truth(BUSY, SERVERS, 20_000.0)


def ratio(arms: list[Counted], *, interleaved: bool = True) -> dict[str, float | str | None]:
    found = amplification(arms[0], arms[1], "latency_s", 7, interleaved=interleaved)
    assert found is not None
    return found


@pytest.mark.parametrize(("windows", "repeats", "method"), [(30, 1, " batch means"), (16, 5, "t over 5 repeats")])
def test_intervals_of_times_hold_the_truth_about_as_often_as_they_say(
    true: tuple[float, float], windows: int, repeats: int, method: str
) -> None:
    held = []
    for seed in range(SEEDS):
        found = ratio(counted(str(seed), BUSY, SERVERS, 2 * true[1], windows * true[1], repeats))
        if found["low"] is not None:
            assert method in str(found["method"])
            held.append(found["low"] <= true[0] <= found["high"])  # type: ignore[operator]
    assert len(held) >= 30  # the others look as if they were over capacity, or too short for their latencies
    assert sum(held) >= 0.85 * len(held)  # at 95 % one run in 1,500 holds fewer of 40


def test_a_bootstrap_over_queries_and_batches_of_arms_apart_give_no_interval_of_times(
    true: tuple[float, float],
) -> None:
    short = counted("1", 0.3, 16, 20.0, 12 * true[1])
    assert ratio(short)["low"] is None and ratio(short)["method"] == "one short run, no interval"
    long = counted("1", 0.3, 16, 20.0, 40 * true[1])
    assert ratio(long)["low"] is not None
    assert ratio(long, interleaved=False)["method"] == "one short run, no interval"


def test_short_repeats_give_no_interval_of_times(true: tuple[float, float]) -> None:
    found = ratio(counted("1", 0.3, 16, 20.0, 6 * true[1], repeats=6))
    assert found["ratio"] is not None and found["low"] is None
    assert found["method"] == "repeats of less than 12 x the p90 query latency, no interval"


@pytest.mark.parametrize("busy", [1.3, 2.0, 4.0])
def test_past_its_capacity_a_queue_is_called_so_every_time(busy: float) -> None:
    for seed in range(20):
        arms = counted(str(seed), busy, 4, 15.0, 60.0 / busy)
        assert all(arm.over_capacity for arm in arms)
        assert ratio(arms)["ratio"] is None


def test_a_queue_that_keeps_up_is_not_called_over_capacity() -> None:
    assert sum(arm.over_capacity for seed in range(20) for arm in counted(str(seed), 0.5, 8, 20.0, 60.0)) == 0


def test_a_window_shorter_than_its_lead_in_is_never_steady() -> None:
    for seed in range(20):
        found = crowd(str(seed), 0.3, 16, 60.0, 59.0)
        window = Window(repeat=1, arms=["single"], lead_in_at=0.0, start_at=60.0, end_at=119.0)
        mine = reduced(found["single"])
        verdict = judge(mine.queries, mine.queries, mine.calls, window, open_loop=True)
        assert verdict.steady is False and "is shorter than its lead-in (60 s)" in verdict.reason


values = st.lists(st.floats(0.1, 100), min_size=20, max_size=60)


@settings(max_examples=40)
@given(values, st.floats(0.1, 50), st.integers(2, 10))
def test_batches_in_which_one_arm_is_a_multiple_of_the_other_leave_no_width(
    base: list[float], factor: float, count: int
) -> None:
    batched = {i: (i % count, value) for i, value in enumerate(base)}
    own = {i: (batch, factor * value) for i, (batch, value) in batched.items()}
    low, high = by_batches(own, batched, count)
    assert (low, high) == pytest.approx((factor, factor), rel=1e-5)


@settings(max_examples=40)
@given(values, values, st.integers(2, 10), st.floats(0.1, 10))
def test_intervals_by_batches_scale_with_the_ratio(
    own: list[float], base: list[float], count: int, factor: float
) -> None:
    batched = [{i: (i * count // len(arm), value) for i, value in enumerate(arm)} for arm in (own, base)]
    low, high = by_batches(batched[0], batched[1], count)
    middle = (sum(own) / len(own)) / (sum(base) / len(base))
    assert low <= middle * (1 + 1e-9) and middle <= high * (1 + 1e-9)
    assert math.sqrt(low * high) == pytest.approx(middle)
    scaled = {i: (batch, factor * value) for i, (batch, value) in batched[0].items()}
    assert by_batches(scaled, batched[1], count) == pytest.approx((factor * low, factor * high))


def test_by_repeats_on_paper() -> None:
    # logarithms of the ratios: 0, ln 2, ln 4; standard error ln 2 / sqrt(3), t of 2 degrees of freedom 4.302653; about the ratio of all
    low, high = by_repeats([1.0, 2.0, 4.0], [1.0, 1.0, 1.0], 3.0)
    half = 4.302653 * math.log(2) / math.sqrt(3)
    assert (low, high) == pytest.approx((3 * math.exp(-half), 3 * math.exp(half)), rel=1e-6)


def test_by_batches_on_paper() -> None:
    """Two queries in each of two batches, of one arm 1 and 3 against 2 and 2, of the other always 2. Of x the sums by batch are 0: all
    that is left is what independent queries would have, four times 1/4 over 16."""
    own = {0: (0, 1.0), 1: (0, 3.0), 2: (1, 3.0), 3: (1, 1.0)}
    base = {10 + i: (i // 2, 2.0) for i in range(4)}
    low, high = by_batches(own, base, 2)
    half = 1.959964 * math.sqrt(4 * 0.25 / 16)
    assert (low, high) == pytest.approx((math.exp(-half), math.exp(half)), rel=1e-6)
    # and where the batches differ, their sums: 1/2 more in one, 1/2 less in the other, each over 2; times 2 / 1
    own = {0: (0, 3.0), 1: (0, 3.0), 2: (1, 1.0), 3: (1, 1.0)}
    low, high = by_batches(own, base, 2)
    half = 12.706205 * math.sqrt((0.25**2 + 0.25**2) * 2)
    assert (low, high) == pytest.approx((math.exp(-half), math.exp(half)), rel=1e-6)
