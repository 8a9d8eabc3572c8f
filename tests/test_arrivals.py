"""Pacing: constant to within one, Poisson by its mean and dispersion on fixed seeds, the same times for the same seed."""

import random
from itertools import islice, pairwise, takewhile
from statistics import fmean, pvariance

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fanmark.loadgen.arrivals import constant, gamma, open_loop, poisson, staged
from fanmark.loadgen.scenario import Load, Stage


@given(st.floats(0.01, 1000), st.floats(0, 0.999), st.floats(0, 1))
def test_constant_arrivals_are_within_one_of_rate_times_time(rate: float, phase: float, part: float) -> None:
    at = part * 300 / rate
    times = open_loop(Load(process="constant", rate=rate, queries=400), 1, "a", phase)
    arrived = sum(1 for _ in takewhile(lambda due: due < at, times))
    assert abs(arrived - rate * at) <= 1 + 1e-9


def test_constant_arrivals_do_not_drift() -> None:
    assert list(open_loop(Load(process="constant", rate=4, queries=4), 1, "a", 0.5)) == [0.125, 0.375, 0.625, 0.875]
    assert next(islice(constant(), 100_000, None)) == 1e5


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_poisson_arrivals_have_the_mean_and_the_spread_of_poisson(seed: int) -> None:
    rate, seconds = 5.0, 4000
    times = list(takewhile(lambda at: at < seconds, (age / rate for age in poisson(random.Random(seed)))))
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
    firsts = [next(poisson(random.Random(seed))) for seed in range(2000)]
    assert fmean(firsts) == pytest.approx(1.0, rel=0.08)


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


@pytest.mark.parametrize("gap_cv", [0.3, 1.0, 2.0])
def test_gamma_gaps_have_their_mean_and_variation(gap_cv: float) -> None:
    ages = list(islice(gamma(random.Random(5), gap_cv), 40_000))
    gaps = [b - a for a, b in pairwise(ages)]
    assert fmean(gaps) == pytest.approx(1.0, rel=5 * gap_cv / 200)  # 5 standard errors
    assert pvariance(gaps) ** 0.5 / fmean(gaps) == pytest.approx(gap_cv, rel=0.06)


STAGES = [Stage(seconds=10, rate=2.0), Stage(seconds=20, rate=0.0, to=6.0), Stage(seconds=5, rate=6.0, to=1.0)]


def test_stages_have_the_integral_of_their_rate() -> None:
    times = list(open_loop(Load(process="constant", stages=STAGES, duration=35), 1, "a", 0.0))
    assert len(times) == 98  # 20 + 60 + 17.5, the first at 0
    for at, expected in ((10, 20), (20, 20 + 15), (30, 80), (35, 97.5)):  # after 10 s of the ramp: 6 / 20 * 10^2 / 2
        assert abs(sum(t < at for t in times) - expected) <= 1
    assert times == sorted(times) and times[-1] < 35


@given(
    st.lists(
        st.builds(Stage, seconds=st.floats(0.1, 50), rate=st.floats(0.01, 20), to=st.floats(0, 20)),
        min_size=1,
        max_size=5,
    )
)
def test_an_age_is_reached_when_the_rate_has_summed_to_it(stages: list[Stage]) -> None:
    for age, at in zip(constant(0.5), staged(constant(0.5), stages), strict=False):
        left, total = at, 0.0
        for stage in stages:
            t = min(left, stage.seconds)
            to = stage.rate if stage.to is None else stage.to
            total += stage.rate * t + (to - stage.rate) * t * t / (2 * stage.seconds)
            left -= t
        assert total == pytest.approx(age, rel=1e-6, abs=1e-6)


def test_a_replay_starts_where_it_is_told() -> None:
    assert list(open_loop(Load(process="replay", arrivals=[0.0, 0.25, 7.5]), 1, "a", 0.3)) == [0.0, 0.25, 7.5]
