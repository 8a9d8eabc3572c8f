"""Distributions against numpy's, intervals against the truth of synthetic experiments, occupancy against a count."""

import math
import random
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fanmark.loadgen.records import bucket_gap_s, gap_bucket
from fanmark.loadgen.statistics import (
    distribution,
    gap_distribution,
    occupancy,
    paired_ratio,
    ratio_interval,
    wilson,
)

finite = st.floats(-1e9, 1e9)
Q = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


@settings(max_examples=25)
@given(st.one_of(st.lists(finite, min_size=1, max_size=40), st.lists(finite, min_size=299, max_size=320)))
def test_quantiles_are_numpys_and_have_support_or_are_unknown(values: list[float]) -> None:
    found = distribution(values)
    assert found is not None and found["n"] == len(values) and found["max"] == max(values)
    assert found["mean"] == pytest.approx(np.mean(values), rel=1e-9, abs=1e-6)
    for name, support in {"p50": 1, "p90": 29, "p99": 299}.items():
        if len(values) < support:
            assert found[name] is None
        else:
            assert found[name] == pytest.approx(np.quantile(values, Q[name]), rel=1e-9, abs=1e-6)


@pytest.mark.parametrize(
    ("n", "known"), [(1, "p50"), (28, "p50"), (29, "p50 p90"), (298, "p50 p90"), (299, "p50 p90 p99")]
)
def test_a_quantile_needs_its_number_of_samples(n: int, known: str) -> None:
    whole, gaps = distribution([1.0] * n), gap_distribution({0: n})
    for found in (whole, gaps):
        assert found is not None
        assert [name for name in Q if found[name] is not None] == known.split()


def test_nothing_measured_gives_nothing() -> None:
    assert distribution([]) is None and gap_distribution({}) is None and gap_distribution({3: 0}) is None


@settings(max_examples=15)
@given(st.lists(st.floats(1e-5, 100), min_size=300, max_size=400))
def test_pooled_gaps_are_known_to_a_tenth_of_a_percent(gaps_s: list[float]) -> None:
    pooled = Counter(map(gap_bucket, gaps_s))
    found = gap_distribution(pooled)
    assert found is not None and found["n"] == len(gaps_s)
    assert found["mean"] == pytest.approx(math.fsum(gaps_s) / len(gaps_s), rel=0.00101)
    assert found["max"] == pytest.approx(max(gaps_s), rel=0.00101)
    for name, q in Q.items():
        assert found[name] == pytest.approx(np.quantile(gaps_s, q, method="lower"), rel=0.00101)


def test_a_bucket_of_gaps_has_its_middle() -> None:
    assert bucket_gap_s(0) == pytest.approx(1.000999, rel=1e-6)


@settings(max_examples=40)
@given(
    st.dictionaries(st.integers(0, 30), st.integers(1, 10**6), min_size=2, max_size=30),
    st.sampled_from([1, 2, 9, 13]),
    st.integers(0, 2**31),
)
def test_a_constant_ratio_has_no_width(base: dict[int, int], factor: int, seed: int) -> None:
    found = paired_ratio({i: factor * value for i, value in base.items()}, base, seed)
    assert found is not None
    for name in ("ratio", "low", "high"):
        assert found[name] == pytest.approx(factor, rel=1e-12)


def test_counts_that_never_vary_are_exact() -> None:
    found = paired_ratio(dict.fromkeys(range(20), 9), dict.fromkeys(range(20), 1), 7)
    assert found == {"ratio": 9.0, "low": 9.0, "high": 9.0, "method": "paired bootstrap over queries"}


@pytest.mark.parametrize("paired", [True, False])
def test_the_interval_covers_the_truth_as_often_as_it_says(paired: bool) -> None:
    covered, widths = 0, []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        base = rng.lognormal(5, 0.5, 40)
        extra = rng.lognormal(5, 0.5, 40)
        own = 2 * base + extra if paired else 2 * rng.lognormal(5, 0.5, 40) + extra
        found = paired_ratio(dict(enumerate(own)), dict(enumerate(base)), seed)
        assert found is not None and found["low"] <= found["ratio"] <= found["high"]
        covered += found["low"] <= 3.0 <= found["high"]
        widths.append(found["high"] - found["low"])
    assert 0.90 <= covered / 200 <= 0.98
    # what both arms have in common falls out of the interval
    assert np.mean(widths) < 0.65 if paired else np.mean(widths) > 0.75


def test_a_query_that_one_arm_did_not_complete_still_counts_for_the_other() -> None:
    # no number in common: (9 + 7) / 2 against (4 + 4) / 2, from 7 / 4 to 9 / 4
    found = paired_ratio({0: 9.0, 1: 7.0}, {2: 4.0, 3: 4.0}, 7)
    assert found == {"ratio": 2.0, "low": 1.75, "high": 2.25, "method": "paired bootstrap over queries"}
    # ten queries of the arm, a hundred of the baseline: the ratio is of all, and its interval is about it
    rng = np.random.default_rng(5)
    base = dict(enumerate(rng.lognormal(5, 0.5, 100)))
    found = paired_ratio({i: 3 * base[i] for i in range(10)}, base, 7)
    assert found is not None and found["low"] < found["ratio"] < found["high"]
    assert found["ratio"] == pytest.approx(3 * np.mean(list(base.values())[:10]) / np.mean(list(base.values())))


def test_queries_of_a_session_are_resampled_together() -> None:
    """Where the arms' own answers make their contexts grow apart, an interval over queries is far too narrow."""

    def drawn(trial: int) -> tuple[dict[int, float], dict[int, float], dict[int, int]]:
        rng = random.Random(trial)
        own: dict[int, float] = {}
        base: dict[int, float] = {}
        session: dict[int, int] = {}
        for number in range(60):
            told, told_by_base = 0.0, 0.0
            for _ in range(rng.randint(1, 7)):
                i, question = len(own), rng.lognormvariate(5, 0.6)
                own[i], base[i] = 4 * (320 + told + question), 300 + told_by_base + question
                told += question + rng.lognormvariate(5, 1.0)
                told_by_base += question + rng.lognormvariate(4.5, 0.6)
                session[i] = number
        return own, base, session

    many = [drawn(10**6 + i) for i in range(400)]
    truth = sum(sum(own.values()) for own, _, _ in many) / sum(sum(base.values()) for _, base, _ in many)
    hits = [0, 0]
    for trial in range(50):
        own, base, session = drawn(trial)
        for kind, sessions in enumerate(({}, session)):
            found = paired_ratio(own, base, 7, sessions)
            assert found is not None
            hits[kind] += found["low"] <= truth <= found["high"]
    assert hits[0] < 40 and hits[1] >= 43, hits
    few = {i: number % 49 for i, number in session.items()}
    assert paired_ratio(own, base, 7, few) == {
        "ratio": pytest.approx(sum(own.values()) / sum(base.values())),
        "low": None,
        "high": None,
        "method": "fewer than 50 sessions, no interval",
    }


def test_the_interval_is_the_same_for_the_same_seed_and_order_does_not_count() -> None:
    own, base = {i: 10.0 + i % 7 for i in range(30)}, {i: 3.0 + i % 5 for i in range(30)}
    found = paired_ratio(own, base, 7)
    assert found == paired_ratio(dict(reversed(own.items())), base, 7)
    assert found != paired_ratio(own, base, 8)


@pytest.mark.parametrize(
    ("own", "base", "ratio"),
    [
        ({0: 9.0}, {0: 3.0}, 3.0),  # one query each
        ({0: 9.0, 1: 7.0}, {1: 4.0}, 2.0),  # one of the baseline
        ({0: 8.0}, {0: 4.0, 2: 4.0}, 2.0),  # one of the arm
    ],
)
def test_too_few_queries_give_a_ratio_without_an_interval(
    own: dict[int, float], base: dict[int, float], ratio: float
) -> None:
    assert paired_ratio(own, base, 7) == {"ratio": ratio, "low": None, "high": None, "method": "too few queries"}


@pytest.mark.parametrize(
    ("own", "base"),
    [
        ({}, {0: 1.0}),  # an arm that completed nothing
        ({0: 1.0}, {}),
        ({0: 1.0, 1: 2.0}, {0: 0.0, 1: 0.0}),  # a baseline that has none of it, as tool calls
    ],
)
def test_where_there_is_nothing_to_divide_there_is_no_ratio(own: dict[int, float], base: dict[int, float]) -> None:
    assert paired_ratio(own, base, 7) is None


@settings(max_examples=50)
@given(
    st.dictionaries(st.integers(0, 20), st.floats(0, 1e6), max_size=9),
    st.dictionaries(st.integers(0, 20), st.sampled_from([0.0, 0.0, 1.0, 250.0]), max_size=9),
)
def test_no_ratio_is_ever_nan(own: dict[int, float], base: dict[int, float]) -> None:
    found = paired_ratio(own, base, 7)
    if found is not None:
        assert all(found[name] is None or math.isfinite(found[name]) for name in ("ratio", "low", "high"))
        assert (found["low"] is None) == (found["high"] is None)
        assert found["low"] is None or found["low"] <= found["high"]


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        # Newcombe 1998 (Statistics in Medicine 17, table I), score method without correction
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 0.8830, 1.0),
        (0, 0, 0.0, 1.0),
    ],
)
def test_wilson_intervals_of_the_literature(successes: int, n: int, low: float, high: float) -> None:
    assert wilson(successes, n) == pytest.approx((low, high), abs=6e-5)


@given(st.integers(0, 500), st.integers(1, 500))
def test_wilson_intervals_hold_the_share(successes: int, n: int) -> None:
    low, high = wilson(min(successes, n), n)
    assert 0 <= low <= min(successes, n) / n + 1e-12 and min(successes, n) / n - 1e-12 <= high <= 1


spans = st.lists(
    st.tuples(st.integers(0, 40), st.integers(0, 20)).map(lambda at: (at[0] / 4, (at[0] + at[1]) / 4)), max_size=12
)


def by_count(found: Sequence[tuple[float, float]], start_at: float, end_at: float) -> dict[str, float]:
    """Counted in the middle of every eighth of a second: spans begin and end at quarters."""
    moments = [start_at + (i + 0.5) / 8 for i in range(int((end_at - start_at) * 8))]
    open_at = [sum(a <= at < b for a, b in found) for at in moments]
    return {"mean": sum(open_at) / len(open_at), "max": max(open_at)}


@given(spans, st.integers(0, 20), st.integers(1, 30))
def test_occupancy_is_what_a_count_finds(found: list[tuple[float, float]], start: int, length: int) -> None:
    start_at, end_at = start / 4, (start + length) / 4
    measured, counted = occupancy(found, start_at, end_at), by_count(found, start_at, end_at)
    assert measured["mean"] == pytest.approx(counted["mean"])
    assert measured["max"] == counted["max"]


def test_occupancy_of_spans_that_touch() -> None:
    assert occupancy([(0, 1), (1, 2), (2, 4)], 0, 4) == {"mean": 1.0, "max": 1}
    assert occupancy([(0, 4), (1, 2), (1, 2)], 0, 4) == {"mean": 1.5, "max": 3}
    assert occupancy([], 0, 4) == {"mean": 0.0, "max": 0}


def test_the_running_interval_holds_the_truth_in_95_of_100_experiments() -> None:
    """Two independent samples of 20, log-normal, whose means are 3 and 1 by construction."""
    draw, hits, n = np.random.default_rng(5), 0, 20
    for _ in range(1000):
        own, base = (m * draw.lognormal(-0.08, 0.4, n) for m in (3.0, 1.0))
        low, high = ratio_interval(*((n, float(v.sum()), float((v * v).sum())) for v in (own, base)))
        hits += low <= 3.0 <= high
    assert 920 <= hits <= 970  # normal quantiles for 20 values: a little short of 950
