"""`--dry-run`: what a run would send, from the closed forms alone. Nothing is sent. Pure."""

import asyncio
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from fanmark.agents.runtime import Topology
from fanmark.loadgen.arrivals import open_loop
from fanmark.loadgen.claims import held
from fanmark.loadgen.costs import dollars
from fanmark.loadgen.demand import draw_demand, expected_tokens
from fanmark.loadgen.prefix import PrefixCache
from fanmark.loadgen.records import Call
from fanmark.loadgen.scenario import Arm, Scenario
from fanmark.loadgen.table import claim_lines, columns, number
from fanmark.loadgen.walk import Made, walk

_SAMPLE = 200  # queries looked at where a closed loop's duration leaves their number open

_WALKED = 20  # queries that are walked through, for their longest context and what is fresh in them


def plan(scenario: Scenario, topologies: Mapping[str, Topology]) -> dict[str, Any]:
    """Per arm: queries, calls, tool_calls, input_tokens, fresh_tokens_at_best, output_tokens, longest_context_tokens, peak_calls_in_flight,
    seconds, dollars, and the claim of its preset. At best: by a perfect prefix cache. The peak is an upper bound: all queries at once. What
    cannot be known ahead is None. Warm-up, tools' schemas and the rounding of a real tokenizer are not in it; the longest context is that
    of the first 20 queries, from which fresh tokens are extrapolated."""
    found = {arm.name: _arm(scenario, arm, topologies, i) for i, arm in enumerate(scenario.arms)}
    base = found[scenario.baseline.name]
    for arm in scenario.arms:
        found[arm.name]["claim"] = held(arm, partial(_per_query, found[arm.name], base))
    return found


def _per_query(found: Mapping[str, Any], base: Mapping[str, Any], unit: str, resource: str) -> float | None:
    """A resource of an arm's query, or its ratio to the baseline's ("x"); None where the plan does not know it."""
    key = "fresh_tokens_at_best" if resource == "fresh_tokens" else resource
    own, against = (arm[key] / arm["queries"] if arm.get(key) is not None else None for arm in (found, base))
    if unit != "x" or own is None:
        return own
    return own / against if against else None


def _arm(scenario: Scenario, arm: Arm, topologies: Mapping[str, Topology], place: int) -> dict[str, Any]:
    load = scenario.load_of(arm)
    times = list(open_loop(load, scenario.seed, arm.name, place / len(scenario.arms))) if load.mode == "open" else []
    queries = len(times) if load.mode == "open" else load.queries
    found: dict[str, Any] = {"queries": queries, "calls": None, "tool_calls": None, "input_tokens": None}
    found |= {
        "fresh_tokens_at_best": None,
        "output_tokens": None,
        "longest_context_tokens": None,
        "peak_calls_in_flight": None,
    }
    found |= {"seconds": times[-1] if times else load.duration, "dollars": None}
    if any(topologies[part.topology].expected is None for part in arm.mix or [arm]):
        return found
    n = queries if queries is not None else _SAMPLE
    calls = tool_calls = read = written = width = 0
    for i in range(n):
        demand = draw_demand(scenario, arm, topologies, i)
        assert demand.topology.expected is not None
        form = demand.topology.expected(demand.params, demand)
        output, total = expected_tokens(form, demand.lengths, {("tools",): 0})
        calls, tool_calls = calls + form.calls, tool_calls + form.tool_calls
        read, written = read + (total or 0), written + output
        width = max(width, form.width)
    drawn = [draw_demand(scenario, arm, topologies, i) for i in range(min(n, _WALKED))]
    walked = [asyncio.run(walk(demand.topology, demand)) for demand in drawn]
    longest = max((made.context_tokens for query in walked for made in query), default=0)
    at_once = load.concurrency if queries is None or load.mode == "closed" else queries
    found |= {"longest_context_tokens": longest, "peak_calls_in_flight": at_once * width}
    if queries is None:
        return found
    target = None if arm.targets else scenario.targets.get(arm.target or "default")  # roles differ in their prices
    bill = Call(query=0, arm=arm.name, call=1, after=[], kind="call", role="", round=1, due_at=0.0, target="t")
    bill.input_tokens, bill.output_tokens = read, written
    return found | {
        "calls": calls,
        "tool_calls": tool_calls,
        "input_tokens": read,
        "fresh_tokens_at_best": _fresh_tokens(scenario, walked, n, load.warmup > 0),
        "output_tokens": written,
        "dollars": dollars([bill], {"t": target.prices if target else None}),
    }


def _fresh_tokens(scenario: Scenario, walked: Sequence[Sequence[Made]], queries: int, warm: bool) -> int | None:
    """Input tokens that a perfect prefix cache does not serve, of all queries; `warm`: others went before. None where arms share it."""
    cache = scenario.workload.cache
    if cache == "call":
        fresh = [sum(made.input_tokens for made in calls) for calls in walked]
    elif cache == "query":
        fresh = [PrefixCache().fresh_tokens(calls, i) for i, calls in enumerate(walked)]
    elif cache == "run" and len(scenario.arms) > 1:
        return None
    else:
        shared = PrefixCache()
        if warm and walked:
            shared.fresh_tokens(walked[0], -1)
        fresh = [shared.fresh_tokens(calls, i) for i, calls in enumerate(walked)]
    typical = fresh[1:] or fresh
    return sum(fresh) + round((queries - len(fresh)) * sum(typical) / max(len(typical), 1))


def lines(planned: Mapping[str, Any]) -> list[str]:
    """The plan as a table."""
    keys = [key for key in next(iter(planned.values())) if key != "claim"]
    rows = [[key.replace("_", " "), *(number(arm[key]) for arm in planned.values())] for key in keys]
    claims = claim_lines(planned, "by the closed form")
    return [*columns([["", *planned], *rows]), *([""] if claims else []), *claims[:-1]]
