"""Pacing: constant to within one, Poisson by its mean and dispersion on fixed seeds, the same times for the same seed."""

import random
from itertools import islice, pairwise, takewhile
from statistics import fmean, pvariance

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fanmark.loadgen.arrivals import constant, open_loop, poisson
from fanmark.loadgen.scenario import Load


@given(st.floats(0.01, 1000), st.floats(0, 0.999), st.floats(0, 1))
def test_constant_arrivals_are_within_one_of_rate_times_time(rate: float, phase: float, part: float) -> None:
    at = part * 300 / rate
    arrived = sum(1 for _ in takewhile(lambda due: due < at, constant(rate, phase)))
    assert abs(arrived - rate * at) <= 1 + 1e-9


def test_constant_arrivals_do_not_drift() -> None:
    assert list(islice(constant(4, 0.5), 4)) == [0.125, 0.375, 0.625, 0.875]
    assert next(islice(constant(0.1), 100_000, None)) == pytest.approx(1e6, rel=1e-12)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_poisson_arrivals_have_the_mean_and_the_spread_of_poisson(seed: int) -> None:
    rate, seconds = 5.0, 4000
    times = list(takewhile(lambda at: at < seconds, poisson(rate, random.Random(seed))))
    assert len(times) == pytest.approx(rate * seconds, abs=4 * (rate * seconds) ** 0.5)  # 4 standard deviations
    per_second = [0] * seconds
    for at in times:
        per_second[int(at)] += 1
    assert pvariance(per_second) / fmean(per_second) == pytest.approx(1.0, abs=0.09)  # 4 sd of the index of dispersion
    gaps = [b - a for a, b in pairwise(times)]
    assert pvariance(gaps) ** 0.5 / fmean(gaps) == pytest.approx(1.0, abs=0.03)
    after = [b for a, b in pairwise(gaps) if a > 0.4]  # no memory: long gaps say nothing of the next
    assert fmean(after) == pytest.approx(1 / rate, rel=0.08)


def test_the_first_poisson_arrival_waits_too() -> None:
    firsts = [next(poisson(2.0, random.Random(seed))) for seed in range(2000)]
    assert fmean(firsts) == pytest.approx(0.5, rel=0.08)


def test_the_same_seed_gives_the_same_times_and_each_arm_draws_its_own() -> None:
    load = Load(rate=2, queries=50)
    times = list(open_loop(load, 7, "debate", 0.0))
    assert times == list(open_loop(load, 7, "debate", 0.0)) and len(times) == 50
    assert times == sorted(times)
    assert not set(times) & set(open_loop(load, 7, "single", 0.0))
    assert not set(times) & set(open_loop(load, 8, "debate", 0.0))


def test_a_slower_rate_stretches_the_same_times() -> None:
    fast, slow = (list(open_loop(Load(rate=rate, queries=20), 7, "a", 0.0)) for rate in (4, 1))
    assert slow == pytest.approx([4 * at for at in fast])


@pytest.mark.parametrize("process", ["constant", "poisson"])
def test_queries_end_by_number_or_by_time(process: str) -> None:
    by_number = list(open_loop(Load(process=process, rate=3, queries=12), 7, "a", 0.0))  # type: ignore[arg-type]
    by_time = list(open_loop(Load(process=process, rate=3, duration=4.0), 7, "a", 0.0))  # type: ignore[arg-type]
    assert len(by_number) == 12 and max(by_time) < 4.0
    shorter = min(len(by_number), len(by_time))
    assert by_number[:shorter] == by_time[:shorter]
    if process == "constant":
        assert len(by_time) == 12


def test_constant_arrivals_of_several_arms_are_kept_apart() -> None:
    load = Load(process="constant", rate=2, queries=4)
    found = [list(open_loop(load, 7, arm, i / 4)) for i, arm in enumerate("abcd")]
    assert found[0] == [0.0, 0.5, 1.0, 1.5]
    assert sorted(at for times in found for at in times) == [i * 0.125 for i in range(16)]
