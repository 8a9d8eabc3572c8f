"""What a run says at its end, as lines of text. Pure."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fanmark.loadgen.amplification import BATCH_LATENCIES, LEAST_BATCHES, LEAST_REPEATS, NO_INTERVAL
from fanmark.loadgen.claims import rows as claim_rows
from fanmark.loadgen.cost_part import rows as cost_rows
from fanmark.loadgen.tap.words import tables as tap_tables
from fanmark.loadgen.tool_report import tool_lines

ROWS = (
    ("calls", "calls"),
    ("tool_calls", "tool calls"),
    ("input_tokens", "input tokens"),
    ("cached_tokens", "  cached"),
    ("fresh_tokens", "  fresh"),
    ("output_tokens", "output tokens"),
    ("latency_s", "latency, s"),
    ("first_answer_s", "first of answer, s"),
    ("work_s", "work, s"),
    ("critical_path_s", "critical path, s"),
    ("gpu_s", "GPU time, s"),
    ("joules", "energy, J"),
    ("dollars", "dollars"),
)
PER_CORRECT = (
    ("calls", "calls"),
    ("input_tokens", "tokens in"),
    ("fresh_tokens", "fresh"),
    ("output_tokens", "tokens out"),
    ("dollars", "dollars"),
    ("latency_s", "latency, s"),
)
SPENT = {  # parts of the latency, along the critical path (critical.py)
    "waiting": "latency: waiting",
    "prefill": "latency: prefill",
    "decode": "latency: decode",
    "tools": "latency: tools",
    "client": "latency: client",
}
TICKS = {
    "counted": "counted",
    "reconciled": "reconciled",
    "alone": "alone",
    "steady": "steady",
    "uncontaminated": "uncontaminated",
    "client_ok": "client ok",
    "stub_on_time": "stub on time",
}


def number(value: float | None) -> str:
    """Three or four figures, thousands apart; an unknown one is a dash."""
    if value is None:
        return "-"
    if value == int(value) and abs(value) < 1e6:
        return f"{value:,.0f}"
    small = min(12, 3 - math.floor(math.log10(abs(value))))  # below 1: four figures after the zeros
    digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 100 else 2 if abs(value) >= 1 else small
    return f"{value:,.{digits}f}"


def short(value: float | None) -> str:
    """Two or three figures; an unknown one is a dash."""
    return "-" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def ratio(found: Mapping[str, Any] | None) -> str:
    """`9.00x [8.90, 9.10]`; without an interval just the ratio; a dash where there is none."""
    if found is None or found["ratio"] is None:
        return "-"
    text = f"{found['ratio']:.2f}x"
    if found["low"] is None:
        return text
    return f"{text} [{found['low']:.2f}, {found['high']:.2f}]"


def lines(summary: Mapping[str, Any]) -> list[str]:
    """The ticks, the amplification table, the checks and the notes."""
    arms = summary["arms"]
    baseline = next(name for name, arm in arms.items() if arm["baseline"])
    tapped = [line for rows in tap_tables(summary, number).values() for line in [*columns(rows), ""]]
    return [
        *(f"{mark:>9}  {title:<15} {reason}" for mark, title, reason in ticks(summary["validity"])),
        "",
        "per query" if tapped else f"per query, and against {baseline!r} (95 % interval where there is one)",
        *folded(amplification_rows(arms)),
        *intervals(arms),
        "",
        *(tapped or ["expected (closed form) against measured, per query", *columns(expected_rows(arms)), ""]),
        *_cost_lines(arms),
        *_target_lines(arms),
        *_fidelity_lines(arms),
        *_quality_lines(arms),
        *claim_lines(arms, "measured"),
        *checks(summary),
    ]


def _fidelity_lines(arms: Mapping[str, Any]) -> list[str]:
    rows = fidelity_rows(arms)
    return ["fidelity of the replay: the share that is as recorded, per query", *columns(rows), ""] if rows else []


def fidelity_rows(arms: Mapping[str, Any]) -> list[list[str]]:
    """How near the arms that replay a recording came to it, below a row of titles; nothing where none does."""
    found = {name: told for name, arm in arms.items() if (told := arm.get("fidelity")) is not None}
    if not found:
        return []
    measures = list(next(iter(found.values())))
    rows = [[name, *("-" if v is None else f"{v:.3f}" for v in told.values())] for name, told in found.items()]
    return [["", *(measure.replace("_", " ") for measure in measures)], *rows]


def _cost_lines(arms: Mapping[str, Any]) -> list[str]:
    rows = cost_rows(arms, number)
    widths = [max(len(row[-1]) for row in rows)] if rows else []
    return ["cost per query", *columns([[*row[:-1], row[-1].ljust(widths[0])] for row in rows]), ""] if rows else []


def _quality_lines(arms: Mapping[str, Any]) -> list[str]:
    rows = quality_rows(arms)
    return ["answers against the known ones, and what was spent for each right one", *columns(rows), ""] if rows else []


def quality_rows(arms: Mapping[str, Any]) -> list[list[str]]:
    """How many of each arm's answers are right, and what one costs, below a row of titles; nothing where none was judged."""
    found = {name: arm["quality"] for name, arm in arms.items() if arm["quality"] and arm["quality"]["judged"]}
    if not found:
        return []
    costs = [
        (key, title) for key, title in PER_CORRECT if any(q["per_correct"][key] is not None for q in found.values())
    ]
    rows = [["", "right", "share (95 %)", *(title for _, title in costs)]]
    for name, q in found.items():
        share = f"{q['share']:.1%} [{q['low']:.1%}, {q['high']:.1%}]"
        rows.append(
            [name, f"{q['correct']} of {q['judged']}", share, *(number(q["per_correct"][key]) for key, _ in costs)]
        )
    return rows


def claim_lines(arms: Mapping[str, Any], found: str) -> list[str]:
    """The claims of the arms' presets, and a line for each resource that is known; `found`: what it is known by."""
    claims = {name: arm["claim"] for name, arm in arms.items() if arm["claim"] is not None}
    if not claims:
        return []
    rows = [row for name, claim in claims.items() for row in claim_rows(name, claim, number)]
    told = [
        line for name, claim in claims.items() for line in (f"{name}: {claim['text']}", f"  source: {claim['source']}")
    ]
    return ["claims under test", *told, *columns([("", "claimed", found, ""), *rows]), ""]


def ticks(validity: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """A mark, the tick and its reason; what failed first, then what is not known, then what holds."""
    marks = {False: "FAILED", None: "not known", True: "ok"}
    ordered = sorted(
        (name for name in TICKS if name in validity), key=lambda name: {False: 0, None: 1, True: 2}[validity[name]]
    )
    return [(marks[validity[name]], TICKS[name], validity["reasons"][name]) for name in ordered]


def amplification_rows(arms: Mapping[str, Any]) -> list[list[str]]:
    """Means per query, ratios to the baseline, and the operating point that they hold at; the first row holds the arms' names."""
    head, rows = [""], []
    for name, arm in arms.items():
        head += [name] if arm["baseline"] else [name, ""]
    for key, title in ROWS:
        if all(arm["per_query"][key] is None for arm in arms.values()):
            continue
        row = [title]
        for arm in arms.values():
            found = arm["per_query"][key]
            row.append(number(found["mean"] if found else None))
            if not arm["baseline"]:
                row.append(ratio(arm["amplification"][key]))
        rows.append(row)
    for title, key in (("queries/s", "completed_qps"), ("calls in flight", "calls_in_flight")):
        row = [title]
        for arm in arms.values():
            found = arm["load"].get(key)
            row.append(number(found["mean"] if isinstance(found, dict) else found))
            row += [] if arm["baseline"] else [""]
        rows.append(row)
    parts = {name: arm["critical_path"] for name, arm in arms.items()}
    for part, title in SPENT.items():
        if any(spent is not None and spent[part] >= 0.0005 for spent in parts.values()):
            row = [title]
            for name, arm in arms.items():
                spent = parts[name]
                row.append("-" if spent is None else f"{spent[part]:.1%}")
                row += [] if arm["baseline"] else [""]
            rows.append(row)
    return [head, *rows]


def intervals(arms: Mapping[str, Any]) -> list[str]:
    """What the intervals of times rest on; where there are none, what would give them."""
    found = [arm["amplification"]["latency_s"] for arm in arms.values() if not arm["baseline"]]
    methods = list(dict.fromkeys(each["method"] for each in found if each is not None))
    latencies = [arm["per_query"]["latency_s"] for arm in arms.values() if arm["per_query"]["latency_s"] is not None]
    if not methods or not latencies:
        return []
    if methods != [NO_INTERVAL]:
        return [f"times: {', '.join(methods)}"]
    long_s = max(each["p90"] or each["max"] for each in latencies)
    least_s = math.ceil(LEAST_BATCHES * BATCH_LATENCIES * long_s)
    return [
        f"times: {NO_INTERVAL} (load.repeats = {LEAST_REPEATS} gives one, or interleaved arms for load.duration = {least_s})"
    ]


def expected_rows(arms: Mapping[str, Any]) -> list[list[str]]:
    """The closed form against what was measured, by arm, below a row of titles."""
    keys = ("calls", "tool_calls", "input_tokens", "output_tokens", "depth", "width")
    rows = [["", *(key.replace("_", " ") for key in keys), "queries", "differ"]]
    for name, arm in arms.items():
        row, form = [name], arm["expected"]
        for key in keys:
            measured = arm["per_query"][key]
            bound = form["output_at_most" if key == "output_tokens" else "at_most"]
            at_most = "<= " if bound else ""
            row.append(f"{at_most}{number(arm['expected'][key])} / {number(measured['mean'] if measured else None)}")
        rows.append([*row, number(arm["queries"]["completed"]), number(arm["expected"]["mismatches"])])
    return rows


def _target_lines(arms: Mapping[str, Any]) -> list[str]:
    """What each target does of a query, in arms that have several."""
    rows: list[list[str]] = []
    for name, arm in arms.items():
        by_target, queries = arm["by_target"], recorded(arm)
        if len(by_target) > 1 and queries:
            head, *own = group_rows(by_target, {target: f"{name}: {target}" for target in by_target}, queries)
            rows += own if rows else [head, *own]
    return ["by target", *columns(rows), ""] if rows else []


def recorded(arm: Mapping[str, Any]) -> int:
    """Of how many completed queries an arm's calls are: of all, but for those whose records are lost."""
    lost = arm.get("unrecorded")
    return int(arm["queries"]["completed"] - (0 if lost is None else lost["completed"]))


def group_rows(group: Mapping[str, Any], titles: Mapping[str, str], queries: int) -> list[list[str]]:
    """What each role, round or target of an arm has of a mean query, below a row of titles."""
    rows = [["per query", "calls", "input", "cached", "output", "TTFT p50, s", "latency p50, s", "of critical paths"]]
    for name, title in titles.items():
        found = group[name]
        counts = [found[kind] for kind in ("calls", "input_tokens", "cached_tokens", "output_tokens")]
        times = [found[kind] and found[kind]["p50"] for kind in ("ttft_s", "latency_s")]
        share = found["critical_share"]
        rows.append([
            title, *(number(None if n is None else n / queries) for n in counts), *map(number, times),
            "-" if share is None else f"{share:.1%}",
        ])  # fmt: skip
    return rows


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """First column to the left, the others to the right, as wide as they need."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def folded(rows: Sequence[Sequence[str]], width: int = 120) -> list[str]:
    """Columns in blocks below each other, each not wider than `width`; a column without a title stays with the one before it."""
    groups: list[list[int]] = []
    for i, title in enumerate(rows[0][1:], start=1):
        if title or not groups:
            groups.append([i])
        else:
            groups[-1].append(i)
    found, shown = [], list[int]()
    for group in groups:
        if shown and max(map(len, columns([[row[i] for i in (0, *shown, *group)] for row in rows]))) > width:
            found += [*columns([[row[i] for i in (0, *shown)] for row in rows]), ""]
            shown = []
        shown += group
    return found + columns([[row[i] for i in (0, *shown)] for row in rows])


def checks(summary: Mapping[str, Any]) -> list[str]:
    """Client, servers, failures, waste, objectives and notes, a line each that begins with who it is about."""
    found = _client(summary["client"])
    servers = summary["server"]
    for name, server in servers.items() if "reconciled" not in servers else [("server", servers)]:
        found += _server(name, server)
    found += tool_lines(summary)
    for name, arm in summary["arms"].items():
        queries = arm["queries"]
        if queries["failed"] or queries["abandoned"] or arm["errors"]:
            errors = ", ".join(f"{kind} {n}" for kind, n in arm["errors"].items())
            found.append(
                f"{name:<8} {queries['failed']} failed, {queries['abandoned']} abandoned of {queries['started']}"
                + (f": {errors}" if errors else "")
            )
            for message, n in arm["failures"].items():
                found.append(f"{'':<8} {n} x {message}")
            if arm["censored"]:
                found.append(f"{'':<8} more than 1 % did not complete: latencies are censored")
        if arm["load"].get("held_back"):
            delay_s = arm["load"]["start_delay_s"]
            found.append(
                f"{name:<8} the guard held {arm['load']['held_back']} of {queries['started']} queries back, {number(delay_s['mean'])} s on "
                f"average, at most {number(delay_s['max'])} s: their latency counts from when they were due"
            )
        if arm["stopped"]:
            why = ", ".join(f"{limit} {n}" for limit, n in arm["stopped"].items())
            found.append(
                f"{name:<8} {sum(arm['stopped'].values())} queries were stopped by a limit ({why}): counts are bounds"
            )
        for part, mine in (arm["by_part"] or {}).items():
            calls, latency = mine["calls"], mine["latency_s"]
            found.append(
                f"{name:<8} {part}: {mine['queries']} queries, {number(calls['mean'])} calls and {number(latency['mean'])} s each"
            )
        if turns := list((arm["by_turn"] or {}).items()):
            told = [
                f"turn {turn} {number((mine['input_tokens'] or {}).get('mean'))} tokens in and {number(mine['latency_s']['mean'])} s"
                for turn, mine in (turns if len(turns) < 3 else [turns[0], turns[-1]])
            ]
            found.append(f"{name:<8} on average of its sessions: {', '.join(told)}")
        waste = arm["waste"]
        if waste["given_up"]:
            found.append(
                f"{name:<8} {waste['given_up']} calls were given up as needed no more: what they cost is not in the tokens"
            )
        if waste["retries"]:
            why = ", ".join(f"{kind} {n}" for kind, n in waste["retried"].items())
            found.append(
                f"{name:<8} {waste['retries']} attempts were sent again ({why}): wasted {number(waste['calls'])} calls, "
                f"{number(waste['input_tokens'])} tokens in, {number(waste['output_tokens'])} out, {number(waste['seconds'])} s"
            )
        if arm["objective"] is not None and arm["objective"]["attainment"] is not None:
            said = [_met("objective", arm["objective"]) + " in time"]
            if arm["objective"]["per_call"] is not None:
                said.append(_met("per call", arm["objective"]["per_call"]) + " with all calls in time")
            found.append(f"{name:<8} {'; '.join(said)}")
    return found + [f"note     {note}" for note in summary["notes"]]


def _met(what: str, share: Mapping[str, Any]) -> str:
    return f"{what} {'met' if share['met'] else 'missed'}: {share['attainment']:.1%}"


def _server(name: str, server: Mapping[str, Any]) -> list[str]:
    """The counters that could be compared (finishes only where they differ), what is told beside them, and the KV turnover."""
    pairs = []
    for counter, pair in server.items():
        if isinstance(pair, dict) and pair["client"] is not None and (pair["off_pct"] or "success_" not in counter):
            sign = "=" if pair["off_pct"] == 0 else "!="
            pairs.append(f"{counter} {number(pair['client'])} {sign} {number(pair['server'])}")
    alone = (name for name in ("preemptions", "request_success_abort") if server.get(name, {}).get("client", 0) is None)
    pairs += [f"{name} {number(server[name]['server'])}" for name in alone if server[name]["server"]]
    found = [f"{name:<8} {', '.join(pairs) or server['reason']}"]
    if server.get("kv_turnover") is not None:
        written, capacity = number(server["kv_written_tokens"]), number(server["kv_capacity_tokens"])
        bound = ": the hit rate is an upper bound" if server["kv_turnover"] < 1 else ""
        found.append(f"{'':<8} KV written {written} of {capacity} tokens ({server['kv_turnover']:.2f}x){bound}")
    if server.get("draft_acceptance") is not None:
        drafted = number(server["draft_tokens"]["server"])
        found.append(f"{'':<8} guessed ahead {drafted} tokens, {server['draft_acceptance']:.1%} of them accepted")
    if "idle_w" in server:
        found.append(f"{'':<8} GPUs drew {number(server['idle_w'])} W before the run")
    if "engine_busy_s" in server:
        joules = "" if server["engine_joules"] is None else f", {number(server['engine_joules'])} J"
        idle = ""
        if "engine_slack_s" in server:
            slack_s, waste_s = server["engine_slack_s"], server["engine_waste_s"]
            idle = f", of it slack {number(slack_s)} s (batches not full), computed again {number(waste_s)} s"
            idle += f"; idle {number(server['engine_idle_s'])} s" if "engine_idle_s" in server else ""
        found.append(f"{'':<8} engine busy {number(server['engine_busy_s'])} s{idle}{joules}")
    return found


def _client(client: Mapping[str, Any]) -> list[str]:
    if client["loop_lag_s"] is None and client["cpu_s"] is None:
        return [f"client   {client['verdict']}: {'; '.join(client['reasons'])}"]
    return [
        f"client   {client['verdict']}: loop lag p50 {_ms(client['loop_lag_s'])}, send delay p50 {_ms(client['send_delay_s'])}, "
        f"coalesced {client['coalesced_share']:.1%}, CPU {client['cpu_s']:.1f} s, memory {client['rss_mb']:.0f} MB",
        f"{'':<8} connections: {client['connections']['new']:,} new, {client['connections']['reused']:,} reused",
    ]


def _ms(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "-"
    p99 = f", p99 {found['p99'] * 1e3:.1f} ms" if found["p99"] is not None else f", max {found['max'] * 1e3:.1f} ms"
    return f"{found['p50'] * 1e3:.1f} ms{p99}"
