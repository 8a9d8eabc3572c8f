"""The search for where an attainment meets its target, against truths that are known."""

import math
import random
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fanmark.loadgen.search import Ask, Bracket, Point, Search, bracket, first_look, next_ask, pooled
from fanmark.loadgen.statistics import wilson

RATES = Search(low=1.0, high=64.0, target=0.95)
REPLICAS = Search(low=1, high=64, target=0.95, seeks="least", integer=True, within=0.0)


def found(
    search: Search, attainment: Callable[[float], float], rng: random.Random | None = None
) -> tuple[Bracket, list[Point]]:
    """Carries a search out on a system whose true attainment is known; without `rng` each look finds just that."""
    points: list[Point] = []
    while (ask := next_ask(search, points)) is not None:
        assert len(points) < 200
        share = attainment(ask.x)
        good = round(share * ask.queries) if rng is None else sum(rng.random() < share for _ in range(ask.queries))
        points.append(Point(ask.x, ask.queries, good))
    return bracket(search, pooled(points)), points


@given(st.floats(1.0, 64.0))
def test_of_a_step_the_bracket_is_about_it(edge: float) -> None:
    got, points = found(RATES, lambda x: 1.0 if x <= edge else 0.5)
    assert got.low is not None and got.low <= edge
    if got.high is None:
        assert got.low == 64.0
    else:
        assert edge < got.high <= got.low * 1.05
    ends = [end for end in (got.low, got.high) if end is not None]
    assert len(points) <= 16 and len(points) - len({p.x for p in points}) == len(
        ends
    )  # only the ends were looked at twice


@given(st.integers(1, 80))
def test_the_least_number_is_found_exactly(least: int) -> None:
    got, points = found(REPLICAS, lambda n: 1.0 if n >= least else 0.2)
    assert got == Bracket(least - 1 if least > 1 else None, least) if least <= 64 else Bracket(64, None)
    assert len({point.x for point in points}) <= 14 and len(points) <= 16


@pytest.mark.parametrize("seeks", ["highest", "least"])
def test_noise_moves_the_bracket_seldom(seeks: str) -> None:
    """A logistic truth. Of 200 searches the bracket, widened by what is left undecided about it, misses the truth in few."""
    sign, truth, held, widths = -1 if seeks == "highest" else 1, 9.0, 0, []
    search = replace(RATES, seeks=seeks)  # type: ignore[arg-type]
    offset = math.log(0.95 / 0.05)
    for seed in range(200):
        curve = lambda x: 1 / (1 + math.exp(-(offset + sign * 6 * math.log(x / truth))))  # noqa: E731
        got, points = found(search, curve, random.Random(seed))
        assert got.low is not None and got.high is not None
        held += got.low <= truth <= got.high
        widths.append(got.high / got.low)
        assert all(p.looks <= search.most and p.queries <= 8 * search.first for p in pooled(points))
    assert curve(truth) == pytest.approx(0.95)
    assert held >= 180
    assert 1.05 < sorted(widths)[100] < 1.6


@given(st.integers(0, 2**32), st.floats(1.0, 64.0), st.sampled_from([RATES, REPLICAS]))
def test_a_search_goes_on_from_any_place(seed: int, truth: float, search: Search) -> None:
    """What is asked next follows from the points alone, in whatever order they are read."""
    sign = -1 if search.seeks == "highest" else 1
    _, points = found(search, lambda x: 1 / (1 + math.exp(-sign * 4 * math.log(x / truth) - 3)), random.Random(seed))
    rng = random.Random(seed)
    for i, point in enumerate(points):
        before = points[:i]
        rng.shuffle(before)
        ask = next_ask(search, before)
        assert ask is not None and (ask.x, ask.queries) == (point.x, point.queries)
        assert search.low <= ask.x <= search.high and (not search.integer or ask.x == int(ask.x))


@pytest.mark.parametrize("queries, good", [(72, 72), (73, 73), (110, 109), (110, 108), (880, 846), (100, 90), (0, 0)])
def test_a_verdict_needs_the_whole_interval(queries: int, good: int) -> None:
    low, high = wilson(good, queries)
    expected = "pass" if low > 0.95 else "fail" if high < 0.95 else "undecided"
    assert Point(1.0, queries, good).verdict(0.95) == expected
    assert Point(1.0, queries, queries, refused=True).verdict(0.95) == "fail"


@given(st.floats(0.5, 0.999))
def test_a_first_look_can_pass(target: float) -> None:
    n = first_look(target)
    assert Point(1.0, n, n).verdict(target) == "pass"
    assert Point(1.0, n // 2, n // 2).verdict(target) == "undecided"


def test_an_undecided_point_is_looked_at_so_often_and_no_more() -> None:
    search = replace(RATES, low=2.0, high=2.0, most=5)
    points = []
    for expected in (110, 110, 220, 440, 880):
        ask = next_ask(search, points)
        assert ask == Ask(2.0, expected)
        points.append(Point(2.0, expected, round(0.95 * expected)))
    assert next_ask(search, points) is None
    assert bracket(search, pooled(points)) == Bracket(None, None, (2.0,))


def test_what_failed_counts_where_chance_contradicts() -> None:
    passed, failed = Point(8.0, 110, 110), Point(4.0, 110, 50)
    assert bracket(RATES, [Point(2.0, 110, 110), failed, passed]) == Bracket(2.0, 4.0, (), (8.0,))
    least = replace(RATES, seeks="least")
    assert bracket(least, [Point(2.0, 110, 110), failed, passed]) == Bracket(4.0, 8.0, (), (2.0,))


def test_beyond_the_range_an_end_is_not_known() -> None:
    assert found(RATES, lambda x: 1.0)[0] == Bracket(64.0, None)
    assert found(RATES, lambda x: 0.0) == (Bracket(None, 1.0), [Point(1.0, 110, 0)] * 2)
    assert found(REPLICAS, lambda n: 0.0)[0] == Bracket(64, None)
    assert found(REPLICAS, lambda n: 1.0)[0] == Bracket(None, 1)
