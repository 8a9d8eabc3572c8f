"""`fanmark plan`; cli.py takes it in."""

import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from fanmark.loadgen.cli_common import ProcessorsOpt, SimulatorsOpt, checked_scenario, json_text, simulators, version
from fanmark.loadgen.errors import ScenarioError

DEFINITIONS = {
    "per_hour": "replicas with the spare x GPUs of a replica x dollars of a GPU for an hour",
    "per_1000_queries": "per_hour over the queries of an hour at the rate after growth, without the peak",
}

ThinkOpt = Annotated[float | None, typer.Option(metavar="S", min=0, help="... who pause so long between queries.")]
RouterOpt = Annotated[str | None, typer.Option(help="round_robin, least_loaded, session_affinity or prefix_affinity.")]
BurstOpt = Annotated[list[float] | None, typer.Option(min=0.01, help="Variance of arrivals over their mean; 1 and 2.")]
MeasuredOpt = Annotated[
    Path | None,
    typer.Option(metavar="SWEEP", help="Folder of a fanmark sweep of one server: what it says, beside the plan."),
]


def plan(
    scenario: Annotated[str, typer.Argument(help="A TOML file, or the name of a bundled scenario.")] = "quickstart",
    rate: Annotated[float | None, typer.Option(metavar="QPS", min=1e-6, help="Queries per second.")] = None,
    users: Annotated[int | None, typer.Option(min=1, help="Users at a time, in place of a rate ...")] = None,
    think: ThinkOpt = None,
    arm: Annotated[list[str] | None, typer.Option(help="Plan this arm (again for more); all, each by itself.")] = None,
    router: RouterOpt = None,
    profile: Annotated[str | None, typer.Option(metavar="NAME|FILE", help="Model and chip; [stub] profile.")] = None,
    peak: Annotated[float, typer.Option(min=1, help="The peak's load over the mean.")] = 1.0,
    growth: Annotated[float, typer.Option(min=0, help="Share by which the load will have grown.")] = 0.0,
    spare: Annotated[int, typer.Option(min=0, help="Replicas on top, for a failure.")] = 1,
    burstiness: BurstOpt = None,
    gpu_hour: Annotated[
        float | None, typer.Option(min=0, metavar="DOLLARS", help="Of a GPU, where the target has no price.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Looks, with a seed each, that answer and failure rest on.")] = 2,
    within: Annotated[float, typer.Option(min=0.0, max=1, help="Answer and failure are as near as this share.")] = 0.05,
    cell: Annotated[int, typer.Option(min=1, help="Replicas of a large fleet that are looked at, at most.")] = 4,
    most: Annotated[int, typer.Option("--most-replicas", min=1, help="No more are tried.")] = 1000,
    measured: MeasuredOpt = None,
    seed: Annotated[int | None, typer.Option(help="Seed of lengths, texts and arrivals.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any key.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the result; runs/NAME-plan-TIME.")] = None,
    workers: SimulatorsOpt = None,
    ray: ProcessorsOpt = None,
    json: Annotated[bool, typer.Option("--json", help="Print plan.json, and nothing else.")] = False,
    quiet: Annotated[bool, typer.Option(help="No progress.")] = False,
) -> int:
    """Finds the least number of replicas that meets the deadline, in virtual time: what binds it, what it costs, what else would help."""
    from fanmark.loadgen import scenario_check
    from fanmark.loadgen import simulate as simulation
    from fanmark.loadgen.planned import Demand, Knobs

    raw, source = scenario_check.read(scenario)
    scenario_check.override_load(raw, None, None, None, None, seed)
    demand = Demand(rate, _users(raw, rate, users, think, source), peak, growth)
    base, table = checked_scenario(raw, source, set_ or [])
    if profile is not None:
        base = simulation.with_profile(base, profile)
    services = simulation.services_of(base)
    arms = _arms(base, arm)
    knobs = Knobs(_router(router, services))
    from fanmark.loadgen.plan import Options

    bursts = tuple(burstiness or (1.0, 2.0)) if rate is not None else (1.0,)
    options = Options(demand, knobs, bursts, seeds, most, within, cell=cell)
    beside = _measured(measured, demand, arms)
    folder = out or Path("runs") / f"{base.name}-plan-{time.strftime('%Y%m%d-%H%M%S')}"
    tell: Callable[[str], None] = (lambda line: None) if quiet else (lambda line: print(line, file=sys.stderr))
    with simulators(workers, ray) as shared:
        _open(folder, base)
        found = _carry_out(base, arms, table, services, options, spare, gpu_hour, tell, shared)
    return _leave(found, beside, folder, json)


def _users(
    raw: dict[str, Any], rate: float | None, users: int | None, think_s: float | None, source: str
) -> int | None:
    """Of a closed loop: the scenario's load becomes its users'."""
    if (rate is None) == (users is None):
        raise ScenarioError(f"{source}: what is to be carried: give --rate QPS, or --users N --think S")
    if users is None:
        if think_s is not None:
            raise ScenarioError(f"--think {think_s:g}: is for --users")
        return None
    turns = raw.get("load", {}).get("turns", 1)
    raw["load"] = {"users": users, "turns": turns, "think_s": think_s or raw.get("load", {}).get("think_s", 0.0)}
    return users


def _arms(base: Any, names: list[str] | None) -> list[Any]:
    objective = base.objective
    if objective is None:
        raise ScenarioError(f"{base.source}: a plan meets an objective: give [objective] query_seconds")
    if objective.attainment >= 1:
        raise ScenarioError(f"{base.source}: [objective] attainment = 1: no number of queries can show it: give less")
    known = {arm.name: arm for arm in base.arms}
    for name in names or ():
        if name not in known:
            raise ScenarioError(f"--arm {name}: there is no such arm, but {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(names or known)]


def _router(given: str | None, services: Mapping[str, Any]) -> Any:
    from fanmark.servers.engine.routing import POLICIES

    if given is None:
        return next(iter(services.values())).router
    if given not in POLICIES:
        raise ScenarioError(f"--router {given}: must be {', '.join(POLICIES)}")
    return given


def _measured(folder: Path | None, demand: Any, arms: list[Any]) -> dict[str, dict[str, Any]]:
    """How many servers the load takes by what a sweep of one server found, of the arms that it knows."""
    from fanmark.loadgen.matching import swept

    if folder is None:
        return {}
    if demand.rate is None:
        raise ScenarioError(f"--measured {folder}: is held against a rate: give --rate QPS")
    known, clock = swept(folder, f"--measured {folder}")
    told = {}
    for arm in arms:
        if (found := known.get(arm.name)) is not None:
            qps = {"qps": found.qps, "low": found.low, "high": found.high}
            servers = {key: None if one is None else math.ceil(demand.planned / one) for key, one in qps.items()}
            of = {"servers": servers["qps"], "servers_low": servers["high"], "servers_high": servers["low"]}
            told[arm.name] = {"folder": str(folder), "clock": clock, **qps, **of}
    if not told:
        raise ScenarioError(
            f"--measured {folder}: knows the capacity of {', '.join(known) or 'no arm'}: sweep an arm that is planned"
        )
    return told


def _open(folder: Path, base: Any) -> None:
    from fanmark.loadgen.session import write_scenario

    if any((folder / name).exists() for name in ("plan.json", "sweep.json", "summary.json")):
        raise ScenarioError(f"--out {folder}: holds other results: give a new folder, or remove it first")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_scenario(folder, base)
    except OSError as e:
        raise ScenarioError(f"--out {folder}: cannot be written ({e.strerror}): give another folder") from None


def _carry_out(
    base: Any,
    arms: list[Any],
    table: Mapping[str, Any],
    services: Mapping[str, Any],
    options: Any,
    spare: int,
    gpu_hour: float | None,
    tell: Callable[[str], None],
    shared: Any,
) -> dict[str, Any]:
    from fanmark.loadgen.capacity import SCHEMA, objectives_of
    from fanmark.loadgen.plan import Planner, finished
    from fanmark.loadgen.shared_out import carried_out
    from fanmark.loadgen.simulate import repeatable

    demand, objectives = options.demand, objectives_of(base.objective)
    known = table if shared is None else None
    planners = [Planner(base, arm, known, services, options, tell) for arm in arms]
    plans = carried_out([finished(planner, spare, gpu_hour) for planner in planners], shared)
    told = {arm.name: found | {"baseline": arm.baseline} for arm, found in zip(arms, plans, strict=True)}
    notes = [note for service in services.values() for note in service.profile.caveats()]
    return {
        "schema": SCHEMA,
        "partial": False,
        "ended": None,
        "name": base.name,
        "seed": base.seed,
        "clock": "virtual",
        "version": version(),
        "command": repeatable(sys.argv[1:]),
        "objectives": {"query": objectives["query"]},
        "axis": {
            "key": "replicas",
            "unit": "replicas",
            "low": len(services),
            "high": options.most_replicas,
            "integer": True,
            "values": None,
            "seeks": "least",
        },
        "arms": told,
        "plan": {
            "rate": demand.rate,
            "users": demand.users,
            "peak": demand.peak,
            "growth": demand.growth,
            "planned": demand.planned,
            "spare": spare,
            "router": options.knobs.router,
            "profiles": {name: service.profile.name for name, service in services.items()},
            "definitions": DEFINITIONS,
        },
        "notes": list(dict.fromkeys(notes)),
    }


def _leave(found: dict[str, Any], beside: dict[str, dict[str, Any]], folder: Path, json: bool) -> int:
    """Writes and prints, with what was measured `beside`; 5 where an arm's objective is met by no number of replicas."""
    from fanmark.loadgen import plan_table
    from fanmark.loadgen.report.sweep_page import page
    from fanmark.loadgen.report.write import NAME, write
    from fanmark.loadgen.sweep_folder import write_json

    for name, told in beside.items():
        found["arms"][name]["plan"]["measured"] = told
    write_json(folder / "plan.json", found)
    write(folder / NAME, page(found))
    if json:
        print(json_text(found))
    else:
        print("\n".join([*plan_table.lines(found), f"files    {folder}", f"report   {folder / NAME}"]))
    return 5 if any(arm["on"]["query"]["knee"] is None for arm in found["arms"].values()) else 0
