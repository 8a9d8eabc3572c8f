"""The load that an arm was under: what was offered, what was done, what was in flight. Pure."""

from collections.abc import Sequence
from typing import Any

from fanmark.loadgen.objective import good
from fanmark.loadgen.records import Query, Window
from fanmark.loadgen.scenario import Load, Objective
from fanmark.loadgen.statistics import distribution, occupancy

Span = tuple[float, float]


def spans(counted: Sequence[Query], windows: Sequence[Window]) -> list[Span]:
    """When an arm was counted: its windows, or without any, in each repeat from the first due to the last done."""
    if windows:
        return [(window.start_at, window.end_at) for window in windows]
    repeats = [[q for q in counted if q.repeat == repeat] for repeat in sorted({q.repeat for q in counted})]
    return [(min(q.due_at for q in mine), max(q.done_at for q in mine)) for mine in repeats]


HELD_BACK_S = 0.001  # what a guard lets pass starts sooner


def operating_point(
    load: Load, objective: Objective | None, queries: Sequence[Query], windows: Sequence[Window]
) -> dict[str, Any]:
    """`load` of summary.json: rates are of what ended while the arm was counted, uncounted queries included, for they were load too.
    `held_back`: queries that the guard, max_in_flight, has delayed.
    `queries` are all of the arm's; without windows only what counts is looked at."""
    counted = [q for q in queries if not q.warmup]
    if not counted:
        return {}
    if not windows:
        queries = counted
    times = spans(counted, windows)
    seconds = max(sum(b - a for a, b in times), 1e-9)

    def inside(at: float | None) -> bool:
        return at is not None and any(a <= at <= b for a, b in times)

    ended = [q for q in queries if q.outcome == "completed" and inside(q.done_at)]
    calls = [c for q in queries for c in (*q.retried, *q.calls) if c.kind == "call"]
    done = [c for c in calls if inside(c.done_at)]
    carried = [(c.sent_at, c.done_at) for c in calls if c.sent_at is not None and c.done_at is not None]
    return {
        "offered_qps": _offered(load, counted, seconds, windows),
        "start_delay_s": distribution([q.started_at - q.due_at for q in counted]),
        "held_back": sum(q.started_at - q.due_at > HELD_BACK_S for q in counted) if load.max_in_flight else 0,
        "completed_qps": len(ended) / seconds,
        "good_qps": sum(good(q, objective) for q in ended) / seconds if objective else None,
        "calls_per_s": len(done) / seconds,
        "input_tokens_per_s": sum(c.input_tokens or 0 for c in done) / seconds,
        "output_tokens_per_s": sum(c.output_tokens or 0 for c in done) / seconds,
        "queries_in_flight": _in_flight([(q.due_at, q.done_at) for q in queries], times, seconds),
        "calls_in_flight": _in_flight(carried, times, seconds),
    }


def _offered(load: Load, counted: Sequence[Query], seconds: float, windows: Sequence[Window]) -> float:
    """Of an open loop what was set, of all others what came."""
    set_qps = [rate for window in windows if (rate := window.rates.get(counted[0].arm)) is not None]
    if set_qps:
        return sum(set_qps) / len(set_qps)
    even = load.mode == "open" and load.process != "replay" and not load.stages
    return load.rate if even else len(counted) / seconds


def _in_flight(found: Sequence[Span], times: Sequence[Span], seconds: float) -> dict[str, float]:
    """Mean and max over all spans of time."""
    parts = [(occupancy(found, a, b), b - a) for a, b in times]
    return {"mean": sum(part["mean"] * s for part, s in parts) / seconds, "max": max(part["max"] for part, _ in parts)}
