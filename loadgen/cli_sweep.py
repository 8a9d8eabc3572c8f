"""`fanmark sweep`; cli.py takes it in."""

import copy
import os
import secrets
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from fanmark.loadgen.cli_common import checked_scenario, json_text, run_async, shared_out, simulators, version
from fanmark.loadgen.errors import ScenarioError

_EXIT = {"interrupted": 130, "budget": 4, "threshold": 5}


ScenarioArg = Annotated[str, typer.Argument(help="A TOML file, or the name of a bundled scenario.")]
RateOpt = Annotated[
    str | None, typer.Option(metavar="LO:HI", help="Find each arm's highest queries/s that meets the objective.")
]
ConcurrencyOpt = Annotated[
    str | None, typer.Option(metavar="LO:HI", help="The same, of queries at a time (closed loop).")
]
SetOpt = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE|RANGE", help="Any key; of one LO:HI, LO:HI:N or A,B,C: all of them."),
]
FindOpt = Annotated[
    str | None, typer.Option(metavar="FIGURE in A..B", help="Find where a figure of the summary is in a range ...")
]
OverOpt = Annotated[str | None, typer.Option(metavar="KEY=LO:HI", help="... as this key of the scenario changes.")]
VirtualOpt = Annotated[bool, typer.Option("--virtual", help="In virtual time, as fanmark simulate does.")]
ProfileOpt = Annotated[
    str | None, typer.Option(metavar="NAME|FILE", help="Model and chip to simulate (with --virtual).")
]
TargetOpt = Annotated[str | None, typer.Option(help="URL of an OpenAI-compatible server, .../v1.")]
ModelOpt = Annotated[str | None, typer.Option(help="Model name; the first that the target lists.")]
ApiOpt = Annotated[str | None, typer.Option(help="chat, or completions (token-id prompts).")]
KeyOpt = Annotated[str | None, typer.Option(help="Environment variable with the API key.")]
QueriesOpt = Annotated[int | None, typer.Option(help="Queries of each arm at each value of a key.")]
DurationOpt = Annotated[
    float | None, typer.Option(help="Seconds of a window; along a load at least, where 5 deadlines are the default.")
]
WorkersOpt = Annotated[
    str | None,
    typer.Option(metavar="N|auto", help="Processes that share a run's queries out; with --virtual, the simulations."),
]
RayOpt = Annotated[
    str | None, typer.Option(metavar="ADDRESS|auto", help="The same by this Ray cluster's nodes, or its processors.")
]
SeedOpt = Annotated[int | None, typer.Option(help="Seed of lengths, texts and arrivals.")]
MostOpt = Annotated[
    int,
    typer.Option("--most-looks", min=1, help="Runs at a point that stays undecided, each as long as all before it."),
]
WithinOpt = Annotated[float, typer.Option(min=0.001, max=1, help="How narrow a bracket is to be, as a share.")]
OutOpt = Annotated[
    Path | None, typer.Option(help="Folder; a sweep that it holds already goes on. runs/NAME-sweep-TIME.")
]
JsonOpt = Annotated[bool, typer.Option("--json", help="Print sweep.json, and nothing else, on standard output.")]
QuietOpt = Annotated[bool, typer.Option(help="No progress.")]
YesOpt = Annotated[bool, typer.Option("--yes", help="Send a key to a public host without a [budget].")]


def sweep(
    scenario: ScenarioArg = "quickstart",
    rate: RateOpt = None,
    concurrency: ConcurrencyOpt = None,
    set_: SetOpt = None,
    find: FindOpt = None,
    over: OverOpt = None,
    virtual: VirtualOpt = False,
    profile: ProfileOpt = None,
    target: TargetOpt = None,
    model: ModelOpt = None,
    api: ApiOpt = None,
    api_key_env: KeyOpt = None,
    queries: QueriesOpt = None,
    duration: DurationOpt = None,
    workers: WorkersOpt = None,
    ray: RayOpt = None,
    seed: SeedOpt = None,
    most: MostOpt = 4,
    within: WithinOpt = 0.05,
    out: OutOpt = None,
    json: JsonOpt = False,
    quiet: QuietOpt = False,
    yes: YesOpt = False,
) -> int:
    """Finds what load each arm carries within the objective, and what a query costs in capacity; or sweeps any other key."""
    from fanmark.loadgen import scenario_check, sweep_folder
    from fanmark.loadgen import simulate as simulation
    from fanmark.loadgen.mistakes import show
    from fanmark.loadgen.sweep import Sweep

    raw, source = scenario_check.read(scenario)
    scenario_check.override_target(raw, target, model, api, api_key_env, os.environ)
    plain = (_plain(rate, float, "--rate"), _plain(concurrency, int, "--concurrency"))
    axis, settings = _axis(rate, concurrency, set_ or [], find, over)
    scenario_check.override_load(raw, queries, duration, *plain, seed)
    base, table = checked_scenario(raw, source, settings)
    if profile is not None:
        if not virtual:
            raise ScenarioError(f"--profile {profile}: is for --virtual: a run takes what the target is")
        base = simulation.with_profile(base, profile)

    def at(value: Any) -> Any:
        changed, _ = checked_scenario(copy.deepcopy(raw), source, [*settings, f"{axis.key}={show(value)}"])
        return changed if profile is None else simulation.with_profile(changed, profile)

    wanted = _check(base, axis, find, at, yes=yes or virtual, table=table)
    carried = _carried(base, axis, workers, ray, virtual=virtual)
    folder = out or Path("runs") / f"{base.name}-sweep-{time.strftime('%Y%m%d-%H%M%S')}"
    clock = "virtual" if virtual else "real"
    about = {"clock": clock, "version": version(), "command": simulation.repeatable(sys.argv[1:])}
    tell: Callable[[str], None] = (lambda line: None) if quiet else (lambda line: print(line, file=sys.stderr))
    with simulators(workers if virtual else None, ray if virtual else None) as shared:
        if sweep_folder.open_folder(folder, base, axis.key, clock, table):
            tell(f"goes on  {folder}")
        measure = _simulated(table, shared is None) if virtual else _run(table, carried)
        one = Sweep(base, axis, folder, measure, at, about, tell, most, within, wanted)
        _carry_out(one, shared)
    return _leave(one, json)


def _axis(
    rate: str | None, concurrency: str | None, settings: list[str], find: str | None, over: str | None
) -> tuple[Any, list[str]]:
    """The one axis that is named, and the settings that are plain."""
    from fanmark.loadgen.ranges import CONCURRENCY, FEW, HOW, RATE, axis_of, spaced

    given = [(RATE, rate, f"--rate {rate}"), (CONCURRENCY, concurrency, f"--concurrency {concurrency}")]
    for flag, setting in [*(("--set", each) for each in settings), *([("--over", over)] if over else [])]:
        key, _, text = setting.partition("=")
        given.append((key.strip(), text, f"{flag} {setting}"))
    axes = [(flag, axis) for key, text, flag in given if text and (axis := axis_of(key, text, flag)) is not None]
    ranged = {flag for flag, _ in axes}
    if (find is None) != (over is None):
        raise ScenarioError("--find FIGURE in A..B and --over KEY=LO:HI go together: give both or neither")
    if over is not None and f"--over {over}" not in ranged:
        raise ScenarioError(f"--over {over}: is no range: {HOW}")
    if not axes:
        raise ScenarioError(
            "nothing is swept: give --rate LO:HI, --concurrency LO:HI, --set KEY=LO:HI, or --find and --over"
        )
    if len(axes) > 1:
        raise ScenarioError(
            f"{axes[0][0]} and {axes[1][0]}: one range at a time: sweep the first at each value of the second"
        )
    axis = axes[0][1]
    if find is None and not axis.of_load and axis.values is None:
        axis = replace(axis, values=spaced(axis.low, axis.high, FEW, axis.integer))
    return axis, [each for each in settings if f"--set {each}" not in ranged]


def _plain(text: str | None, kind: Callable[[str], Any], flag: str) -> Any:
    """A flag's one value; None where it is a range."""
    from fanmark.loadgen.ranges import axis_of

    if text is None or axis_of("load.rate", text, f"{flag} {text}") is not None:
        return None
    try:
        return kind(text)
    except ValueError:
        raise ScenarioError(f"{flag} {text}: must be a number, or a range LO:HI") from None


def _check(base: Any, axis: Any, find: str | None, at: Callable[[Any], Any], *, yes: bool, table: Any) -> Any:
    """Refuses what cannot be swept, before anything is sent; what --find wants."""
    from fanmark.loadgen.crossing import wanted_of
    from fanmark.loadgen.dry_run import check_guarded

    arms = [arm.name for arm in base.arms]
    wanted = wanted_of(find, arms) if find is not None else None
    if wanted is None and axis.of_load:
        if base.objective is None:
            raise ScenarioError(
                f"{base.source}: a load is swept to where an objective is missed: give [objective] query_seconds"
            )
        if base.objective.attainment >= 1:
            raise ScenarioError(
                f"{base.source}: [objective] attainment = 1: no number of queries can show it: give less than 1"
            )
        if base.load.process == "replay":
            raise ScenarioError(f"{base.source}: [load] arrivals: a replay has the rate that it has: leave it out")
        if axis.key == "load.rate" and base.load.users is not None:
            raise ScenarioError(
                f"{base.source}: [load] users = {base.load.users} is a closed loop: sweep --concurrency"
            )
    else:
        if axis.key == "load.rate" and base.load.match == "capacity":
            raise ScenarioError(
                f'{base.source}: [load] match = "capacity" sets the rates: sweep load.fraction, or leave it out'
            )
        for value in axis.values or (axis.low, axis.high):
            at(int(value) if axis.integer and isinstance(value, float) else value)
    if not yes:
        check_guarded(base, table, "a sweep sends until it has found what it looks for")
    return wanted


def _carried(base: Any, axis: Any, workers: str | None, ray: str | None, *, virtual: bool) -> dict[str, Any]:
    """Who carries a run out. Refuses what of a run follows from those before it, where they are made side by side."""
    carried = shared_out(workers, ray, "continue", "collect")
    if virtual and (ray is not None or carried["workers"] > 1):
        where = f"{base.source}: %s: follows from the runs before, and --workers and --ray make them side by side: leave it out"
        if base.budget is not None:
            raise ScenarioError(where % "[budget]")
        if not axis.of_load and any(threshold.abort for threshold in base.threshold):
            raise ScenarioError(where % "[[threshold]] abort")
    return carried


def _simulated(table: Mapping[str, Any], here: bool) -> Callable[[Any, Path], Any]:
    from fanmark.loadgen import simulate as simulation
    from fanmark.loadgen.shared_out import Task
    from fanmark.loadgen.simulated import simulated

    command, known = simulation.repeatable(sys.argv[1:]), version()

    def measure(given: tuple[Any, Any]) -> Any:
        return simulation.simulate(given[0], table, given[1]).summary, {}

    return lambda scenario, folder: Task(
        measure if here else simulated, (scenario, simulation.Options(folder, known, command))
    )


def _run(table: Mapping[str, Any], carried: Mapping[str, Any]) -> Callable[[Any, Path], Any]:
    from fanmark.loadgen import session
    from fanmark.loadgen.shared_out import Task

    def measure(given: tuple[Any, Path]) -> Any:
        options = session.Options(
            **carried,
            out=given[1],
            metrics_port=0,
            run_id=secrets.token_hex(4),
            version=version(),
            command=sys.argv[1:],
            progress=None,
        )
        return run_async(session.run(given[0], table, options)).summary, {}

    return lambda scenario, folder: Task(measure, (scenario, folder))


def _carry_out(one: Any, shared: Any) -> None:
    try:
        one.run(shared)
    except KeyboardInterrupt:  # between two runs, or while others make them
        one.ended = {"why": "interrupted", "reason": "this is what was measured until then"}


def _leave(one: Any, json: bool) -> int:
    """Writes and prints what was found; the exit code."""
    from fanmark.loadgen import sweep_table
    from fanmark.loadgen.report.sweep_page import page
    from fanmark.loadgen.report.write import NAME, write

    found, folder = one.write(partial=one.ended is not None), one.out
    write(folder / NAME, page(found))
    if json:
        print(json_text(found))
    else:
        print("\n".join([*sweep_table.lines(found), "", f"files    {folder}", f"report   {folder / NAME}"]))
    if one.ended is not None:
        print(
            f"fanmark: {one.ended['why']}: {one.ended['reason']}; the same command with --out {folder} goes on",
            file=sys.stderr,
        )
        return _EXIT.get(one.ended["why"], 1)
    return int(one.wrong)
