"""The load that an arm was under: what was offered, what was done, what was in flight. Pure."""

from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from fanmark.loadgen.objective import good
from fanmark.loadgen.records import Window
from fanmark.loadgen.reduced import QueryKind, Reduced, Rows, in_flight
from fanmark.loadgen.scenario import Load, Objective
from fanmark.loadgen.statistics import distribution, occupancy

Span = tuple[float, float]


def spans(counted: Rows[QueryKind], windows: Sequence[Window]) -> list[Span]:
    """When an arm was counted: its windows, or without any, in each repeat from the first due to the last done."""
    if windows:
        return [(window.start_at, window.end_at) for window in windows]
    repeats = counted.by(lambda kind: kind.repeat)
    return [(min(mine["due_at"]), max(mine["done_at"])) for _, mine in sorted(repeats.items())]


HELD_BACK_S = 0.001  # what a guard lets pass starts sooner


def operating_point(load: Load, objective: Objective | None, arm: Reduced, windows: Sequence[Window]) -> dict[str, Any]:
    """`load` of summary.json: rates are of what ended while the arm was counted, uncounted queries included, for they were load too.
    `held_back`: queries that the guard, max_in_flight, has delayed.
    `arm` is all of it; without windows only what counts is looked at."""
    counted = arm.queries.where(lambda kind: not kind.warmup)
    if not len(counted):
        return {}
    if not windows:
        arm = arm.where(lambda kind: not kind.warmup)
    times = spans(counted, windows)
    seconds = max(sum(b - a for a, b in times), 1e-9)

    def inside(at: float | None) -> bool:
        return at is not None and any(a <= at <= b for a, b in times)

    completed = arm.queries.where(lambda kind: kind.outcome == "completed")
    ended = array("d", (done_at - due_at for due_at, done_at in completed.rows("due_at", "done_at") if inside(done_at)))
    calls = arm.calls.where(lambda kind: kind.kind == "call")
    done = read = wrote = 0
    for done_at, input_tokens, output_tokens in calls.rows("done_at", "input_tokens", "output_tokens"):
        if inside(done_at):
            done, read, wrote = done + 1, read + (input_tokens or 0), wrote + (output_tokens or 0)
    return {
        "offered_qps": _offered(load, counted, seconds, windows),
        "start_delay_s": distribution(counted["start_delay_s"]),
        "held_back": sum(s > HELD_BACK_S for s in counted["start_delay_s"]) if load.max_in_flight else 0,
        "completed_qps": len(ended) / seconds,
        "good_qps": good(ended, objective) / seconds if objective else None,
        "calls_per_s": done / seconds,
        "input_tokens_per_s": read / seconds,
        "output_tokens_per_s": wrote / seconds,
        "queries_in_flight": _in_flight(lambda: arm.queries.rows("due_at", "done_at"), times, seconds),
        "calls_in_flight": _in_flight(lambda: in_flight(calls), times, seconds),
    }


def unknown(load: Load) -> dict[str, Any]:
    """The same of an arm that is not recorded as a whole: of what ran nothing is known, but for the rate that was set."""
    return {
        "offered_qps": load.rate if _even(load) else None,
        "start_delay_s": None,
        "held_back": None,
        **dict.fromkeys(("completed_qps", "good_qps", "calls_per_s", "input_tokens_per_s", "output_tokens_per_s")),
        "queries_in_flight": {"mean": None, "max": None},
        "calls_in_flight": {"mean": None, "max": None},
    }


def _offered(load: Load, counted: Rows[QueryKind], seconds: float, windows: Sequence[Window]) -> float:
    """Of an open loop what was set, of all others what came."""
    arm = next(kind.arm for kind, _ in counted.kinds())
    set_qps = [rate for window in windows if (rate := window.rates.get(arm)) is not None]
    if set_qps:
        return sum(set_qps) / len(set_qps)
    return load.rate if _even(load) else len(counted) / seconds


def _even(load: Load) -> bool:
    """Whether one rate was set."""
    return load.mode == "open" and load.process != "replay" and not load.stages


def _in_flight(
    found: Callable[[], Iterator[tuple[Any, ...]]], times: Sequence[Span], seconds: float
) -> dict[str, float]:
    """Mean and max over all spans of time."""
    parts = [(occupancy(found(), a, b), b - a) for a, b in times]
    return {"mean": sum(part["mean"] * s for part, s in parts) / seconds, "max": max(part["max"] for part, _ in parts)}
