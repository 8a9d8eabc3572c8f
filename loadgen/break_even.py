"""At which fan-out a cheaper model stops being cheaper: net demand along a key of the scenario, in virtual time.

Rules of the file:
1. All is in capacity seconds (capacity_seconds.py): replica time of a query where the replica is as full as the objective allows. The
   objective is the same on both profiles, so the batches differ.
2. F, the multiplier, is the arm's capacity seconds on the new profile over the baseline's there. e, the efficiency, is the baseline's
   capacity seconds on the old profile over those on the new. Net demand D = F / e is what a query of the arm takes on the new, of what a
   single pass took on the old: above 1 the new needs more machines than the old did, for as many questions. A replica of either is one.
3. Each value is looked at with several seeds; D is their geometric mean, its 95 % interval Student's t over the seeds' logarithms.
4. Where D crosses 1 is told by crossing.py: between two values looked at, in an interval that ends with the nearest that are clear of 1.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import msgspec

from fanmark.agents.runtime import Topology
from fanmark.loadgen import crossing
from fanmark.loadgen.capacity_seconds import capacity
from fanmark.loadgen.errors import ScenarioError
from fanmark.loadgen.ranges import Axis
from fanmark.loadgen.scenario import Scenario
from fanmark.loadgen.simulate import with_profile
from fanmark.loadgen.statistics import by_repeats
from fanmark.loadgen.table import columns, number, ratio

SCHEMA = "fanmark.break-even/1"
SUB_QUERIES = (10.0, 50.0)  # the fan-out that is claimed of tool-using agents
_WANTED = crossing.Wanted("net demand in 0..1", ("net_demand",), 0.0, 1.0)
_WITHIN = 0.15  # how near the values on either side of a crossing are to be
Found = dict[str, Any]


@dataclass(frozen=True)
class Demand:
    """At one value of the key; the ratios are geometric means over the seeds, `low` and `high` of D."""

    x: float
    multiplier: float
    efficiency: float
    demand: float
    low: float | None
    high: float | None


def demand(x: float, arm: Sequence[float], base: Sequence[float], old: Sequence[float]) -> Demand:
    """By capacity seconds, one of each seed: the arm's and the baseline's on the new profile, and the baseline's on the old."""
    middle = _mean_ratio(arm, old)
    ends = by_repeats(arm, old, middle) if len(arm) > 1 else (None, None)
    return Demand(x, _mean_ratio(arm, base), _mean_ratio(old, base), middle, *ends)


def _mean_ratio(over: Sequence[float], under: Sequence[float]) -> float:
    return math.exp(fmean(math.log(a / b) for a, b in zip(over, under, strict=True)))


def simulated(scenarios: Callable[[float | int], Scenario], topologies: Mapping[str, Topology]) -> Callable[..., float]:
    """Capacity seconds of (x, profile, arm, seed) by simulation, each once; the baseline's do not depend on x. Raises ScenarioError where
    not even one query at a time meets the objective."""
    known: dict[tuple[Any, ...], float] = {}

    def seconds(x: float | int, profile: str, arm: str, seed: int) -> float:
        scenario = scenarios(x)
        key = (None if arm == scenario.baseline.name else x, profile, arm, seed)
        if key not in known:
            seeded = msgspec.structs.replace(scenario, seed=scenario.seed + seed)
            look = capacity(with_profile(seeded, profile), topologies, arm)
            if look is None or look.capacity_s is None:
                raise ScenarioError(
                    f"{scenario.source}: {arm} on {profile} at {x:g}: not even one query at a time meets the objective: give it more time"
                )
            known[key] = look.capacity_s
        return known[key]

    return seconds


def break_even(
    axis: Axis,
    arm: str,
    baseline: str,
    profiles: tuple[str, str],
    seeds: int,
    seconds: Callable[..., float],
    told: Callable[[Demand], None] = lambda _: None,
) -> Found:
    """break-even.json: net demand along the axis, from the old profile to the new, and where it crosses 1. `told` hears of each point."""
    old, new = profiles
    points: list[Demand] = []
    at: list[crossing.At] = []
    while xs := crossing.next_values(_WANTED, axis, at, _WITHIN):
        for x in xs:
            of = [
                [seconds(x, *what, seed) for seed in range(seeds)]
                for what in ((new, arm), (new, baseline), (old, baseline))
            ]
            points.append(demand(x, *of))
            at.append(crossing.At(x, points[-1].demand, points[-1].low, points[-1].high))
            told(points[-1])
    points.sort(key=lambda point: point.x)
    return {
        "schema": SCHEMA,
        "kind": "simulated",
        "key": axis.key,
        "arm": arm,
        "baseline": baseline,
        "old": old,
        "new": new,
        "seeds": seeds,
        "points": [vars(point) for point in points],
        "crossings": crossing.found(_WANTED, at)["crossings"],
    }


def lines(found: Mapping[str, Any]) -> list[str]:
    """The answer, and the points."""
    rows = [[found["key"], "F: times the work", "e: times as efficient", "D: net demand (95 %)"]]
    for point in found["points"]:
        rows.append([number(point["x"]), f"{point['multiplier']:.2f}x", f"{point['efficiency']:.2f}x", _shown(point)])
    return [*answer(found), "", *columns(rows)]


def answer(found: Mapping[str, Any]) -> list[str]:
    """Where it stops paying, in words."""
    first, last = found["points"][0], found["points"][-1]
    said = []
    for each in found["crossings"]:
        a, b = each["between"]
        ends = each["interval"] and [("?" if end is None else number(end)) for end in each["interval"]]
        interval = f"; 95 % interval {ends[0]} to {ends[1]}" if ends else ""
        word = "stops paying" if each["rising"] else "begins to pay"
        said.append(
            f"{found['new']} in place of {found['old']} {word} at {found['key']} = {number(each['x'])} "
            f"(between {number(a)} and {number(b)}{interval})"
        )
    if not said:
        more = "more" if first["demand"] > 1 else "less"
        said = [
            f"{found['new']} takes {more} than {found['old']} did for a single pass, from {found['key']} = {number(first['x'])} "
            f"to {number(last['x'])}"
        ]
    return [
        *said,
        f"at {found['key']} = {number(last['x'])} one {found['arm']} query takes {_shown(last)} of what a '{found['baseline']}' query took",
    ]


def _shown(point: Mapping[str, Any]) -> str:
    return ratio({"ratio": point["demand"], "low": point["low"], "high": point["high"]})
