"""Whether a query met its objective, on its own deadline and on that of its calls. Pure."""

from collections.abc import Iterable
from typing import Any

from fanmark.loadgen.records import Call, Query
from fanmark.loadgen.scenario import Objective
from fanmark.loadgen.statistics import wilson


def good(latencies_s: Iterable[float], objective: Objective) -> int:
    """How many completed queries met their deadline."""
    return sum(latency_s <= objective.query_seconds for latency_s in latencies_s)


def in_time(query: Query, objective: Objective) -> bool:
    """Whether a query was answered within its deadline."""
    return query.outcome == "completed" and query.done_at - query.due_at <= objective.query_seconds


def calls_good(query: Query, objective: Objective) -> bool:
    """Whether all calls that a query needed met the per-call objective: the time to the first token, and the mean time of a further one."""
    calls = [call for call in query.needed if call.kind == "call"]
    return query.outcome == "completed" and all(_call_good(call, objective) for call in calls)


def _call_good(call: Call, objective: Objective) -> bool:
    if call.sent_at is None or call.first_at is None or call.done_at is None:
        return False
    further = (call.output_tokens or 0) - 1
    begun = objective.ttft_s is None or call.first_at - call.sent_at <= objective.ttft_s
    return begun and (
        objective.tpot_s is None or further < 1 or (call.done_at - call.first_at) / further <= objective.tpot_s
    )


def objective_part(
    started: int, latencies_s: Iterable[float], in_time: int | None, objective: Objective | None, more: int = 0
) -> dict[str, Any] | None:
    """`objective` of an arm in summary.json, over all queries that were started; latencies are those of the completed ones that are
    recorded, `more` are good besides. `per_call`: how many had all their calls `in_time`; None where that is not known, or the scenario
    says nothing of calls."""
    if objective is None:
        return None
    of_calls = objective.ttft_s is not None or objective.tpot_s is not None
    return _share(good(latencies_s, objective) + more, started, objective) | {
        "per_call": _share(in_time, started, objective) if of_calls and in_time is not None else None
    }


def _share(met: int, n: int, objective: Objective) -> dict[str, Any]:
    low, high = wilson(met, n)
    share = met / n if n else None
    reached = None if share is None else share >= objective.attainment
    return {"good": met, "attainment": share, "low": low, "high": high, "met": reached}
