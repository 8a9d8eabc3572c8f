"""What a run leaves: the whole of summary.json put together, and what is printed of it."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import msgspec

from fanmark.agents.replay import TOPOLOGY as REPLAY
from fanmark.loadgen import frozen, summary, table
from fanmark.loadgen.cost_part import all_simulated
from fanmark.loadgen.endpoint import Endpoint
from fanmark.loadgen.errors import LostError
from fanmark.loadgen.records import Window
from fanmark.loadgen.reduced import CallKind, Reduced, Rows
from fanmark.loadgen.report.words import title
from fanmark.loadgen.run import Ending
from fanmark.loadgen.samples import Sample
from fanmark.loadgen.scenario import Scenario
from fanmark.loadgen.table import number
from fanmark.loadgen.tally import Tally
from fanmark.loadgen.thresholds import judged
from fanmark.loadgen.thresholds import lines as threshold_lines
from fanmark.loadgen.tool_report import Listing, tools_part

MATCHED = 0.05  # so near to each other must the calls in flight of matched arms be
ClientReport = Callable[[Rows[CallKind]], dict[str, Any]]  # of the counted calls that were sent; see health.client_part


def assemble(
    scenario: Scenario,
    run: Reduced,
    endpoints: Mapping[str, Endpoint],
    server: dict[str, Any],
    client_report: ClientReport,
    run_part: dict[str, Any],
    stub: tuple[bool, str] | None = None,
    *,
    ending: Ending | None,
    windows: Sequence[Window] = (),
    tools: Listing | None = None,
    samples: Sequence[Sample] = (),
) -> dict[str, Any]:
    """The whole of summary.json."""
    counted = counted_calls(run)
    client, tools_told = client_report(counted), tools_part(tools, run.calls)
    cut_at = run_part["seconds"] if ending is not None else None
    told = tells_cached(counted) or not answered(counted)
    found = recomputable(scenario, run, windows, samples, cut_at, client, server, stub)
    if run_part["clock"] == "virtual":
        all_simulated(found["arms"])
    parts = list(server.values()) if "reconciled" not in server else [server]
    targets = {
        name: {"url": e.config.replicas[0], "model": e.model, "server": e.server, "lane": e.lane.name}
        | ({"urls": e.config.replicas, "spread": e.config.spread} if e.config.urls else {})
        for name, e in endpoints.items()
    }
    whole = {
        "schema": summary.SCHEMA,
        "partial": ending is not None,
        "ended": None if ending is None else {"why": ending.why, "reason": ending.reason},
        "run": run_part,
        "target": next(iter(targets.values())) if len(targets) == 1 else targets,
        **found,
        "client": client,
        "server": server,
        "tools": tools_told,
        "notes": _notes(scenario, found["arms"], endpoints, parts, run, told=told),
    }
    return whole | {"thresholds": judged(scenario.threshold, whole), "label": frozen.label(scenario, whole)}


def counted_calls(run: Reduced) -> Rows[CallKind]:
    """The counted queries' calls that were sent."""
    return run.calls.where(lambda kind: not kind.warmup and not kind.retried and kind.kind == "call" and kind.sent)


def answered(calls: Rows[CallKind]) -> bool:
    """Whether one of them was answered at all: else nothing is known of what a server tells."""
    return any(kind.error is None for kind, _ in calls.kinds())


def tells_cached(calls: Rows[CallKind]) -> bool:
    """Whether one of them told its cached tokens."""
    return calls.unknown("cached_tokens") < len(calls)


def recomputable(
    scenario: Scenario,
    run: Reduced,
    windows: Sequence[Window],
    samples: Sequence[Sample],
    cut_at: float | None,
    client: Mapping[str, Any],
    server: Mapping[str, Any],
    stub: tuple[bool, str] | None,
) -> dict[str, Any]:
    """What of summary.json follows from the records, given what client and servers told of themselves. Uses up the run's calls
    (summarise_arms)."""
    counted = counted_calls(run)
    warm, heard = scenario.tapped or scenario.workload.cache == "warm", answered(counted)
    knowable = not warm and tells_cached(counted)
    arms = summary.summarise_arms(scenario, run, windows, samples, cut_at)
    if scenario.workload.lengths != "forced":
        for arm in arms.values():
            arm["expected"]["output_at_most"] = True
    parts = list(server.values()) if "reconciled" not in server else [server]
    ticked = {
        key: None if any(p[key] is None for p in parts) else all(p[key] for p in parts)
        for key in ("reconciled", "alone")
    } | {said: "; ".join(dict.fromkeys(p[said] for p in parts)) for said in ("reason", "alone_reason")}
    unexplained = run.unexplained_tokens if knowable else None
    written, reread = run.written_tokens, run.reread_tokens
    return {
        "validity": summary.validity(arms, ticked, client, unexplained, stub, warm=warm, heard=heard),
        "arms": arms,
        "retokenized_pct": 100.0 * (reread - written) / written if written else None,
    }


def _notes(
    scenario: Scenario,
    arms: Mapping[str, Any],
    endpoints: Mapping[str, Endpoint],
    servers: Sequence[Mapping[str, Any]],
    run: Reduced,
    *,
    told: bool,
) -> list[str]:
    """What the user must be told, a line each. `told`: calls tell their cached tokens."""
    notes = [note for endpoint in endpoints.values() for note in endpoint.notes]
    if not told and scenario.workload.cache != "warm":
        notes.append(
            "the target reports no cached tokens (vLLM: --enable-prompt-tokens-details): cached and fresh are unknown"
            + "".join(_servers_mean(part, len(scenario.arms)) for part in servers)
        )
    forced = scenario.workload.lengths == "forced"
    if not forced:
        notes.append('lengths = "natural": replies end by themselves, so that the expected output tokens are a bound')
    notes += [
        _degenerate(part["draft_acceptance"]) for part in servers if forced and part.get("draft_acceptance") is not None
    ]
    reasons = dict.fromkeys(q["reason"] for arm in arms.values() if (q := arm["quality"]) is not None)
    notes += [f"quality is not judged: {reason}" for reason in reasons if reason is not None]
    asked = len(set(run.queries["number"])) if scenario.questions else 0
    if asked > len(scenario.questions):
        notes.append(
            f"{len(scenario.questions)} questions for {asked} queries: they come again, and are then in the prefix cache"
        )
    if scenario.load.match == "calls":
        notes.append(_matched(scenario, arms))
    if scenario.load.match == "capacity":
        rates = ", ".join(f"{arm.name} {number(scenario.load_of(arm).rate)} queries/s" for arm in scenario.arms)
        notes.append(f"each arm is at {scenario.load.fraction:.0%} of its own capacity: {rates}")
    if forced and not scenario.questions and all(_constant(scenario, arm.name) for arm in scenario.arms):
        notes.append(
            "all questions and answers have constant lengths: equal queries run in phase, latencies hold for this pattern only"
        )
    notes += scenario.unlike_baseline()
    return notes


def _degenerate(acceptance: float) -> str:
    return (
        f"the server guesses tokens ahead ({acceptance:.1%} of them accepted), and forced lengths are degenerate: text that goes on "
        'behind its end is guessed as no answer is, and its times are no answer\'s: lengths = "natural"'
    )


def _servers_mean(server: Mapping[str, Any], arms: int) -> str:
    """What stands in for the calls' own cached tokens: a mean that is an arm's own only where there is no other."""
    cached, fresh = server.get("cached_tokens_per_query"), server.get("fresh_tokens_per_query")
    if cached is None or fresh is None:
        return ""
    over = "all queries" if arms == 1 else f"the queries of all {arms} arms"
    return f"; by the server's own counters {table.number(cached)} cached and {table.number(fresh)} fresh a query, the mean of {over}"


def write_summary(out: Path, found: Mapping[str, Any]) -> None:
    """summary.json. Raises LostError."""
    try:
        (out / "summary.json").write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=1) + b"\n")
    except OSError as e:
        raise LostError(
            f"{out}/summary.json: cannot be written ({e.strerror}): the records of all queries are beside it"
        ) from None


def so_far(tally: Tally) -> str:
    """What was measured until a run broke off, in one line: its records may be lost."""
    said = []
    for name, arm in tally.arms.items():
        mean = f", {number(arm.sums['latency_s'] / arm.completed)} s on average" if arm.completed else ""
        said.append(f"{name} completed {arm.completed} of {arm.started} queries{mean}")
    return "; ".join(said)


def _matched(scenario: Scenario, arms: Mapping[str, Any]) -> str:
    """The rates that the pilot chose, and whether calls in flight came out as near to each other as it thought."""
    points = {name: arm["load"] for name, arm in arms.items() if arm["load"]}
    told = ", ".join(
        f"{name} {number(point['offered_qps'])} queries/s ({number(point['calls_in_flight']['mean'])} calls in flight)"
        for name, point in points.items()
    )
    flights = {name: mean for name, point in points.items() if (mean := point["calls_in_flight"]["mean"]) is not None}
    base = flights.get(scenario.baseline.name)
    apart = max(abs(mean / base - 1) for mean in flights.values()) if base else 0.0
    but = f": {apart:.0%} apart, a longer duration evens out chance" if apart > MATCHED else ""
    return f"rates were matched by a pilot: {told or 'it was cut short'}{but}"


def _constant(scenario: Scenario, arm: str) -> bool:
    told = next(a for a in scenario.arms if a.name == arm)
    workload = scenario.workload_of(told)
    replayed = any(part.topology == REPLAY.name for part in told.mix or [told])
    return isinstance(workload.answer, int) and isinstance(workload.question, int) and not replayed


def print_result(found: Mapping[str, Any], out: Path, to: TextIO | None = None) -> None:
    """The table, the checks, and where the files are."""
    label = [frozen.line(found["label"])] if found["label"] else []
    with suppress(BrokenPipeError):
        print(title(found), file=to)
        if found["partial"]:
            print(f"{found['ended']['why'].upper()}: {found['ended']['reason']}", file=to)
        print(
            "\n".join(
                [
                    "",
                    *table.lines(found),
                    *threshold_lines(found),
                    *label,
                    f"files    {out}",
                    f"report   {out}/report.html",
                ]
            ),
            file=to,
        )
