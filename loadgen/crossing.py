"""Where a figure of the summary crosses a bound as a key of the scenario changes: `--find "FIGURE in A..B" --over KEY=LO:HI`. Pure.

Rules of the file:
1. A few values are looked at first, evenly by factors. Between two neighbours on either side of a bound the middle is looked at, until
   they are near enough to each other. What crosses twice between two neighbours is not seen.
2. A crossing is told between the two, interpolated. Its interval reaches from the nearest point before it whose own interval is clear of
   the bound to the nearest such behind it.
3. What is not known at a point is on no side of a bound.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from fanmark.loadgen.errors import ScenarioError
from fanmark.loadgen.ranges import FEW, Axis, spaced
from fanmark.loadgen.search import between
from fanmark.loadgen.table import number
from fanmark.loadgen.thresholds import Place, check_metric, place_of

_FORM = re.compile(r"(\S+)\s+in\s+([+-]?[\d.]+?(?:[eE][+-]?\d+)?)\s*\.\.\s*([+-]?[\d.]+(?:[eE][+-]?\d+)?)")
_ENDS = {"amplification": "ratio", "per_query": "mean", "per_call": "mean"}
Found = dict[str, Any]


@dataclass(frozen=True)
class Wanted:
    """--find, taken apart."""

    text: str
    place: Place
    low: float
    high: float


@dataclass(frozen=True)
class At:
    """The figure at x, with its interval where it has one."""

    x: float
    value: float | None
    low: float | None = None
    high: float | None = None


def wanted_of(text: str, arms: Sequence[str]) -> Wanted:
    """Raises ScenarioError where it is no figure of the summary, or no range."""
    found = _FORM.fullmatch(text.strip())
    where = f"--find {text!r}"
    if found is None:
        raise ScenarioError(
            f"{where}: must be FIGURE in A..B, such as 'debate.amplification.output_tokens in 1.5..2.5'"
        )
    try:
        low, high = float(found[2]), float(found[3])
    except ValueError:
        raise ScenarioError(f"{where}: {found[2]}..{found[3]} are no two numbers") from None
    if not low < high:
        raise ScenarioError(f"{where}: nothing is between {low:g} and {high:g}: give the lower bound first")
    place = place_of(found[1], arms)
    if place[0] == "arms" and len(place) == 4 and place[2] in _ENDS:
        place = (*place, _ENDS[place[2]])
    check_metric(place, arms, where)
    return Wanted(text, place, low, high)


def read(wanted: Wanted, x: float, summary: Mapping[str, Any]) -> At:
    """The figure in a run's summary."""
    value: Any = summary
    beside: Mapping[str, Any] = {}
    for key in wanted.place:
        beside = value if isinstance(value, dict) else {}
        value = beside.get(key)
    known = isinstance(value, int | float) and not isinstance(value, bool)
    bounds = (beside.get("low"), beside.get("high")) if wanted.place[-1] in ("ratio", "attainment") else (None, None)
    return At(x, value if known else None, *bounds)


def next_values(wanted: Wanted, axis: Axis, points: Sequence[At], within: float) -> list[float | int]:
    """What is looked at next, in any order; none where all crossings are known well enough."""
    seen = {point.x for point in points}
    first = [value for value in axis.values or spaced(axis.low, axis.high, FEW, axis.integer) if value not in seen]
    if first or axis.values is not None:
        return first
    middles = [
        between(a.x, b.x, within, integer=axis.integer)
        for a, b in pairwise(sorted(points, key=lambda point: point.x))
        if any(_crosses(a, b, bound) for bound in (wanted.low, wanted.high))
    ]
    return [int(middle) if axis.integer else middle for middle in middles if middle is not None]


def _crosses(a: At, b: At, bound: float) -> bool:
    return a.value is not None and b.value is not None and (a.value < bound) != (b.value < bound)


def found(wanted: Wanted, points: Sequence[At]) -> Found:
    """`find` of sweep.json: the points, the crossings, and where the figure is in the range."""
    ordered = sorted(points, key=lambda point: point.x)
    crossings = [
        _crossing(ordered, i, bound)
        for i, (a, b) in enumerate(pairwise(ordered))
        for bound in (wanted.low, wanted.high)
        if _crosses(a, b, bound)
    ]
    edges = [ordered[0].x, *sorted(each["x"] for each in crossings), ordered[-1].x]
    inside: list[list[float]] = []
    for a, b in pairwise(edges):
        middle = _value_at(ordered, (a + b) / 2)
        if middle is not None and wanted.low <= middle < wanted.high:
            if inside and inside[-1][1] == a:
                inside[-1][1] = b
            else:
                inside.append([a, b])
    return {
        "text": wanted.text,
        "figure": ".".join(wanted.place[1:] if wanted.place[0] == "arms" else wanted.place),
        "low": wanted.low,
        "high": wanted.high,
        "points": [vars(point) for point in ordered],
        "crossings": crossings,
        "inside": inside,
    }


def _crossing(points: Sequence[At], i: int, bound: float) -> Found:
    a, b = points[i], points[i + 1]
    assert a.value is not None and b.value is not None
    before = [p.x for p in points[: i + 1] if _clear(p, bound)]
    behind = [p.x for p in points[i + 1 :] if _clear(p, bound)]
    known = a.low is not None and b.low is not None
    return {
        "bound": bound,
        "x": a.x + (b.x - a.x) * (bound - a.value) / (b.value - a.value),
        "between": [a.x, b.x],
        "interval": [before[-1] if before else None, behind[0] if behind else None] if known else None,
        "rising": b.value > a.value,
    }


def _clear(point: At, bound: float) -> bool:
    return point.low is not None and point.high is not None and not point.low <= bound <= point.high


def _value_at(points: Sequence[At], x: float) -> float | None:
    """Interpolated between the two points about x."""
    for a, b in pairwise(points):
        if a.x <= x <= b.x and a.value is not None and b.value is not None:
            return a.value + (b.value - a.value) * (x - a.x) / (b.x - a.x)
    return None


def lines(find: Found, axis: Mapping[str, Any]) -> list[str]:
    """The answer, and each crossing."""
    key, over = axis["key"], f"{number(axis['low'])} to {number(axis['high'])}"
    ranges = " and ".join(f"{number(a)} to {number(b)}" for a, b in find["inside"])
    bounds = f"{find['low']:g}..{find['high']:g}"
    if ranges:
        said = [f"{find['figure']} is in {bounds} where {key} is {ranges} ({over} was looked at)"]
    else:
        said = [f"{find['figure']} is nowhere in {bounds} where {key} is {over}"]
    for each in find["crossings"]:
        interval = ""
        if each["interval"] is not None:
            ends = ("?" if end is None else number(end) for end in each["interval"])
            interval = f"; 95 % interval {' to '.join(ends)}"
        a, b = each["between"]
        said.append(
            f"  {'rises' if each['rising'] else 'falls'} through {each['bound']:g} at {key} = {number(each['x'])} "
            f"(between {number(a)} and {number(b)}{interval})"
        )
    return said
