"""Records -> summary.json (schema fanmark.summary/1). Pure: everything here can be recomputed from a run's folder."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fanmark.loadgen import critical
from fanmark.loadgen.claims import held
from fanmark.loadgen.records import Call, Query, critical_path
from fanmark.loadgen.retries import waste
from fanmark.loadgen.scenario import Arm, Load, Objective, Scenario
from fanmark.loadgen.statistics import (
    distribution,
    gap_distribution,
    merge_gaps,
    occupancy,
    paired_ratio,
    wilson,
)

SCHEMA = "fanmark.summary/1"
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
    "parallelism",
    "gpu_s",
    "joules",
)
EXPECTED = ("calls", "tool_calls", "input_tokens", "output_tokens", "depth", "width")


def summarise_arms(scenario: Scenario, queries: Sequence[Query]) -> dict[str, Any]:
    """`arms` of summary.json from all of a run's queries; warm-up is left out."""
    by_arm: dict[str, list[Query]] = {arm.name: [] for arm in scenario.arms}
    for query in queries:
        if not query.warmup:
            by_arm[query.arm].append(query)
    base = by_arm[scenario.baseline.name]
    return {
        arm.name: _arm(arm, scenario.load_of(arm), scenario.objective, by_arm[arm.name], base, scenario.seed)
        for arm in scenario.arms
    }


def _arm(
    arm: Arm, load: Load, objective: Objective | None, queries: Sequence[Query], base: Sequence[Query], seed: int
) -> dict[str, Any]:
    completed = [query for query in queries if query.outcome == "completed"]
    calls = [call for query in queries for call in query.calls]
    outcomes = Counter(query.outcome for query in queries)
    found: dict[str, Any] = {
        "topology": arm.topology,
        "params": arm.params,
        "baseline": arm.baseline,
        "queries": {
            "started": len(queries),
            "completed": outcomes["completed"],
            "failed": outcomes["failed"],
            "abandoned": outcomes["abandoned"],
        },
        "load": _load(load, objective, queries, [*calls, *(call for query in queries for call in query.retried)]),
        "window": {
            "start_at": min((query.due_at for query in queries), default=None),
            "end_at": max((query.done_at for query in queries), default=None),
            "steady": None,
            "reason": "all queries are counted, no window is set",
            "littles_law_off_pct": None,
        },
        "per_query": {name: _of(completed, name) for name in (*COUNTS, *TIMES)},
        "per_call": _per_call([call for query in completed for call in query.calls]),
        "expected": _expected(completed),
        "amplification": {name: _amplification(queries, base, name, seed) for name in (*COUNTS, *TIMES)},
        "by_role": _by(completed, lambda call: call.role),
        "by_round": _by(completed, lambda call: str(call.round)),
        "by_target": _by(completed, lambda call: call.target or ""),
        "objective": None,
        "errors": dict(Counter(call.error for call in calls if call.error not in (None, "cancelled"))),
    }
    found["stopped"] = dict(Counter(query.stopped for query in completed if query.stopped is not None))
    found["critical_path"] = critical.shares(completed)
    found["waste"] = waste(queries)
    found["claim"] = held(arm, lambda unit, resource: _claimed(found, unit, resource))
    found["failures"] = dict(Counter(query.error for query in queries if query.error is not None).most_common(3))
    own_errors = sum(call.tool_error for call in calls)
    if own_errors:
        found["errors"]["tool_error"] = own_errors
    if objective is not None:
        met = sum(_good(query, objective) for query in queries)
        low, high = wilson(met, len(queries))
        share = met / len(queries) if queries else None
        reached = None if share is None else share >= objective.attainment
        found["objective"] = {"attainment": share, "low": low, "high": high, "met": reached}
    return found


def _claimed(found: Mapping[str, Any], unit: str, resource: str) -> float | None:
    """What a claim is held against: the ratio to the baseline, or the mean per query."""
    part, key = ("amplification", "ratio") if unit == "x" else ("per_query", "mean")
    entry: dict[str, float] | None = found[part][resource]
    return entry[key] if entry is not None else None


def _good(query: Query, objective: Objective) -> bool:
    return query.outcome == "completed" and query.done_at - query.due_at <= objective.query_seconds


def _of(queries: Sequence[Query], name: str) -> Any:
    values = [query.resources[name] for query in queries]
    known = [value for value in values if value is not None]
    return distribution(known) if len(known) == len(values) else None


def _load(load: Load, objective: Objective | None, queries: Sequence[Query], calls: Sequence[Call]) -> dict[str, Any]:
    if not queries:
        return {}
    start_at = min(query.due_at for query in queries)
    end_at = max(query.done_at for query in queries)
    seconds = max(end_at - start_at, 1e-9)
    steady_rate = load.mode == "open" and load.process != "replay" and not load.stages
    done = [query for query in queries if query.outcome == "completed"]
    spans = [
        (call.sent_at, call.done_at)
        for call in calls
        if call.kind == "call" and call.sent_at is not None and call.done_at is not None
    ]
    return {
        "offered_qps": load.rate if steady_rate else len(queries) / seconds,
        "start_delay_s": distribution([query.started_at - query.due_at for query in queries]),
        "completed_qps": len(done) / seconds,
        "good_qps": sum(_good(query, objective) for query in queries) / seconds if objective else None,
        "calls_per_s": sum(call.kind == "call" for call in calls) / seconds,
        "input_tokens_per_s": sum(call.input_tokens or 0 for call in calls) / seconds,
        "output_tokens_per_s": sum(call.output_tokens or 0 for call in calls) / seconds,
        "queries_in_flight": occupancy([(query.due_at, query.done_at) for query in queries], start_at, end_at),
        "calls_in_flight": occupancy(spans, start_at, end_at),
    }


def _per_call(calls: Sequence[Call]) -> dict[str, Any]:
    ended = [call for call in calls if call.kind == "call" and call.error is None and call.sent_at is not None]
    ttft = [call.first_at - call.sent_at for call in ended if call.first_at is not None and call.sent_at is not None]
    tpot = [
        (call.done_at - call.first_at) / (call.output_tokens - 1)
        for call in ended
        if call.first_at is not None
        and call.done_at is not None
        and (call.output_tokens or 0) > 1
        and call.output_tokens
    ]
    return {
        "ttft_s": distribution(ttft),
        "tpot_s": distribution(tpot),
        "itl_s": gap_distribution(merge_gaps([call.gaps for call in ended])),
        "latency_s": distribution([call.seconds for call in ended]),
        "connect_s": distribution([call.connect_s for call in ended if call.connect_s is not None]),
    }


def _expected(queries: Sequence[Query]) -> dict[str, Any]:
    """Means of the closed form over completed queries; an unknown one is None and `approximate` is then true."""
    found: dict[str, Any] = {}
    for name in EXPECTED:
        values = [query.expected.get(name) for query in queries]
        known = [value for value in values if value is not None]
        found[name] = math.fsum(known) / len(known) if known and len(known) == len(values) else None
    found["mismatches"] = sum(bool(query.mismatches) for query in queries)
    found["approximate"] = bool(queries) and found["input_tokens"] is None
    return found


def _amplification(queries: Sequence[Query], base: Sequence[Query], name: str, seed: int) -> dict[str, Any] | None:
    """Ratio of the means per completed query, what failed queries and retries spent included."""
    own, own_waste = _costs(queries, name)
    against, base_waste = _costs(base, name)
    if own is None or against is None:
        return None
    found = paired_ratio(own, against, seed)
    if found is None:
        return None
    factor = own_waste / base_waste
    found["ratio"] *= factor
    if name in TIMES:
        return found | {"low": None, "high": None, "method": "one short run, no interval"}
    if found["low"] is not None:
        found |= {"low": found["low"] * factor, "high": found["high"] * factor}
    return found


def _costs(queries: Sequence[Query], name: str) -> tuple[dict[int, float] | None, float]:
    """Values of the completed queries by number (None if one is unknown), and all queries' total over the completed ones'."""
    completed = {query.query: query.resources[name] for query in queries if query.outcome == "completed"}
    known = {i: value for i, value in completed.items() if value is not None}
    if len(known) < len(completed):
        return None, 1.0
    total = math.fsum(known.values())
    if name not in COUNTS or name in ("depth", "width") or total == 0:
        return known, 1.0
    lost = math.fsum(_spent(query, name) for query in queries if query.outcome != "completed")
    if name == "calls":  # of tokens, an attempt that was sent again has none
        lost += sum(len(query.retried) for query in queries)
    return known, (total + lost) / total


def _spent(query: Query, name: str) -> float:
    """What a query that did not complete is known to have spent; of tokens at least those of its calls that ended."""
    value = query.resources[name]
    if value is not None:
        return value
    if name == "fresh_tokens":
        return _spent(query, "input_tokens") - _spent(query, "cached_tokens")
    return math.fsum(getattr(call, name, None) or 0 for call in query.calls if call.kind == "call")


def _by(queries: Sequence[Query], group: Callable[[Call], str]) -> dict[str, Any]:
    """Calls, tokens and times by role, round or target; `critical_share` is the group's part of all critical paths."""
    calls: dict[str, list[Call]] = defaultdict(list)
    critical_s: Counter[str] = Counter()
    for query in queries:
        for call in query.needed:
            if call.kind == "call":
                calls[group(call)].append(call)
        for call in critical_path(query.needed):
            if call.kind == "call":
                critical_s[group(call)] += call.seconds  # type: ignore[assignment]  # a Counter of floats
    total_s = math.fsum(query.resources["critical_path_s"] or 0.0 for query in queries)
    return {
        name: {
            "calls": len(mine),
            **{kind: _sum(mine, kind) for kind in ("input_tokens", "cached_tokens", "output_tokens")},
            "ttft_s": _per_call(mine)["ttft_s"],
            "latency_s": _per_call(mine)["latency_s"],
            "critical_share": critical_s[name] / total_s if total_s else None,
        }
        for name, mine in sorted(calls.items())
    }


def _sum(calls: Sequence[Call], name: str) -> int | None:
    values = [getattr(call, name) for call in calls]
    return None if None in values else sum(values)


def validity(
    arms: Mapping[str, Any],
    server: Mapping[str, Any],
    client: Mapping[str, Any],
    unexplained_tokens: int | None,
    stub: tuple[bool, str] | None = None,
) -> dict[str, Any]:
    """The six ticks, true | false | null, and `reasons` for each; for our stub a seventh, whether it kept its schedule.
    `unexplained_tokens` None: not knowable."""
    ticks: dict[str, tuple[bool | None, str]] = {
        "counted": _counted(arms),
        "reconciled": (server.get("reconciled"), server.get("reason", "")),
        "alone": (server.get("alone"), server.get("alone_reason", server.get("reason", ""))),
        "steady": (None, "all queries are counted, no window is set"),
        "uncontaminated": _uncontaminated(unexplained_tokens),
        "client_ok": (
            client["verdict"] != "client-limited",
            "; ".join(client["reasons"]) or "loop lag and send delays are small",
        ),
    }
    if stub is not None:
        ticks["stub_on_time"] = stub
    return {name: ok for name, (ok, _) in ticks.items()} | {
        "reasons": {name: reason for name, (_, reason) in ticks.items()}
    }


def _counted(arms: Mapping[str, Any]) -> tuple[bool, str]:
    wrong = {name: arm["expected"]["mismatches"] for name, arm in arms.items() if arm["expected"]["mismatches"]}
    empty = [name for name, arm in arms.items() if not arm["queries"]["completed"]]
    if wrong or empty:
        said = [f"{name}: {n} queries differ from the closed form" for name, n in wrong.items()]
        return False, "; ".join(said + [f"{name}: no query completed" for name in empty])
    approximate = [name for name, arm in arms.items() if arm["expected"]["approximate"]]
    but = f", input tokens of {', '.join(approximate)} not compared" if approximate else ""
    return True, f"{sum(arm['queries']['completed'] for arm in arms.values())} queries equal their closed form{but}"


def _uncontaminated(unexplained_tokens: int | None) -> tuple[bool | None, str]:
    if unexplained_tokens is None:
        return None, "the cache is shared on purpose, or the server reports no cached tokens"
    if unexplained_tokens:
        return False, f"{unexplained_tokens} cached tokens that this run's own traffic cannot explain"
    return True, "the run's own traffic explains every cached token"
