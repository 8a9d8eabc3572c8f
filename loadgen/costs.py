"""What one query cost, from its records, and where that differs from its closed form. Pure."""

import math
from collections.abc import Iterable, Mapping, Sequence

from fanmark.loadgen.prices import Prices
from fanmark.loadgen.records import Call, Query, critical_path, shape
from fanmark.loadgen.retries import lost_s
from fanmark.loadgen.scenario import Scenario

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
    calls: list[Call],
    due_at: float,
    done_at: float,
    prices: Mapping[str, Prices | None],
    retried: Sequence[Call] = (),
    per_tool_call: float | None = None,
) -> dict[str, float | None]:
    """The per_query resources of summary.json, from a query's records. What is not known is None. Attempts that were sent again are in
    `retries` and in the latency, not in the times of calls, and they are not the client's time either; no more is what limits and a budget
    kept calls waiting."""
    inferred = [call for call in calls if call.kind == "call"]
    tool_calls = sum(call.kind == "tool_call" and call.refused is None for call in calls)
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
        "tool_calls": tool_calls,
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
        "dollars": dollars(inferred, prices, tool_calls, per_tool_call),
    }


def resources_of(query: Query, scenario: Scenario) -> dict[str, float | None]:
    """The same of a query that has ended."""
    per_tool_call = scenario.tools.dollars_per_call
    return resources(query.needed, query.due_at, query.done_at, scenario.prices, query.retried, per_tool_call)


def dollars(
    calls: Iterable[Call], prices: Mapping[str, Prices | None], tool_calls: int = 0, per_tool_call: float | None = None
) -> float | None:
    """The bill: of a server of one's own by GPU time, else by tokens; and the tool calls. None where a price or a count is missing. A call
    that failed without a count is not on it."""
    if per_tool_call is None and all(price is None for price in prices.values()):
        return None  # nobody asked for a bill: a query without a call has none either
    total = tool_calls * (per_tool_call or 0.0)
    for call in calls:
        if call.error is not None and call.input_tokens is None:
            continue
        price = prices.get(call.target or "")
        if price is None:
            return None
        if price.replica_s is not None:
            cost = None if call.gpu_s is None else call.gpu_s * price.replica_s
        elif call.input_tokens is None or call.output_tokens is None:
            return None
        else:
            cost = price.of_tokens(call.input_tokens, call.cached_tokens or 0, call.output_tokens)
        if cost is None:
            return None
        total += cost
    return total


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
