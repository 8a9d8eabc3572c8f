"""Where a share that is only known by counting meets its target: the highest x at which it does, or the least. Pure.

Rules of the file:
1. The attainment falls as x rises, and the highest x is sought ("highest": a load), or it rises, and the least is ("least": replicas).
2. A point passes when the lower 95 % bound (Wilson) of its attainment is above the target, and fails when the upper one is below it.
   Else it is undecided, and is looked at again, `most` times at the most. Near the knee queries miss their deadline in bursts: where
   parts of a measurement differ by more than independent queries would, the interval is that of as many fewer.
3. The search knows nothing but the points measured so far: the same points, the same next step. So a search that was cut short goes on from
   the points that it has left.
4. The answer is a bracket, of the last x on one side and the first on the other. Where an end of it is not known, it is beyond the range.
   Where chance has it that a point passes beyond one that failed, the one that failed counts.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from fanmark.loadgen.statistics import Z_95, wilson

Verdict = Literal["pass", "fail", "undecided"]

_AHEAD = 1 + 3 + 9  # looks of which is thought what they may show: three deep


@dataclass(frozen=True)
class Search:
    """What is sought between `low` and `high`, both above 0. It ends where the bracket's ends are no further apart than by `within` of the
    lower one (whole numbers: or by 1), and each end was looked at `looks` times, for one stretch of luck may pass for a state. A point is
    looked at with `first` queries, and again with as many as it has had so far, up to `most` looks."""

    low: float
    high: float
    target: float
    seeks: Literal["highest", "least"] = "highest"
    integer: bool = False
    within: float = 0.05
    first: int = 110
    looks: int = 2
    most: int = 4


@dataclass(frozen=True)
class Point:
    """What was counted at x, in so many looks. `refused`: it fails whatever was counted (over capacity: it is worse the longer it lasts).
    `parts`: queries and good ones of stretches of time, by which it is seen how much they come in bursts."""

    x: float
    queries: int
    good: int
    refused: bool = False
    parts: tuple[tuple[int, int], ...] = ()
    looks: int = 1

    @property
    def attainment(self) -> float | None:
        return self.good / self.queries if self.queries else None

    @property
    def band(self) -> tuple[float, float]:
        """95 % interval of the attainment."""
        effect = burstiness(self.parts)
        return wilson(self.good / effect, self.queries / effect)

    def verdict(self, target: float) -> Verdict:
        low, high = self.band
        if self.refused or high < target:
            return "fail"
        return "pass" if low > target else "undecided"


@dataclass(frozen=True)
class Ask:
    """The next step: so many queries more at x."""

    x: float
    queries: int


@dataclass(frozen=True)
class Bracket:
    """The answer lies between `low` and `high`; None: beyond the end of the range. `undecided` lie within. `against`: points whose verdict
    chance has turned, so that it does not count."""

    low: float | None
    high: float | None
    undecided: tuple[float, ...] = ()
    against: tuple[float, ...] = ()


def first_look(target: float) -> int:
    """As many queries as are needed for a pass where all are good, and half as many again, so that one in a hundred may be missed."""
    return math.ceil(1.5 * (math.floor(Z_95**2 * target / (1 - target)) + 1))


def burstiness(parts: Sequence[tuple[int, int]]) -> float:
    """How many times the parts' shares vary as much as independent queries' would (the heterogeneity of a binomial: chi square over its
    degrees of freedom); at least 1."""
    known = [(n, good) for n, good in parts if n]
    n, good = sum(part[0] for part in known), sum(part[1] for part in known)
    if len(known) < 2 or good in (0, n):
        return 1.0
    share = good / n
    chi_square = sum((mine - k * share) ** 2 / k for k, mine in known) / (share * (1 - share))
    return max(1.0, chi_square / (len(known) - 1))


def pooled(points: Iterable[Point]) -> list[Point]:
    """What was measured at one x in one point, in the order of x."""
    found: dict[float, Point] = {}
    for point in points:
        before = found.get(point.x, Point(point.x, 0, 0, looks=0))
        found[point.x] = Point(
            point.x,
            before.queries + point.queries,
            before.good + point.good,
            before.refused or point.refused,
            before.parts + point.parts,
            before.looks + point.looks,
        )
    return [found[x] for x in sorted(found)]


def next_ask(search: Search, points: Iterable[Point]) -> Ask | None:
    """The next step of the search; None where it has ended."""
    seen = {point.x: point for point in pooled(points)}
    for point in seen.values():
        if point.verdict(search.target) == "undecided" and point.looks < search.most:
            return Ask(point.x, max(search.first, point.queries))
    if search.low not in seen:
        return Ask(search.low, search.first)
    found, top = bracket(search, list(seen.values())), max(seen)
    if found.high is None and top < search.high:
        return Ask(min(2 * top, search.high), search.first)
    ends = [found.low, *found.undecided[:1], *found.undecided[-1:], found.high]
    for a, b in ((ends[0], ends[1]), (ends[-2], ends[-1])):
        if a is not None and b is not None and (x := between(a, b, search.within, integer=search.integer)) is not None:
            return Ask(x, search.first)
    for end in (found.low, found.high):
        if end is not None and seen[end].looks < search.looks:
            return Ask(end, search.first)
    return None


def may_follow(
    next_: Callable[[Sequence[Point]], Ask | None], points: Sequence[Point], ask: Ask, target: float
) -> Iterator[tuple[Ask, int]]:
    """What a search may ask for after this, whatever it shows, and after that; each with how many looks there have been at its x. The
    nearest first, and before what passes or fails what stays undecided, which is looked at again where it is."""
    ways = deque([([*points], ask)])
    for _ in range(_AHEAD):
        if not ways:
            return
        seen, ask = ways.popleft()
        for good in (round(target * ask.queries), ask.queries, 0):
            after = [*seen, Point(ask.x, ask.queries, good, refused=good == 0)]
            if (then := next_(after)) is not None:
                yield then, sum(point.x == then.x for point in after)
                ways.append((after, then))


def bracket(search: Search, points: Sequence[Point]) -> Bracket:
    """What the points, one at each x, say so far."""
    by_verdict: dict[Verdict, list[float]] = {"pass": [], "fail": [], "undecided": []}
    for point in points:
        by_verdict[point.verdict(search.target)].append(point.x)
    passed, failed = by_verdict["pass"], by_verdict["fail"]
    if search.seeks == "highest":
        high = min(failed, default=None)
        low = max((x for x in passed if high is None or x < high), default=None)
        against = [x for x in passed if high is not None and x > high]
    else:
        low = max(failed, default=None)
        high = min((x for x in passed if low is None or x > low), default=None)
        against = [x for x in passed if low is not None and x < low]
    inside = [x for x in by_verdict["undecided"] if (low is None or x > low) and (high is None or x < high)]
    return Bracket(low, high, tuple(sorted(inside)), tuple(sorted(against)))


def between(a: float, b: float, within: float, *, integer: bool) -> float | None:
    """The middle by factor (from 0 or below, by steps), to three figures; None where the two are near enough."""
    if b - a <= within * max(abs(a), abs(b) if a <= 0 else 0.0) or (integer and b - a <= 1):
        return None
    middle = math.sqrt(a * b) if a > 0 else (a + b) / 2
    if integer:
        return float(min(max(round(middle), a + 1), b - 1))
    rounded = float(f"{middle:.3g}")
    return rounded if a < rounded < b else middle
