"""What one query cost, from its records, and where that differs from its closed form. Pure."""

import math
from collections.abc import Mapping, Sequence

from fanmark.loadgen.records import Call, Query, critical_path, shape
from fanmark.loadgen.retries import lost_s
from fanmark.loadgen.scenario import Prices

# the resources of per_query: each has an entry in what `resources` gives
COUNTS = (
    "calls",
    "tool_calls",
    "input_tokens",
    "cached_tokens",
    "fresh_tokens",
    "output_tokens",
    "reasoning_tokens",
    "depth",
    "width",
    "retries",
    "dollars",
)
TIMES = (
    "latency_s",
    "first_answer_s",
    "work_s",
    "critical_path_s",
    "tool_s",
    "client_s",
    "limited_s",
    "parallelism",
    "gpu_s",
    "gpu_waste_s",
    "joules",
)
_SUMMED = ("input_tokens", "cached_tokens", "output_tokens", "reasoning_tokens", "gpu_s", "gpu_waste_s", "joules")
EXPECTED = ("calls", "tool_calls", "input_tokens", "output_tokens", "depth", "width")


def resources(
    calls: list[Call], due_at: float, done_at: float, prices: Mapping[str, Prices | None], retried: Sequence[Call] = ()
) -> dict[str, float | None]:
    """The per_query resources of summary.json, from a query's records. What is not known is None. Attempts that were sent again are in
    `retries` and in the latency, not in the times of calls, and they are not the client's time either; no more is what limits and a budget
    kept calls waiting."""
    inferred = [call for call in calls if call.kind == "call"]
    sums: dict[str, float | None] = {}
    for name in _SUMMED:
        values = [getattr(call, name) for call in inferred]
        sums[name] = sum(values) if None not in values else None
    shaped = shape(calls)
    final = max(inferred, key=lambda call: call.done_at or 0.0, default=None)
    latency_s, critical_s = done_at - due_at, shaped["critical_path_s"]
    lost = lost_s(retried)
    limited_s = math.fsum(call.limited_s for call in [*calls, *retried])
    for call in calls:
        held_s = call.limited_s + (call.session_s or 0.0)  # by a limit, or by a tool server whose session had to start
        if held_s:
            lost[call.call] = lost.get(call.call, 0.0) + held_s
    waited_s = math.fsum(call.seconds + lost.get(call.call, 0.0) for call in critical_path(calls, lost))
    known = sums["input_tokens"] is not None and sums["cached_tokens"] is not None
    return {
        "calls": len(inferred),
        "tool_calls": sum(call.kind == "tool_call" and call.refused is None for call in calls),
        "input_tokens": sums["input_tokens"],
        "cached_tokens": sums["cached_tokens"],
        "fresh_tokens": (sums["input_tokens"] or 0) - (sums["cached_tokens"] or 0) if known else None,
        "output_tokens": sums["output_tokens"],
        "reasoning_tokens": sums["reasoning_tokens"],
        "latency_s": latency_s,
        "first_answer_s": final.answer_at - due_at if final and final.answer_at is not None else None,
        "work_s": shaped["work_s"],
        "critical_path_s": critical_s,
        "tool_s": shaped["tool_s"],
        "client_s": max(0.0, latency_s - waited_s),
        "parallelism": shaped["work_s"] / critical_s if critical_s else None,
        "depth": shaped["depth"],
        "width": shaped["width"],
        "retries": len(retried),
        "limited_s": limited_s,
        "gpu_s": sums["gpu_s"],
        "gpu_waste_s": sums["gpu_waste_s"],
        "joules": sums["joules"],
        "dollars": dollars(inferred, prices),
    }


def dollars(calls: list[Call], prices: Mapping[str, Prices | None]) -> float | None:
    """The bill by token prices; None where a price or a count is missing. A call that failed without a count is not on it."""
    if all(price is None for price in prices.values()):
        return None  # nobody asked for a bill: a query without a call has none either
    total = 0.0
    for call in calls:
        if call.error is not None and call.input_tokens is None:
            continue
        price = prices.get(call.target or "")
        if price is None or call.input_tokens is None or call.output_tokens is None:
            return None
        cached = (call.cached_tokens or 0) if price.cached_input is not None else 0
        total += (call.input_tokens - cached) * price.input + cached * (price.cached_input or 0.0)
        total += call.output_tokens * price.output
    return total / 1e6


def mismatches(query: Query) -> list[str]:
    """The resources in which a completed query differs from its closed form; unknown ones are not compared."""
    off = []
    for name, expected in query.expected.items():
        measured = query.resources[name]
        if expected is None or measured is None:
            continue
        bound = query.bound or (name == "output_tokens" and query.output_bound)
        if measured > expected if bound else measured != expected:
            off.append(name)
    return off


def spent(query: Query, name: str) -> float:
    """What a query that did not complete is known to have spent; of tokens at least those of its calls that ended."""
    value = query.resources.get(name)
    if value is not None:
        return value
    if name == "fresh_tokens":
        return spent(query, "input_tokens") - spent(query, "cached_tokens")
    return math.fsum(getattr(call, name, None) or 0 for call in query.calls if call.kind == "call")
