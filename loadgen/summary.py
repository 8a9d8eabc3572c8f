"""Records -> summary.json (schema fanmark.summary/1). Pure: everything here can be recomputed from a run's folder. A new figure of a query
or of a call comes from reduced.py."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import msgspec

from fanmark.loadgen import critical
from fanmark.loadgen.amplification import Counted, amplification
from fanmark.loadgen.claims import held
from fanmark.loadgen.cost_part import cost_part
from fanmark.loadgen.costs import COUNTS, EXPECTED, TIMES
from fanmark.loadgen.fidelity import MEASURES
from fanmark.loadgen.objective import objective_part
from fanmark.loadgen.operating_point import operating_point, spans, unknown
from fanmark.loadgen.quality import quality
from fanmark.loadgen.records import Window
from fanmark.loadgen.reduced import (
    CallKind,
    QueryKind,
    Reduced,
    Rows,
    Sums,
    on_critical_path_s,
    seconds,
    ttft_s,
)
from fanmark.loadgen.samples import Sample, kv_use
from fanmark.loadgen.saturation import saturation
from fanmark.loadgen.scenario import Arm, Load, Objective, Scenario
from fanmark.loadgen.statistics import distribution, gap_distribution
from fanmark.loadgen.steadiness import Verdict, judge
from fanmark.loadgen.tool_report import by_tool
from fanmark.loadgen.unrecorded import Unrecorded
from fanmark.loadgen.waste import waste

SCHEMA = "fanmark.summary/1"
NO_WINDOW = "all queries are counted, no window is set"
UNRECORDED = {
    "steady": None,
    "reason": "the records of some queries are not here",
    "littles_law_off_pct": None,
    "over_capacity": None,
}
NO_WINDOW_YET = "the run was ended before its window began"
CENSORED = 0.01  # of the started queries; if more did not complete, the latencies of those that did are too good


def summarise_arms(
    scenario: Scenario,
    run: Reduced,
    windows: Sequence[Window] = (),
    samples: Sequence[Sample] = (),
    cut_at: float | None = None,
) -> dict[str, Any]:
    """`arms` of summary.json from all of a run's queries, windows and samples; what is not counted is load, and nothing else. `cut_at`:
    when a run was cut short. The run's calls are used up: the amplifications, which come last, need their memory."""
    by_arm = counted_by_arm(scenario, run, windows, kv_use(samples), cut_at)
    found: dict[str, Any] = {}
    for arm in scenario.arms:
        mine, counted = run.where(partial(_of_arm, name=arm.name)), by_arm[arm.name]
        own, set_load = mine.where(lambda kind: not kind.warmup), scenario.load_of(arm)
        partly = arm.name in run.unrecorded
        load = unknown(set_load) if partly else operating_point(set_load, scenario.objective, mine, counted.windows)
        found[arm.name] = _arm(arm, scenario, own) | {
            "load": load,
            "window": _window(set_load, counted, cut_at is not None) | (UNRECORDED if partly else {}),
            "saturation": saturation(scenario, arm, run, counted.windows, load["offered_qps"], samples)
            if load and load["offered_qps"] and not partly
            else None,
        }
        met = found[arm.name]["objective"] or {"good": found[arm.name]["queries"]["completed"]}
        good, metered = (0, ()) if partly else (met["good"], samples)  # what servers took was for all queries
        found[arm.name]["cost"] = cost_part(arm, scenario, own, good, counted.windows, metered)
    run.calls.clear()
    base, interleaved = by_arm[scenario.baseline.name], scenario.load.arms == "interleaved"
    for arm in scenario.arms:
        found[arm.name]["amplification"] |= {
            name: None
            if scenario.tapped
            or (name in TIMES and not run.unrecorded.keys().isdisjoint((arm.name, scenario.baseline.name)))
            else amplification(by_arm[arm.name], base, name, scenario.seed, interleaved=interleaved)
            for name in (*COUNTS, *TIMES)
        }
        found[arm.name]["claim"] = held(arm, partial(_claimed, found[arm.name]))
    return found


def _of_arm(kind: QueryKind | CallKind, name: str) -> bool:
    return kind.arm == name


def counted_by_arm(
    scenario: Scenario,
    run: Reduced,
    windows: Sequence[Window],
    kv: Sequence[tuple[float, float]] | None,
    cut_at: float | None,
) -> dict[str, Counted]:
    """What counts of each arm."""
    windows = [msgspec.structs.replace(w, end_at=min(w.end_at, cut_at or math.inf)) for w in windows]
    windows = [window for window in windows if window.seconds > 0]
    by_arm: dict[str, Counted] = {}
    for arm in scenario.arms:
        mine = run.queries.where(partial(_of_arm, name=arm.name))
        own = [window for window in windows if arm.name in window.arms]
        # what a run that was cut short left over says nothing of its capacity
        open_loop = scenario.load_of(arm).mode == "open" and cut_at is None
        verdicts = [_verdict(run, mine, window, kv, open_loop=open_loop) for window in own]
        by_arm[arm.name] = Counted(mine.where(lambda kind: not kind.warmup), own, verdicts)
    return by_arm


def _verdict(
    run: Reduced,
    mine: Rows[QueryKind],
    window: Window,
    kv: Sequence[tuple[float, float]] | None,
    *,
    open_loop: bool,
) -> Verdict:
    beside = run.where(lambda kind: kind.arm in window.arms)
    own, others = (rows.where(lambda kind: kind.repeat == window.repeat) for rows in (mine, beside.queries))
    return judge(own, others, beside.calls, window, kv, open_loop=open_loop)


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


def _arm(arm: Arm, scenario: Scenario, counted: Reduced) -> dict[str, Any]:
    queries, calls = counted.queries, counted.calls.where(lambda kind: not kind.retried)
    completed = queries.where(lambda kind: kind.outcome == "completed")
    needed = calls.where(lambda kind: kind.outcome == "completed" and kind.needed)
    outcomes = queries.counts(lambda kind: kind.outcome)
    sums = counted.sums.get(arm.name, Sums())
    critical_s = math.fsum(completed.known("critical_path_s"))
    latencies_s = (done_at - due_at for due_at, done_at in completed.rows("due_at", "done_at"))
    in_time = len(completed.where(lambda kind: kind.in_time))
    turns = completed.where(lambda kind: kind.turn is not None)
    forced = scenario.workload.lengths == "forced"
    more, wasted = counted.unrecorded.get(arm.name), waste(counted, sums.lost_s)
    queries_told = {
        "started": len(queries),
        "completed": outcomes["completed"],
        "failed": outcomes["failed"],
        "abandoned": outcomes["abandoned"],
    }
    if more is not None:
        queries_told = {name: n + more.queries[name] for name, n in queries_told.items()}
    found: dict[str, Any] = {
        "topology": arm.topology,
        "params": arm.params,
        "baseline": arm.baseline,
        "queries": queries_told,
        "unrecorded": None if more is None else {**more.queries, "per_query": more.means},
        "censored": queries_told["completed"] < (1 - CENSORED) * queries_told["started"],
        "load": {},
        "window": {},
        "per_query": {name: _of(completed, name) for name in (*COUNTS, *TIMES)},
        "per_call": _per_call(needed.where(lambda kind: kind.ended), sums.gaps),
        "expected": _expected(completed, 0 if more is None else more.mismatched),
        "amplification": {},
        **_groups(needed, critical_s),
        "by_tool": by_tool(calls, critical_s),
        "objective": _objective(queries_told["started"], latencies_s, in_time, scenario.objective, more),
        "errors": _errors(calls, {} if more is None else more.errors),
        "quality": quality(queries, scenario.questions, forced=forced),
        "fidelity": _fidelity(completed.where(lambda kind: kind.replayed)),
        "stopped": dict(completed.where(lambda kind: kind.stopped is not None).counts(lambda kind: kind.stopped)),
        "by_part": _per_query_by(completed, lambda kind: kind.part or "") if arm.mix else None,
        "by_turn": _per_query_by(turns, lambda kind: kind.turn) if scenario.load.users is not None else None,
        "critical_path": critical.shares(sums.spent_s),
        "waste": wasted if more is None else dict.fromkeys(wasted),
        "claim": None,
        "failures": dict(sums.failures.most_common(3)),
    }
    return found


def _objective(
    started: int, latencies_s: Iterable[float], in_time: int, objective: Objective | None, more: Unrecorded | None
) -> dict[str, Any] | None:
    if more is None or objective is None:
        return objective_part(started, latencies_s, in_time, objective)
    return objective_part(started, latencies_s, None, objective, more.good(objective.query_seconds))


def _errors(calls: Rows[CallKind], more: Mapping[str, int]) -> dict[str | None, int]:
    """How many calls and tool calls failed, by class; what was given up did not."""
    failed = calls.where(lambda kind: kind.error not in (None, "cancelled"))
    own = len(calls.where(lambda kind: kind.tool_error))
    found = failed.counts(lambda kind: kind.error)
    found["tool_error"] += own
    found.update(more)
    return {name: n for name, n in found.items() if n}


def _claimed(found: Mapping[str, Any], unit: str, resource: str) -> float | None:
    """What a claim is held against: the ratio to the baseline, or the mean per query."""
    part, key = ("amplification", "ratio") if unit == "x" else ("per_query", "mean")
    entry: dict[str, float] | None = found[part][resource]
    return entry[key] if entry is not None else None


def _of(queries: Rows[QueryKind], name: str) -> Any:
    return None if queries.unknown(name) else distribution(queries[name])


def _first_and_last(ended: Rows[CallKind]) -> dict[str, Any]:
    return {"ttft_s": distribution(ttft_s(ended)), "latency_s": distribution(seconds(ended))}


def _per_call(ended: Rows[CallKind], gaps: Mapping[int, int]) -> dict[str, Any]:
    tpot = (
        (done_at - first_at) / (output_tokens - 1)
        for first_at, done_at, output_tokens in ended.rows("first_at", "done_at", "output_tokens")
        if first_at is not None and done_at is not None and (output_tokens or 0) > 1
    )
    return {
        **_first_and_last(ended),
        "tpot_s": distribution(tpot),
        "itl_s": gap_distribution(gaps),
        "connect_s": distribution(ended.known("connect_s")),
    }


def _expected(queries: Rows[QueryKind], differ_besides: int) -> dict[str, Any]:
    """Means of the closed form over completed queries; an unknown one is None and `approximate` is then true. `at_most`: it is a bound,
    with `output_at_most` of output tokens alone."""
    found: dict[str, Any] = {name: queries.mean(f"expected_{name}") for name in EXPECTED}
    found["mismatches"] = len(queries.where(lambda kind: kind.differs)) + differ_besides
    found["at_most"] = any(kind.bound for kind, _ in queries.kinds())
    found["output_at_most"] = found["at_most"] or any(kind.output_bound for kind, _ in queries.kinds())
    found["approximate"] = len(queries) > 0 and found["input_tokens"] is None
    return found


def _fidelity(replayed: Rows[QueryKind]) -> dict[str, float | None] | None:
    """Means of fidelity.py's measures; one that is not known of a query is not known. None where nothing was replayed."""
    return {name: replayed.mean(f"fidelity_{name}") for name in MEASURES} if len(replayed) else None


def _groups(needed: Rows[CallKind], critical_s: float) -> dict[str, Any]:
    """by_role, by_round and by_target: calls, tokens and times; `critical_share` is the group's part of all critical paths."""
    groups: dict[str, Callable[[CallKind], str]] = {
        "by_role": lambda kind: kind.role,
        "by_round": lambda kind: str(kind.round),
        "by_target": lambda kind: kind.target or "",
    }
    calls = needed.where(lambda kind: kind.kind == "call")
    return {
        by: {name: _group(mine, critical_s) for name, mine in sorted(calls.by(group).items())}
        for by, group in groups.items()
    }


def _group(calls: Rows[CallKind], critical_s: float) -> dict[str, Any]:
    return {
        "calls": len(calls),
        **{kind: calls.total(kind) for kind in ("input_tokens", "cached_tokens", "output_tokens")},
        **_first_and_last(calls.where(lambda kind: kind.ended)),
        "critical_share": on_critical_path_s(calls) / critical_s if critical_s else None,
    }


def _per_query_by(queries: Rows[QueryKind], group: Callable[[QueryKind], Any]) -> dict[str, Any]:
    """By part of a mix, or by turn of a session: how many queries there were, and their per_query resources."""
    return {
        str(name): {"queries": len(mine), **{resource: _of(mine, resource) for resource in (*COUNTS, *TIMES)}}
        for name, mine in sorted(queries.by(group).items())
    }


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
