"""`fanmark.sweep/1`: what was counted along an axis, and what follows from it for each arm and each objective. Pure.

Rules of the file:
1. A point's attainment is over all queries that were started at x, of all its runs together. Its goodput is the offered queries/s times
   that.
2. Past its capacity an arm fails an open loop whatever was counted: the longer it lasts, the worse it is. What piles up in a short window
   may be chance: where nothing else fails, a window LONGER times as long must show it too.
3. An arm's capacity is the best goodput of a point that passes. What it might be lies between that point's at the lower bound of its
   attainment and the first load that fails, met as well as that point's upper bound says.
4. The capacity that an arm's query costs is the baseline's capacity over the arm's: how many baseline queries a server could have answered
   instead. Its interval is as wide as both intervals allow.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from fanmark.loadgen.objective import calls_good, in_time
from fanmark.loadgen.records import Query
from fanmark.loadgen.scenario import Objective
from fanmark.loadgen.search import Point, Search, bracket, pooled

SCHEMA = "fanmark.sweep/1"
QUERY, CALL = "query", "call"  # the objectives, by what has the deadline
AMPLIFICATION = {QUERY: "capacity", CALL: "capacity_per_call"}  # `amplification` of an arm in sweep.json
METHOD = "brackets and 95 % bounds"
LONGER = 4
PARTS = 10  # of a run, by which it is seen how much misses come in bursts

_NOT_SOUGHT = dict.fromkeys(("bracket", "knee", "capacity"))

Found = dict[str, Any]


@dataclass(frozen=True)
class Look:
    """What one run counted of one arm at x: by objective which of its queries met it, in the order of their due times."""

    x: float
    run: str
    met: Mapping[str, Sequence[bool]]
    offered_qps: float
    calls_in_flight: float
    over_capacity: bool

    @property
    def queries(self) -> int:
        return len(next(iter(self.met.values())))

    def good(self, objective: str) -> int:
        return sum(self.met[objective])

    def parts(self, objective: str) -> tuple[tuple[int, int], ...]:
        """Queries and good ones of stretches of time with as many queries each."""
        met = self.met[objective]
        edges = [len(met) * i // PARTS for i in range(PARTS + 1)]
        return tuple((b - a, sum(met[a:b])) for a, b in pairwise(edges))


def objectives_of(objective: Objective) -> dict[str, Found]:
    """`objectives` of sweep.json: each with its limits, and its title as it is read after "on"."""
    share = f"at {100 * objective.attainment:g} %"
    limits: Found = {"query_seconds": objective.query_seconds, "attainment": objective.attainment}
    found = {QUERY: {"title": f"the query's deadline of {objective.query_seconds:g} s {share}", **limits}}
    said = [f"first token {objective.ttft_s:g} s"] if objective.ttft_s is not None else []
    said += [f"{objective.tpot_s:g} s a further token"] if objective.tpot_s is not None else []
    if said:
        limits = {"ttft_s": objective.ttft_s, "tpot_s": objective.tpot_s, "attainment": objective.attainment}
        found[CALL] = {"title": f"the per-call objective ({', '.join(said)}, all calls of a query) {share}", **limits}
    return found


def looks_of(
    summary: Mapping[str, Any], queries: Iterable[Query], objective: Objective, x: float, run: str
) -> dict[str, Look]:
    """By arm, from the summary and the queries of the run in the folder `run`."""
    counted: dict[str, list[tuple[int, float, bool, bool]]] = {arm: [] for arm in summary["arms"]}
    for query in queries:
        if not query.warmup:
            good = in_time(query, objective), calls_good(query, objective)
            counted[query.arm].append((query.repeat, query.due_at, *good))
    looks = {}
    for arm, mine in counted.items():
        mine.sort()
        met = {QUERY: [each[2] for each in mine], CALL: [each[3] for each in mine]}
        load = summary["arms"][arm]["load"]
        looks[arm] = Look(
            x=x,
            run=run,
            met={name: met[name] for name in objectives_of(objective)},
            offered_qps=load.get("offered_qps", 0.0),
            calls_in_flight=load.get("calls_in_flight", {"mean": 0.0})["mean"],
            over_capacity=bool(summary["arms"][arm]["window"]["over_capacity"]),
        )
    return looks


def points_of(looks: Iterable[Look], objective: str) -> list[Point]:
    """As the search takes them. Where nothing was even started in a window, it fails."""
    return [
        Point(
            look.x,
            look.queries,
            look.good(objective),
            look.over_capacity or not look.queries,
            look.parts(objective),
        )
        for look in looks
    ]


def along(search: Search, looks: Sequence[Look], objective: str) -> Found:
    """One arm on one objective: points, bracket, knee and capacity (null where a least number is sought)."""
    found = pooled(points_of(looks, objective))
    rows = [_row(point, [look for look in looks if look.x == point.x], search.target) for point in found]
    answer = bracket(search, found)
    passes = answer.low if search.seeks == "highest" else answer.high
    knee = next((row for row in rows if row["x"] == passes), None)
    return {
        "points": rows,
        "bracket": {
            "low": answer.low,
            "high": answer.high,
            "undecided": list(answer.undecided),
            "against": list(answer.against),
        },
        "knee": None if knee is None else {key: knee[key] for key in ("x", "goodput_qps", "attainment")},
        "capacity": _capacity(rows, answer.high) if search.seeks == "highest" else None,
    }


def _row(point: Point, looks: Sequence[Look], target: float) -> Found:
    seconds = [look.queries / look.offered_qps for look in looks if look.offered_qps]
    offered_qps = sum(look.queries for look in looks) / sum(seconds) if seconds else 0.0
    low, high = point.band
    share = sum(look.calls_in_flight * look.queries for look in looks) / point.queries if point.queries else None
    return {
        "x": point.x,
        "queries": point.queries,
        "good": point.good,
        "attainment": point.attainment,
        "low": low,
        "high": high,
        "offered_qps": offered_qps,
        "goodput_qps": offered_qps * (point.attainment or 0.0),
        "calls_in_flight": share,
        "over_capacity": point.refused,
        "verdict": point.verdict(target),
        "runs": [look.run for look in looks],
    }


def _capacity(rows: Sequence[Found], fails_at: float | None) -> Found | None:
    """None where no point passes: it is below the range."""
    passing = [row for row in rows if row["verdict"] == "pass" and (fails_at is None or row["x"] < fails_at)]
    if not passing:
        return None
    best = max(passing, key=lambda row: row["goodput_qps"])
    failing = next((row for row in rows if row["x"] == fails_at), None)
    high = None
    if failing is not None:
        high = max(best["offered_qps"], failing["offered_qps"]) * best["high"]
    return {"qps": best["goodput_qps"], "low": best["offered_qps"] * best["low"], "high": high}


def amplified(own: Found | None, base: Found | None) -> Found:
    """What a query costs of a server's capacity, against the baseline's; a bound that is not known is null."""
    if own is None or base is None:
        return {"ratio": None, "low": None, "high": None, "method": None}
    return {
        "ratio": base["qps"] / own["qps"],
        "low": None if own["high"] is None else base["low"] / own["high"],
        "high": None if base["high"] is None else base["high"] / own["low"],
        "method": METHOD,
    }


def arms_part(
    search: Search,
    looks: Mapping[str, Sequence[Look]],
    objectives: Mapping[str, Any],
    baseline: str,
    *,
    seeks: bool = True,
) -> dict[str, Found]:
    """`arms` of sweep.json: each arm on each objective, and what a query of it costs in capacity. Where nothing is sought there are points
    alone."""
    arms: dict[str, Found] = {
        arm: {"baseline": arm == baseline, "on": {name: along(search, mine, name) for name in objectives}}
        for arm, mine in looks.items()
    }
    for name, arm in arms.items():
        if not seeks:
            arm["on"] = {name: {"points": each["points"], **_NOT_SOUGHT} for name, each in arm["on"].items()}
        arm["amplification"] = {
            AMPLIFICATION[each]: amplified(on["capacity"], arms[baseline]["on"][each]["capacity"])
            for each, on in arm["on"].items()
            if name != baseline
        }
    return arms
