"""What a plan says: the answer in a sentence, what binds, what one more knob would do. Pure."""

from collections.abc import Mapping
from typing import Any

from fanmark.loadgen.table import columns, number

Found = Mapping[str, Any]
LITTLE = 0.1  # of the time alone: a fleet that costs a query no more binds nobody


def headlines(found: Found) -> list[str]:
    """A sentence or two for each arm."""
    return [line for name, arm in found["arms"].items() for line in _headline(name, arm, found)]


def _headline(name: str, arm: Found, found: Found) -> list[str]:
    plan, on = found["plan"], arm["on"]["query"]
    about = found["objectives"]["query"]
    demand = _demand(plan)
    knee, fails = on["knee"], on["bracket"]["low"]
    if knee is None:
        most = max(point["x"] for point in on["points"])
        return [f"{name}: no number of replicas up to {number(most)} carries {demand} on {about['title']}"]
    point = next(each for each in on["points"] if each["x"] == knee["x"])
    share = f"{point['attainment']:.1%} [{point['low']:.1%}, {point['high']:.1%}] in time"
    below = "" if fails is None else f"; {number(fails)} do not"
    undecided = [each for each in on["bracket"]["undecided"] if each < knee["x"]]
    below += f", of {_listed(undecided)} it is not decided" if undecided else ""
    said = [f"{name}: {_replicas(knee['x'])} {'carry' if knee['x'] != 1 else 'carries'} {demand}: {share}{below}"]
    if plan["spare"]:
        said[0] += f"; {number(knee['x'] + plan['spare'])} with {plan['spare']} to spare for a failure"
    return said


def _demand(plan: Found) -> str:
    base = f"{number(plan['rate'])} queries/s" if plan["rate"] is not None else f"{number(plan['users'])} users"
    grown = [f"{1 + plan['growth']:g} for growth"] if plan["growth"] else []
    grown += [f"{plan['peak']:g} at the peak"] if plan["peak"] != 1 else []
    return base + "".join(f" x {each}" for each in grown)


def _replicas(x: float) -> str:
    return f"{number(x)} replica{'s' * (x != 1)}"


def _listed(values: list[float]) -> str:
    return ", ".join(map(number, values))


def binding(plan: Found, about: Found) -> tuple[str, str]:
    """What binds, in a word and in a sentence. The time that a query's calls take in the fleet beyond what they take alone is split:
    requests that wait, by what for; time to the first token; decoding. What prefill adds to everybody's steps is prefill's."""
    alone, at = plan["alone"], plan["missed"] or plan["at"]
    if alone["attainment"] < about["attainment"]:
        tools = alone["critical_tools_s"] > alone["latency_s"] / 2
        what = "tools" if tools else "critical path"
        return what, (
            f"{what}: a query that meets nobody takes {number(alone['latency_s'])} s on average, of which tools take "
            f"{number(alone['critical_tools_s'])} s, and {alone['attainment']:.1%} are in time: no number of replicas mends that"
        )
    parts = extra_s(plan, at)
    work_s = alone["to_first_token_s"] + alone["decode_s"] + alone["tools_s"]
    if sum(parts.values()) < LITTLE * work_s:
        return "critical path", (
            f"critical path: calls take hardly longer than alone ({number(alone['latency_s'])} s a query): the deadline is near what a "
            "query takes, and it is the long ones that miss it"
        )
    what = max(parts, key=lambda name: parts[name])
    return (
        what,
        f"{what}: {_why(what, alone, at)} ({_shares(parts)} of what a query's calls take beyond their time alone)",
    )


def extra_s(plan: Found, at: Found) -> dict[str, float]:
    """Seconds of a query's calls beyond their time alone, by what they are spent on; none below 0."""
    alone, targets = plan["alone"], list(at["targets"].values())
    waits = {
        reason: sum(each["waiting"][reason] for each in targets) / at["queries_per_s"] for reason in ("sequences", "kv")
    }
    budget_s = sum(each["waiting"]["prefill"] for each in targets) / at["queries_per_s"]
    first_s = at["to_first_token_s"] - alone["to_first_token_s"] - sum(waits.values()) - budget_s
    decode_s = max(0.0, at["decode_s"] - alone["decode_s"])
    busy = [each["prefill_share"] or 0.0 for each in targets]
    mixed = sum(busy) / len(busy)
    return {
        "prefill": max(0.0, first_s) + budget_s + mixed * decode_s,
        "decode": (1.0 - mixed) * decode_s,
        "KV": waits["kv"],
        "sequences": waits["sequences"],
        "tools": max(0.0, at["tools_s"] - alone["tools_s"]),
    }


def _shares(parts: Mapping[str, float]) -> str:
    total = sum(parts.values())
    return ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in parts.items() if seconds > 0.005 * total)


def _why(what: str, alone: Found, at: Found) -> str:
    busiest = max(at["targets"], key=lambda name: at["targets"][name]["batch"] or 0.0)
    each, before = at["targets"][busiest], alone["targets"][busiest]
    step, first = (number(1000 * (one["step_s"] or 0.0)) for one in (each, before))
    return {
        "decode": f"a step carries {number(each['batch'])} requests and takes {step} ms, for one query alone {first} ms",
        "prefill": f"prompts take {each['prefill_share'] or 0:.0%} of the steps' time, and who is being answered waits meanwhile",
        "KV": f"requests wait for KV blocks ({each['kv_use_max']:.0%} in use at the most, {each['preemptions']} preempted)",
        "sequences": f"{number(each['waiting']['sequences'])} requests wait for room among max_num_seqs",
        "tools": "tools take longer than alone",
    }[what]


def plan_rows(arm: Found) -> list[list[str]]:
    """Figures at the answer, and just below it."""
    both = {"at the answer": arm["at"], "where it fails": arm["missed"], "a query alone": arm["alone"]}
    shown = {title: each for title, each in both.items() if each is not None}
    rows = [["", *shown]]
    for title, key in (
        ("latency, s", "latency_s"),
        ("  p90", "latency_p90_s"),
        ("queries/s, as simulated", "queries_per_s"),
    ):
        rows.append([title, *(number(each[key]) for each in shown.values())])
    for name in arm["at"]["targets"]:
        of = f" of {name}" if len(arm["at"]["targets"]) > 1 else ""
        targets = [each["targets"][name] for each in shown.values()]
        counts = [str(each["by_target"][name]) if each.get("by_target") else "-" for each in shown.values()]
        rows.append([f"replicas{of}", *counts])
        rows.append([f"busy{of}", *(_percent(each["utilisation"]) for each in targets)])
        rows.append([f"requests in a step{of}", *(number(each["batch"]) for each in targets)])
        rows.append(
            [f"KV in use, mean / most{of}", *(f"{_percent(t['kv_use'])} / {t['kv_use_max']:.0%}" for t in targets)]
        )
        rows.append([f"prefill of the steps' time{of}", *(_percent(each["prefill_share"]) for each in targets)])
        rows.append([f"requests waiting{of}", *(number(sum(each["waiting"].values())) for each in targets)])
    return rows


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def what_if_rows(arm: Found) -> list[list[str]]:
    """One change each."""
    rows = [["what if", "replicas", "in time", "before", "latency, s", "before"]]
    for each in arm["what_if"]:
        shares = [f"{each[key]:.1%}" for key in ("attainment", "before")]
        times = [number(each[key]) for key in ("latency_s", "latency_before_s")]
        rows.append([each["change"], str(each["replicas"]), *shares, *times])
    return rows


def burstiness_rows(arm: Found) -> list[list[str]]:
    """The answer by burstiness."""
    rows = [["arrivals: variance / mean", "replicas", "fails at", "not decided"]]
    for name, each in arm["burstiness"].items():
        ends = ("none" if each[key] is None else str(each[key]) for key in ("replicas", "fails_at"))
        rows.append([name, *ends, _listed(each["undecided"]) or "-"])
    return rows


def cost_line(arm: Found) -> str:
    """What the fleet costs, or why that is not known."""
    cost = arm["cost"]
    if cost["per_hour"] is None:
        return "cost     not known: give prices = { gpu_hour = ... } to the target, or --gpu-hour"
    per = "" if cost["per_1000_queries"] is None else f", {number(cost['per_1000_queries'])} per 1,000 queries"
    return f"cost     {number(cost['per_hour'])} dollars an hour{per} ({cost['basis']})"


def measured_line(arm: Found) -> str:
    """What a sweep of one server says of the same load; nothing where none was given."""
    told = arm.get("measured")
    if told is None:
        return ""
    ends = "?" if told["servers_high"] is None else number(told["servers_high"])
    low = "?" if told["servers_low"] is None else number(told["servers_low"])
    clock = "in virtual time" if told["clock"] == "virtual" else "in real time"
    return (
        f"measured {number(told['servers'])} [{low}, {ends}] servers, by the {number(told['qps'])} good queries/s that one carried alone "
        f"({clock}, {told['folder']}); without what a router loses and bursts cost"
    )


def simulated_line(arm: Found) -> str:
    """How much stands behind the answer."""
    sums, cell = arm["simulated"], arm["cell"]
    looked = f", each at {cell} of the fleet's replicas with their share of the load" if cell else ""
    return (
        f"rests on {sums['looks']:.0f} windows in virtual time{looked}: {sums['queries']:,.0f} queries, {sums['calls']:,.0f} calls "
        f"in {sums['seconds']:,.0f} s; an hour at one load is answered by such windows"
    )


def lines(found: Found) -> list[str]:
    """All of it."""
    said = []
    for name, arm in found["arms"].items():
        plan = arm["plan"]
        said += [
            "",
            *_headline(name, arm, found),
            f"binds    {plan['binds']['said']}",
            cost_line(plan),
            *filter(None, [measured_line(plan)]),
            "",
        ]
        said += [*columns(plan_rows(plan)), "", *columns(burstiness_rows(plan))]
        said += ["", *columns(what_if_rows(plan)), "", simulated_line(plan)]
    return [*said[1:], *(f"note     {note}" for note in found["notes"])]
