"""Distributions: means, spreads, limits, and the same draw for the same seed."""

import math
import random
import statistics
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fanmark.loadgen.lengths import Dist, draw, draw_int

KINDS = ("constant", "uniform", "exponential", "lognormal", "gamma")


@pytest.mark.parametrize(
    ("dist", "cv", "expected_cv"),
    [
        ("constant", 0.5, 0.0),  # always its mean, whatever cv says
        ("uniform", 0.2, 0.2),
        ("uniform", 0.5, 0.5),
        ("exponential", 0.2, 1.0),  # cv is 1, whatever it says
        ("lognormal", 0.5, 0.5),
        ("lognormal", 1.0, 1.0),
        ("gamma", 0.5, 0.5),
        ("gamma", 2.0, 2.0),
        ("gamma", 0.0, 0.0),
    ],
)
def test_mean_and_spread_are_as_asked(dist: str, cv: float, expected_cv: float) -> None:
    value, rng = Dist(dist, 400, cv), random.Random(5)  # type: ignore[arg-type]
    drawn = [draw(value, rng) for _ in range(20_000)]
    mean = statistics.fmean(drawn)
    assert mean == pytest.approx(400, rel=0.03)
    assert statistics.pstdev(drawn) / mean == pytest.approx(expected_cv, rel=0.06)


def test_the_shapes_tell_apart_what_mean_and_spread_do_not() -> None:
    rng = random.Random(5)
    medians = {
        dist: statistics.median(draw(Dist(dist, 100, 1.0), rng) for _ in range(20_000))
        for dist in ("exponential", "lognormal", "gamma")
    }
    assert medians["exponential"] == pytest.approx(100 * math.log(2), rel=0.04)
    assert medians["lognormal"] == pytest.approx(100 / math.sqrt(2), rel=0.04)  # mean / sqrt(1 + cv^2)
    assert medians["gamma"] == pytest.approx(100 * math.log(2), rel=0.04)  # with cv 1 it is the exponential


@pytest.mark.parametrize("dist", KINDS)
def test_values_are_cut_to_their_limits(dist: str) -> None:
    value = Dist(dist, 400, 2.0, 300, 500)  # type: ignore[arg-type]
    drawn = [draw_int(value, "seed", i) for i in range(500)]
    assert min(drawn) >= 300 and max(drawn) <= 500
    if dist != "constant":
        assert {300, 500} < set(drawn)


@given(
    st.sampled_from(KINDS), st.floats(0, 1e6), st.floats(0, 1000), st.floats(0, 1e3), st.floats(0, 1e6), st.integers()
)
def test_every_draw_is_finite_and_within_limits(
    dist: str, mean: float, cv: float, least: float, spread: float, seed: int
) -> None:
    value = Dist(dist, mean, cv, least, least + spread)  # type: ignore[arg-type]
    assert least <= draw(value, random.Random(seed)) <= least + spread


def test_a_plain_number_is_itself() -> None:
    assert draw(0.25, random.Random(1)) == 0.25
    assert draw_int(7, "any", "seed") == 7


def test_the_same_words_give_the_same_draw_and_others_another() -> None:
    value = Dist("lognormal", 400)
    first = [draw_int(value, 7, i, kind) for i, kind in product(range(20), ("answer", "action"))]
    again = [draw_int(value, 7, i, kind) for i, kind in product(range(20), ("answer", "action"))]
    assert first == again and len(set(first)) > 30
    assert first != [draw_int(value, 8, i, kind) for i, kind in product(range(20), ("answer", "action"))]


def test_a_draw_does_not_hang_on_the_process() -> None:
    # the figures of one seed, so that a journal of today can be repeated tomorrow
    assert [draw_int(Dist("lognormal", 150, 0.4, 40, 400), 7, i, "answer") for i in range(5)] == [
        209,
        280,
        96,
        165,
        146,
    ]


@pytest.mark.parametrize(
    ("mean", "cv", "least", "most"),
    [
        (-1, 0.5, 0, 9),
        (5, -0.5, 0, 9),
        (5, 0.5, -1, 9),
        (5, 0.5, 9, 8),
        (math.inf, 0.5, 0, 9),
        (math.nan, 0.5, 0, 9),
        (5, math.nan, 0, 9),
        (5, 1001, 0, 9),
        (5, 0.5, math.nan, 9),
        (5, 0.5, 0, math.nan),
    ],
)
def test_impossible_distributions_are_refused(mean: float, cv: float, least: float, most: float) -> None:
    with pytest.raises(
        ValueError, match=r"^mean, cv and min must be numbers of at least 0, cv at most 1000, max at least min$"
    ):
        Dist("gamma", mean, cv, least, most)
