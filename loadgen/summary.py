"""Records -> summary.json (schema fanmark.summary/1). Pure: everything here can be recomputed from a run's folder."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from fanmark.loadgen import critical, fidelity
from fanmark.loadgen.amplification import COUNTS, TIMES, Counted, amplification
from fanmark.loadgen.claims import held
from fanmark.loadgen.objective import objective_part
from fanmark.loadgen.operating_point import operating_point, spans
from fanmark.loadgen.quality import quality
from fanmark.loadgen.records import Call, Query, Window, critical_path
from fanmark.loadgen.retries import waste
from fanmark.loadgen.samples import Sample, kv_use
from fanmark.loadgen.saturation import saturation
from fanmark.loadgen.scenario import Arm, Load, Scenario
from fanmark.loadgen.statistics import distribution, gap_distribution, merge_gaps
from fanmark.loadgen.steadiness import Verdict, judge
from fanmark.loadgen.tool_report import by_tool

SCHEMA = "fanmark.summary/1"
NO_WINDOW = "all queries are counted, no window is set"
NO_WINDOW_YET = "the run was ended before its window began"
CENSORED = 0.01  # of the started queries; if more did not complete, the latencies of those that did are too good
EXPECTED = ("calls", "tool_calls", "input_tokens", "output_tokens", "depth", "width")


def summarise_arms(
    scenario: Scenario,
    queries: Sequence[Query],
    windows: Sequence[Window] = (),
    samples: Sequence[Sample] = (),
    cut_at: float | None = None,
) -> dict[str, Any]:
    """`arms` of summary.json from all of a run's queries, windows and samples; what is not counted is load, and nothing else. `cut_at`:
    when a run was cut short."""
    by_arm = counted_by_arm(scenario, queries, windows, kv_use(samples), cut_at)
    found: dict[str, Any] = {}
    for arm in scenario.arms:
        mine = [query for query in queries if query.arm == arm.name]
        found[arm.name] = _arm(arm, scenario, by_arm[arm.name], by_arm[scenario.baseline.name])
        found[arm.name]["load"] = operating_point(
            scenario.load_of(arm), scenario.objective, mine, by_arm[arm.name].windows
        )
        found[arm.name]["window"] = _window(scenario.load_of(arm), by_arm[arm.name], cut_at is not None)
        offered_qps = found[arm.name]["load"].get("offered_qps")
        found[arm.name]["saturation"] = (
            saturation(scenario, arm, queries, by_arm[arm.name].windows, offered_qps, samples) if offered_qps else None
        )
    return found


def counted_by_arm(
    scenario: Scenario,
    queries: Sequence[Query],
    windows: Sequence[Window],
    kv: Sequence[tuple[float, float]] | None,
    cut_at: float | None,
) -> dict[str, Counted]:
    """What counts of each arm."""
    windows = [msgspec.structs.replace(w, end_at=min(w.end_at, cut_at or math.inf)) for w in windows]
    windows = [window for window in windows if window.seconds > 0]
    by_arm: dict[str, Counted] = {}
    for arm in scenario.arms:
        mine = [query for query in queries if query.arm == arm.name]
        own = [window for window in windows if arm.name in window.arms]
        verdicts = _verdicts(scenario, queries, arm, mine, own, kv, cut=cut_at is not None)
        by_arm[arm.name] = Counted([query for query in mine if not query.warmup], own, verdicts)
    return by_arm


def _verdicts(
    scenario: Scenario,
    queries: Sequence[Query],
    arm: Arm,
    mine: Sequence[Query],
    windows: Sequence[Window],
    kv: Sequence[tuple[float, float]] | None,
    *,
    cut: bool,
) -> list[Verdict]:
    """One on each of an arm's windows. What a run that was cut short left over says nothing of its capacity."""
    found = []
    for window in windows:
        beside = [q for q in queries if q.repeat == window.repeat and q.arm in window.arms]
        own = [q for q in mine if q.repeat == window.repeat]
        found.append(judge(own, beside, window, kv, open_loop=scenario.load_of(arm).mode == "open" and not cut))
    return found


def _window(load: Load, counted: Counted, cut: bool) -> dict[str, Any]:
    """`window` of an arm; of several repeats the whole time, each repeat's own, and the worst verdict."""
    times = spans(counted.queries, counted.windows)
    found: dict[str, Any] = {
        "start_at": times[0][0] if times else None,
        "end_at": times[-1][1] if times else None,
        "steady": None,
        "reason": NO_WINDOW if load.duration is None or load.stages else NO_WINDOW_YET,
        "littles_law_off_pct": None,
        "over_capacity": None,
    }
    if counted.verdicts:
        worst = min(counted.verdicts, key=lambda v: (not v.over_capacity, v.steady is not False, v.steady is not None))
        offs = [v.littles_law_off_pct for v in counted.verdicts if v.littles_law_off_pct is not None]
        which = f"repeat {counted.verdicts.index(worst) + 1}: " if len(counted.verdicts) > 1 else ""
        found |= {"steady": worst.steady, "reason": which + worst.reason, "over_capacity": worst.over_capacity}
        found["littles_law_off_pct"] = max(offs, key=abs, default=None)
        if cut:
            found |= {"steady": False, "reason": f"the run was cut short; {worst.reason}"}
    if len(times) > 1:
        verdicts = counted.verdicts or [Verdict(None, found["reason"], None)] * len(times)
        found["repeats"] = [
            {"start_at": a, "end_at": b, "steady": v.steady, "reason": v.reason}
            for (a, b), v in zip(times, verdicts, strict=True)
        ]
    return found


def _arm(arm: Arm, scenario: Scenario, counted: Counted, base: Counted) -> dict[str, Any]:
    queries = counted.queries
    completed = [query for query in queries if query.outcome == "completed"]
    calls = [call for query in queries for call in query.calls]
    outcomes = Counter(query.outcome for query in queries)
    interleaved = scenario.load.arms == "interleaved"
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
        "censored": outcomes["completed"] < (1 - CENSORED) * len(queries),
        "load": {},
        "window": {},
        "per_query": {name: _of(completed, name) for name in (*COUNTS, *TIMES)},
        "per_call": _per_call([call for query in completed for call in query.calls]),
        "expected": _expected(completed),
        "amplification": {
            name: None
            if scenario.tapped
            else amplification(counted, base, name, scenario.seed, interleaved=interleaved)
            for name in (*COUNTS, *TIMES)
        },
        **_groups(completed),
        "by_tool": by_tool(queries),
        "objective": objective_part(queries, scenario.objective),
        "errors": dict(Counter(call.error for call in calls if call.error not in (None, "cancelled"))),
    }
    found["quality"] = quality(queries, scenario.questions, forced=scenario.workload.lengths == "forced")
    found["fidelity"] = fidelity.mean([query.fidelity for query in completed])
    found["stopped"] = dict(Counter(query.stopped for query in completed if query.stopped is not None))
    found["by_part"] = _per_query_by(completed, lambda query: query.part or "") if arm.mix else None
    turns = [query for query in completed if query.turn is not None]
    found["by_turn"] = _per_query_by(turns, lambda query: query.turn) if scenario.load.users is not None else None
    found["critical_path"] = critical.shares(completed)
    found["waste"] = waste(queries)
    found["claim"] = held(arm, lambda unit, resource: _claimed(found, unit, resource))
    found["failures"] = dict(Counter(query.error for query in queries if query.error is not None).most_common(3))
    own_errors = sum(call.tool_error for call in calls)
    if own_errors:
        found["errors"]["tool_error"] = own_errors
    return found


def _claimed(found: Mapping[str, Any], unit: str, resource: str) -> float | None:
    """What a claim is held against: the ratio to the baseline, or the mean per query."""
    part, key = ("amplification", "ratio") if unit == "x" else ("per_query", "mean")
    entry: dict[str, float] | None = found[part][resource]
    return entry[key] if entry is not None else None


def _of(queries: Sequence[Query], name: str) -> Any:
    values = [query.resources[name] for query in queries]
    known = [value for value in values if value is not None]
    return distribution(known) if len(known) == len(values) else None


def _ended(calls: Sequence[Call]) -> list[Call]:
    return [call for call in calls if call.kind == "call" and call.error is None and call.sent_at is not None]


def _first_and_last(ended: Sequence[Call]) -> dict[str, Any]:
    ttft = [call.first_at - call.sent_at for call in ended if call.first_at is not None and call.sent_at is not None]
    return {"ttft_s": distribution(ttft), "latency_s": distribution([call.seconds for call in ended])}


def _per_call(calls: Sequence[Call]) -> dict[str, Any]:
    ended = _ended(calls)
    tpot = [
        (call.done_at - call.first_at) / (call.output_tokens - 1)
        for call in ended
        if call.first_at is not None
        and call.done_at is not None
        and (call.output_tokens or 0) > 1
        and call.output_tokens
    ]
    return {
        **_first_and_last(ended),
        "tpot_s": distribution(tpot),
        "itl_s": gap_distribution(merge_gaps([call.gaps for call in ended])),
        "connect_s": distribution([call.connect_s for call in ended if call.connect_s is not None]),
    }


def _expected(queries: Sequence[Query]) -> dict[str, Any]:
    """Means of the closed form over completed queries; an unknown one is None and `approximate` is then true. `at_most`: it is a bound,
    with `output_at_most` of output tokens alone."""
    found: dict[str, Any] = {}
    for name in EXPECTED:
        values = [query.expected.get(name) for query in queries]
        known = [value for value in values if value is not None]
        found[name] = math.fsum(known) / len(known) if known and len(known) == len(values) else None
    found["mismatches"] = sum(bool(query.mismatches) for query in queries)
    found["at_most"] = any(query.bound for query in queries)
    found["output_at_most"] = found["at_most"] or any(query.output_bound for query in queries)
    found["approximate"] = bool(queries) and found["input_tokens"] is None
    return found


def _groups(queries: Sequence[Query]) -> dict[str, Any]:
    """by_role, by_round and by_target: calls, tokens and times; `critical_share` is the group's part of all critical paths."""
    groups: dict[str, Callable[[Call], str]] = {
        "by_role": lambda call: call.role,
        "by_round": lambda call: str(call.round),
        "by_target": lambda call: call.target or "",
    }
    calls: dict[str, dict[str, list[Call]]] = {by: defaultdict(list) for by in groups}
    critical_s: dict[str, Counter[str]] = {by: Counter() for by in groups}
    for query in queries:
        needed = query.needed
        path = critical_path(needed)
        for by, group in groups.items():
            for call in needed:
                if call.kind == "call":
                    calls[by][group(call)].append(call)
            for call in path:
                if call.kind == "call":
                    critical_s[by][group(call)] += call.seconds  # type: ignore[assignment]  # a Counter of floats
    total_s = math.fsum(query.resources["critical_path_s"] or 0.0 for query in queries)
    return {
        by: {
            name: {
                "calls": len(mine),
                **{kind: _sum(mine, kind) for kind in ("input_tokens", "cached_tokens", "output_tokens")},
                **_first_and_last(_ended(mine)),
                "critical_share": critical_s[by][name] / total_s if total_s else None,
            }
            for name, mine in sorted(found.items())
        }
        for by, found in calls.items()
    }


def _per_query_by(queries: Sequence[Query], group: Callable[[Query], Any]) -> dict[str, Any]:
    """By part of a mix, or by turn of a session: how many queries there were, and their per_query resources."""
    groups: dict[Any, list[Query]] = defaultdict(list)
    for query in queries:
        groups[group(query)].append(query)
    return {
        str(name): {"queries": len(mine), **{resource: _of(mine, resource) for resource in (*COUNTS, *TIMES)}}
        for name, mine in sorted(groups.items())
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
    *,
    warm: bool = False,
    heard: bool = True,
) -> dict[str, Any]:
    """The six ticks, true | false | null, and `reasons` for each; for our stub a seventh, whether it kept its schedule.
    `unexplained_tokens` None: not knowable, as the cache was `warm`, or no cached tokens were told, or nothing was `heard`."""
    ticks: dict[str, tuple[bool | None, str]] = {
        "counted": _counted(arms),
        "reconciled": (server.get("reconciled"), server.get("reason", "")),
        "alone": (server.get("alone"), server.get("alone_reason", server.get("reason", ""))),
        "steady": _steady(arms),
        "uncontaminated": _uncontaminated(unexplained_tokens, warm, heard),
        "client_ok": (
            client["verdict"] != "client-limited",
            ("" if client["verdict"] == "ok" else f"{client['verdict']}: ")
            + ("; ".join(client["reasons"]) or "loop lag and send delays are small"),
        ),
    }
    if stub is not None:
        ticks["stub_on_time"] = stub
    return {name: ok for name, (ok, _) in ticks.items()} | {
        "reasons": {name: reason for name, (_, reason) in ticks.items()}
    }


def _steady(arms: Mapping[str, Any]) -> tuple[bool | None, str]:
    """Of the arms' windows: one that is not steady makes the run so. A reason that several arms share is told once."""
    verdicts = {name: arm["window"]["steady"] for name, arm in arms.items()}
    worst = False if False in verdicts.values() else None if None in verdicts.values() else True
    if worst:
        off = max(abs(arm["window"]["littles_law_off_pct"] or 0.0) for arm in arms.values())
        return True, f"calls in flight are even between the window's halves, L and lambda x W at most {off:.1f} % apart"
    said: dict[str, list[str]] = {}
    for name, arm in arms.items():
        if verdicts[name] is worst:
            for reason in arm["window"]["reason"].split("; "):
                said.setdefault(reason, []).append(name)
    whole = [
        f"{reason}" if len(names) == len(arms) else f"{', '.join(names)}: {reason}" for reason, names in said.items()
    ]
    return worst, "; ".join(whole)


def _counted(arms: Mapping[str, Any]) -> tuple[bool | None, str]:
    wrong = {name: arm["expected"]["mismatches"] for name, arm in arms.items() if arm["expected"]["mismatches"]}
    empty = [name for name, arm in arms.items() if not arm["queries"]["completed"]]
    if wrong or empty:
        said = [f"{name}: {n} queries differ from the closed form" for name, n in wrong.items()]
        return False, "; ".join(said + [f"{name}: no query completed" for name in empty])
    approximate = [
        n for n, arm in arms.items() if arm["expected"]["approximate"] and arm["expected"]["calls"] is not None
    ]
    but = f", input tokens of {', '.join(approximate)} not compared" if approximate else ""
    formless = [name for name, arm in arms.items() if arm["expected"]["calls"] is None]
    but += f"; {', '.join(formless)} has no closed form" if formless else ""
    compared = sum(arm["queries"]["completed"] for name, arm in arms.items() if name not in formless)
    if len(formless) == len(arms):
        return None, f"{', '.join(formless)}: no closed form"
    return True, f"{compared} queries equal their closed form{but}"


def _uncontaminated(unexplained_tokens: int | None, warm: bool, heard: bool) -> tuple[bool | None, str]:
    if warm:
        return None, "warm: whatever was cached before was meant to be found"
    if unexplained_tokens is None:
        return None, "the server reports no cached tokens" if heard else "no call that counts was answered"
    if unexplained_tokens:
        return False, f"{unexplained_tokens} cached tokens that this run's own traffic cannot explain"
    return True, "the run's own traffic explains every cached token"
