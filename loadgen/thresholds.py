"""`[[threshold]]`: limits on figures of summary.json, judged at the run's end, and with `abort` while it goes on. Pure.

Rules of the file:
1. A figure that is not known has not met its threshold.
2. While the run goes on only what the tally holds can be judged, and only once there is enough of it: 10 queries for a mean or a ratio, the
   support of its quantile.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from fanmark.loadgen.costs import COUNTS, TIMES
from fanmark.loadgen.errors import ScenarioError
from fanmark.loadgen.health import bucket_quantile
from fanmark.loadgen.junit import Case
from fanmark.loadgen.mistakes import nearest
from fanmark.loadgen.scenario import Threshold
from fanmark.loadgen.statistics import QUANTILES, SUPPORT
from fanmark.loadgen.table import TICKS, number
from fanmark.loadgen.tally import LEAST_QUERIES, ArmTally, Tally

Place = tuple[str, ...]
_RESOURCES = (*COUNTS, *TIMES)
_STATISTICS = ("mean", *QUANTILES, "max", "n")
_CALLS = ("ttft_s", "tpot_s", "itl_s", "latency_s", "connect_s")
_KNOWN: dict[str, tuple[Sequence[str], Sequence[str]]] = {  # parts of an arm: what stands in them, and in that
    "per_query": (_RESOURCES, _STATISTICS),
    "per_call": (_CALLS, _STATISTICS),
    "amplification": (_RESOURCES, ("ratio", "low", "high")),
}
_OTHERS = ("queries", "load", "window", "expected", "by_role", "by_round", "by_target", "by_tool", "by_part", "by_turn")
_OF_ARM = (*_KNOWN, *_OTHERS, "objective", "errors", "waste", "quality", "critical_path")
_WHOLE = ("arms", "client", "server", "tools", "run", "retokenized_pct")
_ENDS = ("completed", "failed", "abandoned")
CAN_ABORT = (
    "ARM.per_query.RESOURCE.mean, ARM.per_query.latency_s.p50|p90|p99, ARM.per_call.ttft_s.p50|p90|p99, ARM.amplification.RESOURCE.ratio, "
    "ARM.queries.failed|abandoned with below"
)


def place_of(metric: str, arms: Iterable[str]) -> Place:
    """Where a metric stands in summary.json; an arm's may leave "arms" out."""
    parts = metric.split(".")
    if parts[0] == "arms":
        parts = parts[1:]
    for arm in sorted(arms, key=len, reverse=True):
        name = arm.split(".")
        if parts[: len(name)] == name:
            return ("arms", arm, *parts[len(name) :])
    return tuple(metric.split("."))


def check_thresholds(thresholds: Sequence[Threshold], arms: Sequence[str], baseline: str, source: str) -> None:
    """Raises ScenarioError."""
    for i, threshold in enumerate(thresholds, start=1):
        where = f"{source}: [[threshold]] number {i}: metric = {threshold.metric!r}"
        place = place_of(threshold.metric, arms)
        if threshold.below is None and threshold.above is None:
            raise ScenarioError(f"{where}: give below = N, above = N, or both")
        if threshold.below is not None and threshold.above is not None and not threshold.above < threshold.below:
            raise ScenarioError(
                f"{where}: above = {threshold.above:g} and below = {threshold.below:g}: nothing is between them"
            )
        check_metric(place, arms, where)
        if threshold.abort and (
            reader(place, baseline) is None or (place[2] == "queries" and threshold.above is not None)
        ):
            raise ScenarioError(
                f"{where} with abort = true: is known at the end only: abort can be given with {CAN_ABORT}"
            )


def check_metric(place: Place, arms: Sequence[str], where: str) -> None:
    """Raises ScenarioError where the summary cannot have such a figure."""
    if place[0] != "arms" or len(place) < 3:
        if place[0] not in _WHOLE or place[0] == "arms":
            raise ScenarioError(f"{where}: there is no such figure{nearest(place[0], [*arms, *_WHOLE])}")
    else:
        _check_part(place[2:], where)


def _check_part(parts: Place, where: str) -> None:
    if parts[0] not in _OF_ARM:
        raise ScenarioError(f"{where}: an arm has no {parts[0]!r}{nearest(parts[0], _OF_ARM)}")
    if parts[0] in _KNOWN:
        names, ends = _KNOWN[parts[0]]
        if len(parts) != 3:
            raise ScenarioError(f"{where}: must end in a figure, such as {parts[0]}.{names[0]}.{ends[0]}")
        for given, known in zip(parts[1:], (names, ends), strict=True):
            if given not in known:
                raise ScenarioError(f"{where}: there is no {given!r} in {parts[0]}{nearest(given, known)}")


def judged(thresholds: Sequence[Threshold], summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """`thresholds` of summary.json."""
    found = []
    for threshold in thresholds:
        value: Any = summary
        for key in place_of(threshold.metric, summary["arms"]):
            value = value.get(key) if isinstance(value, dict) else None
        known = value if isinstance(value, int | float) and not isinstance(value, bool) else None
        limits = {"below": threshold.below, "above": threshold.above}
        found.append({"metric": threshold.metric, "value": known, **limits, "met": _met(threshold, known)})
    return found


def _met(threshold: Threshold, value: float | None) -> bool:
    under = threshold.below is None or (value is not None and value < threshold.below)
    over = threshold.above is None or (value is not None and value > threshold.above)
    return under and over


def reader(place: Place, baseline: str) -> Callable[[Tally], float | None] | None:
    """What reads a figure while the run goes on, None where nothing can; what it reads is None while there is too little."""
    if len(place) < 4 or place[0] != "arms":
        return None
    arm, part, name, *end = place[1:]
    if part == "queries" and name in _ENDS[1:] and not end:
        return lambda tally: float(tally.arms[arm].finished[name])
    if part == "amplification" and end == ["ratio"] and arm != baseline:
        return lambda tally: _ratio(tally, arm, name)
    if part == "per_query" and end == ["mean"]:
        return lambda tally: _mean(tally.arms[arm], name)
    if (part, name) in (("per_query", "latency_s"), ("per_call", "ttft_s")) and end and end[0] in QUANTILES:
        quantile = end[0]
        return lambda tally: _quantile(tally.arms[arm], part == "per_query", quantile)
    return None


def _mean(arm: ArmTally, name: str) -> float | None:
    return arm.sums[name] / arm.completed if arm.completed >= LEAST_QUERIES and name in arm.sums else None


def _ratio(tally: Tally, arm: str, name: str) -> float | None:
    enough = min(tally.arms[each].completed for each in (arm, tally.baseline)) >= LEAST_QUERIES
    return tally.amplification(arm, name) if enough else None


def _quantile(arm: ArmTally, of_queries: bool, quantile: str) -> float | None:
    counts = arm.latency if of_queries else arm.ttft
    enough = sum(counts.values()) >= max(SUPPORT[quantile], LEAST_QUERIES)
    return bucket_quantile(counts, QUANTILES[quantile]) if enough else None


def broken(thresholds: Sequence[Threshold], tally: Tally) -> str | None:
    """The first threshold with `abort` that is missed so far, in a line."""
    for threshold in thresholds:
        if threshold.abort:
            read = reader(place_of(threshold.metric, tally.arms), tally.baseline)
            value = read(tally) if read is not None else None
            if value is not None and not _met(threshold, value):
                return f"{threshold.metric} is {number(value)} so far, {limits(threshold.below, threshold.above)}"
    return None


def limits(below: float | None, above: float | None) -> str:
    """`must be below 20`."""
    said = [f"{word} {limit:,.10g}" for word, limit in (("above", above), ("below", below)) if limit is not None]
    return f"must be {' and '.join(said)}"


def lines(summary: Mapping[str, Any]) -> list[str]:
    """A line for each threshold."""
    return [
        f"{'met' if found['met'] else 'MISSED':<8} {found['metric']} is {_said(found)}"
        for found in summary.get("thresholds", ())
    ]


def _said(found: Mapping[str, Any]) -> str:
    value = "not known" if found["value"] is None else number(found["value"])
    return f"{value}, {limits(found['below'], found['above'])}"


def cases(summary: Mapping[str, Any]) -> list[Case]:
    """A run for JUnit: its ticks, objectives and thresholds; what is not known is skipped."""
    validity = summary["validity"]
    found = []
    for tick in TICKS:
        if tick in validity:
            outcome = {True: "passed", False: "failed", None: "skipped"}[validity[tick]]
            found.append(Case(f"validity.{tick}", outcome, validity["reasons"][tick]))  # type: ignore[arg-type]
    for name, arm in summary["arms"].items():
        objective = arm["objective"]
        if objective is not None and objective["met"] is not None:
            said = f"{objective['attainment']:.1%} in time"
            found.append(Case(f"{name}.objective", "passed" if objective["met"] else "failed", said))
    for each in summary["thresholds"]:
        found.append(Case(f"threshold {each['metric']}", "passed" if each["met"] else "failed", _said(each)))
    if summary["ended"] is not None:
        found.append(Case("ended", "failed", f"{summary['ended']['why']}: {summary['ended']['reason']}"))
    return found
