"""`fanmark cost`: what a query takes of a full replica, in virtual time. Part of the command line, apart for its size."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fanmark.loadgen.cli_common import checked_scenario, json_text
from fanmark.loadgen.errors import ScenarioError

SCHEMA = "fanmark.cost/1"
DEFINITIONS = {
    "capacity_s": "seconds of a replica for a query, as full as the objective allows and with nobody else on it",
    "marginal_s": "busy seconds that replicas would not have had without the query, all arms at once (mean of seeds, 95 %)",
    "joules": "energy of the full replica for a query",
    "dollars": "capacity_s at the target's gpu_hour",
    "api_dollars": "its tokens at the target's prices for them",
    "tool_dollars": "its tool calls, on top of either",
    "break_even_utilisation": "use from which own GPUs, full when they work, cost less than the API asks for the tokens",
}
PARTS = {
    "decode_s": "decode",
    "prefill_s": "fresh prefill",
    "kv_read_s": "KV read",
    "waste_s": "preemption waste",
    "idle_s": "idle",
}


def cost(
    scenario: Annotated[str, typer.Argument(help="A TOML file, or the name of a bundled scenario.")] = "quickstart",
    profile: Annotated[str | None, typer.Option(metavar="NAME|FILE", help="Model and chip; [stub] profile.")] = None,
    at_once: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Queries of an arm at a time; left out: as the objective allows."),
    ] = None,
    marginal: Annotated[bool, typer.Option(help="Also with and without each arm, at the scenario's load.")] = False,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any key.")] = None,
    json: Annotated[bool, typer.Option("--json", help="The same as JSON.")] = False,
) -> None:
    """Simulates how full a replica gets with each arm alone within the objective, and tells what a query then takes of it."""
    from fanmark.loadgen import capacity_seconds, scenario_check, simulate

    raw, source = scenario_check.read(scenario)
    checked, table = checked_scenario(raw, source, set_ or [])
    checked = simulate.with_profile(checked, profile) if profile is not None else checked
    looks = {arm.name: capacity_seconds.capacity(checked, table, arm.name, at_once=at_once) for arm in checked.arms}
    base = looks[checked.baseline.name]
    found: dict[str, Any] = {"schema": SCHEMA, "definitions": DEFINITIONS, "kind": "simulated", "arms": {}}
    for arm in checked.arms:
        look = looks[arm.name]
        if look is None:
            print(f"{arm.name}: even one query at a time does not meet the objective", file=sys.stderr)
        found["arms"][arm.name] = {
            **(look.told() if look is not None else {"capacity_s": None}),
            **_dollars(look, checked.prices.get(arm.target or "default"), checked.tools.dollars_per_call),
            "marginal_s": capacity_seconds.marginal(checked, table, arm.name) if marginal else None,
            "waterfall": capacity_seconds.waterfall(look, base) if look is not None and base is not None else None,
        }
    if all(look is None for look in looks.values()):
        raise ScenarioError(f"{source}: no arm meets the objective on this profile: give it more time or a faster chip")
    print(json_text(found) if json else "\n".join(lines(found, checked.baseline.name)))


def break_even(
    old: Annotated[
        str, typer.Option(metavar="NAME|FILE", help="Profile of the model and chip that a single pass ran on.")
    ],
    new: Annotated[str, typer.Option(metavar="NAME|FILE", help="Profile of those that are to take the arm's queries.")],
    over: Annotated[str, typer.Option(metavar="KEY=LO:HI", help="What makes the fan-out: LO:HI, LO:HI:N or A,B,C.")],
    scenario: Annotated[str, typer.Argument(help="A TOML file, or the name of a bundled scenario.")] = "sub-queries",
    arm: Annotated[str | None, typer.Option(help="The arm; left out: the one beside the baseline.")] = None,
    seeds: Annotated[int, typer.Option(min=1, max=50, help="Simulations at each value, for the interval.")] = 3,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any key.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="The same as a page of HTML.")] = None,
    json: Annotated[bool, typer.Option("--json", help="The same as JSON.")] = False,
) -> None:
    """Finds the fan-out at which a cheaper model stops being cheaper: net demand on NEW against a single pass on OLD, in virtual time."""
    import copy

    from fanmark.loadgen import break_even as finding
    from fanmark.loadgen import scenario_check
    from fanmark.loadgen.ranges import axis_of
    from fanmark.loadgen.report.break_even_page import page
    from fanmark.loadgen.report.write import write

    raw, source = scenario_check.read(scenario)
    key, _, text = over.partition("=")
    axis = axis_of(key, text, f"--over {over}")
    if axis is None:
        raise ScenarioError(
            f"--over {over}: one value makes no fan-out: give LO:HI, LO:HI:N for N values, or a list A,B,C"
        )

    def at(x: float) -> Any:
        return checked_scenario(copy.deepcopy(raw), source, [*(set_ or []), f"{key}={int(x) if axis.integer else x}"])[
            0
        ]

    checked, table = at(axis.low), checked_scenario(copy.deepcopy(raw), source, set_ or [])[1]
    others = [each.name for each in checked.arms if not each.baseline]
    if checked.objective is None:
        raise ScenarioError(f"{source}: [objective]: profiles are compared at the same one: give query_seconds")
    if len(others) != 1 if arm is None else arm not in others:
        raise ScenarioError(f"--arm {arm}: must be one of {', '.join(others)}")
    name = arm or others[0]
    found = finding.break_even(
        axis, name, checked.baseline.name, (old, new), seeds, finding.simulated(at, table),
        lambda point: print(f"point    {key} = {point.x:g}: D = {point.demand:.2f}", file=sys.stderr),
    )  # fmt: skip
    print(json_text(found) if json else "\n".join(finding.lines(found)))
    if out is not None:
        write(out, page(found))


def _dollars(look: Any, price: Any, per_tool_call: float | None) -> dict[str, float | None]:
    """What a query costs on GPUs of one's own, what an API asks for its tokens, from which use on the first is less, and its tool calls."""
    found: dict[str, float | None] = dict.fromkeys(("dollars", "api_dollars", "break_even_utilisation", "tool_dollars"))
    if look is not None and per_tool_call is not None:
        found["tool_dollars"] = look.tool_calls * per_tool_call
    if look is not None and price is not None:
        own = look.capacity_s * price.replica_s if look.capacity_s and price.replica_s is not None else None
        asked = price.of_tokens(look.input_tokens, look.cached_tokens, look.output_tokens)
        found |= {
            "dollars": own,
            "api_dollars": asked,
            "break_even_utilisation": own / asked if own and asked else None,
        }
    return found


def lines(found: dict[str, Any], baseline: str) -> list[str]:
    """Costs by arm with their definitions, and where the ratio to the baseline comes from."""
    from fanmark.loadgen.table import columns, number

    arms = found["arms"]
    profiles = dict.fromkeys(arm["profile"] for arm in arms.values() if "profile" in arm)
    rows = [["", *arms, ""]]
    for name in DEFINITIONS:
        if any(arm.get(name) is not None for arm in arms.values()):
            rows.append([name, *(_shown(arm.get(name), number) for arm in arms.values()), DEFINITIONS[name]])
    for name in ("at_once", "calls_in_flight", "tpot_s", "latency_s", "good_qps"):
        rows.append([name, *(number(arm.get(name)) for arm in arms.values()), ""])
    falls = [arm["waterfall"] for arm in arms.values()]
    split = [["", *arms]]
    for part, title in PARTS.items():
        split.append([title, *(number(None if fall is None else fall["parts"][part]) for fall in falls)])
    split.append(["sum: the ratio", *(number(None if fall is None else fall["ratio"]) for fall in falls)])
    width = max(len(row[-1]) for row in rows)
    return [
        f"a query's cost on {', '.join(profiles)}, simulated",
        *(line.rstrip() for line in columns([[*row[:-1], row[-1].ljust(width)] for row in rows])),
        "",
        f"capacity_s against '{baseline}', by what it goes to",
        *columns(split),
    ]


def _shown(value: Any, number: Any) -> str:
    """A figure, with its interval where it has one."""
    if not isinstance(value, dict):
        return str(number(value))
    return f"{number(value['value'])} [{number(value['low'])}, {number(value['high'])}]"
