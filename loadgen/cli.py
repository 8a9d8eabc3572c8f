"""The command line: reads flags, hands over, turns errors into one line and an exit code. Nothing imports it."""

import os
import secrets
import sys
import threading
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from fanmark.loadgen import cli_cost, cli_engine, cli_plan, cli_replay, cli_runs, cli_sweep, cli_tap
from fanmark.loadgen.cli_common import (
    ProcessorsOpt,
    SimulatorsOpt,
    checked_scenario,
    json_text,
    run_async,
    served_on_ray,
    shared_out,
    simulators,
    split_flag,
    version,
)
from fanmark.loadgen.errors import PARTING, FanmarkError

app = typer.Typer(
    name="fanmark",
    help="Measures how agent fan-out multiplies inference: every query's cost, set against answering it in a single pass.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
serve_app = typer.Typer(
    help="Serves one of our servers until it is ended.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(serve_app, name="serve")

ScenarioArg = Annotated[str, typer.Argument(help="A TOML file, or the name of a bundled scenario (fanmark scenarios).")]
QueriesOpt = Annotated[int | None, typer.Option(help="Queries of each arm.")]
DurationOpt = Annotated[float | None, typer.Option(help="Seconds during which queries start.")]
RateOpt = Annotated[float | None, typer.Option(help="Queries per second of each arm (open loop).")]
ConcurrencyOpt = Annotated[int | None, typer.Option(help="Queries at a time of each arm (closed loop).")]
WorkersOpt = Annotated[
    str | None,
    typer.Option(metavar="N|auto", help="Processes that share the queries out; auto: one per core less one."),
]
RayOpt = Annotated[
    str | None,
    typer.Option(metavar="ADDRESS|auto", help="Put the workers on this Ray cluster; one a node, or --workers N."),
]
LossOpt = Annotated[str, typer.Option(metavar="continue|stop", help="What a run does when a worker dies.")]
JournalsOpt = Annotated[
    str,
    typer.Option(
        metavar="collect|keep",
        help="keep: workers' records stay where they are written; only what follows from them is sent.",
    ),
]
KeyOpt = Annotated[str | None, typer.Option(help="Environment variable with the API key; OPENAI_API_KEY if it is set.")]
HostOpt = Annotated[str, typer.Option(help="Address of /metrics; 0.0.0.0: all that this host has.")]
OtlpOpt = Annotated[str | None, typer.Option(metavar="URL", help="Send spans to this OpenTelemetry collector (HTTP).")]
HoldOpt = Annotated[
    float | None,
    typer.Option(
        min=0, metavar="S", help="Keep /metrics up for so long after the run; two scrapes, where there were any."
    ),
]
GuardOpt = Annotated[int | None, typer.Option(help="Most queries at a time; what that delays is told.")]
SeedOpt = Annotated[int | None, typer.Option(help="Seed of lengths, texts and arrivals.")]
SetOpt = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any key of the scenario.")]
LabelOpt = Annotated[
    list[str] | None, typer.Option("--label", metavar="KEY=VALUE", help="A word on what was run; kept.")
]
OutOpt = Annotated[Path | None, typer.Option(help="Folder of the results; runs/NAME-TIME.")]
JsonOpt = Annotated[bool, typer.Option("--json", help="Print summary.json, and nothing else, on standard output.")]
JunitOpt = Annotated[Path | None, typer.Option(metavar="FILE", help="Ticks, objectives and thresholds as JUnit XML.")]
StrictOpt = Annotated[bool, typer.Option(help="Exit 1 when a validity tick or an objective failed.")]


_ClickError: Any = typer.BadParameter.__mro__[
    2
]  # click's base error: typer carries its own click, and exports only this leaf


def main() -> None:
    """Entry point: every error that a user can cause is one line on standard error."""
    try:
        code = app(standalone_mode=False)
    except FanmarkError as e:
        print(f"fanmark: {e}", file=sys.stderr)
        code = e.exit_code
    except (typer.Abort, KeyboardInterrupt):
        code = 130
    except Exception as e:
        if not isinstance(e, _ClickError):
            raise
        text = e.format_message()
        print(text if "\n" in text else f"fanmark: {text} (try fanmark --help)", file=sys.stderr)
        code = 2
    code = code if isinstance(code, int) else 0
    if any(thread.name == PARTING for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


@app.command()
def run(
    scenario: ScenarioArg = "quickstart",
    target: Annotated[str | None, typer.Option(help="URL of an OpenAI-compatible server, .../v1.")] = None,
    model: Annotated[str | None, typer.Option(help="Model name; the first that the target lists.")] = None,
    api: Annotated[str | None, typer.Option(help="chat, or completions (token-id prompts: exact lengths).")] = None,
    api_key_env: KeyOpt = None,
    queries: QueriesOpt = None,
    duration: DurationOpt = None,
    rate: RateOpt = None,
    concurrency: ConcurrencyOpt = None,
    max_in_flight: GuardOpt = None,
    workers: WorkersOpt = None,
    ray: RayOpt = None,
    on_worker_loss: LossOpt = "continue",
    journals: JournalsOpt = "collect",
    seed: SeedOpt = None,
    set_: SetOpt = None,
    label: LabelOpt = None,
    out: OutOpt = None,
    metrics_port: Annotated[int, typer.Option(help="Port of /metrics; 0 takes a free one.")] = 0,
    metrics_host: HostOpt = "127.0.0.1",
    metrics_hold: HoldOpt = None,
    otlp: OtlpOpt = None,
    json: JsonOpt = False,
    strict: StrictOpt = False,
    junit: JunitOpt = None,
    quiet: Annotated[bool, typer.Option(help="No progress.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Send nothing: print what would be sent.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Send a key to a public host without a [budget].")] = False,
) -> int:
    """Runs a scenario against real servers; without a target, against the embedded stub and MCP server."""
    from fanmark.loadgen import scenario_check

    raw, source = scenario_check.read(scenario)
    scenario_check.override_target(raw, target, model, api, api_key_env, os.environ)
    scenario_check.override_load(raw, queries, duration, rate, concurrency, seed, max_in_flight)
    checked, table = checked_scenario(raw, source, set_ or [])
    shared = shared_out(workers, ray, on_worker_loss, journals)
    if dry_run:
        return _dry_run(checked, table, json)
    from fanmark.loadgen import session
    from fanmark.loadgen.environment import labels_of

    if not yes:
        _guard(checked, table)
    folder = _folder(out, checked.name)
    options = session.Options(
        **shared,
        out=folder,
        metrics_port=metrics_port,
        metrics_host=metrics_host,
        otlp=otlp,
        run_id=secrets.token_hex(4),
        version=version(),
        command=sys.argv[1:],
        progress=None if quiet else sys.stderr,
        labels=labels_of(label or []),
        metrics_hold_s=0.0 if metrics_hold is None and os.environ.get("CI") else metrics_hold,
    )
    return _told(run_async(session.run(checked, table, options)), folder, json, strict, junit)


def _guard(checked: Any, table: Any) -> None:
    from fanmark.loadgen.dry_run import check_guarded

    check_guarded(checked, table)


def _dry_run(checked: Any, table: Any, json: bool) -> int:
    from fanmark.loadgen import dry_run

    planned = dry_run.plan(checked, table)
    notes = [f"note     {note}" for note in [*checked.unlike_baseline(), *checked.approximate()]]
    print(json_text(planned) if json else "\n".join([*dry_run.lines(planned), *notes]))
    return 0


def _told(result: Any, folder: Path, json: bool, strict: bool, junit: Path | None) -> int:
    """Prints what a run or a simulation gave; the exit code."""
    from fanmark.loadgen import results

    ended = result.summary["ended"]
    if json:
        print(json_text(result.summary))
        if ended is not None:
            print(f"fanmark: {ended['why']}: {ended['reason']}", file=sys.stderr)
    else:
        results.print_result(result.summary, folder)
    if junit is not None:
        from fanmark.loadgen import thresholds
        from fanmark.loadgen.junit import write

        write(junit, f"fanmark {result.summary['run']['name']}", thresholds.cases(result.summary))
    return exit_code(result.summary, strict)


@app.command()
def simulate(
    scenario: ScenarioArg = "quickstart",
    profile: Annotated[
        str | None,
        typer.Option(metavar="NAME|FILE", help="Model and chip to simulate (fanmark profiles); [stub] profile."),
    ] = None,
    queries: QueriesOpt = None,
    duration: DurationOpt = None,
    rate: RateOpt = None,
    concurrency: ConcurrencyOpt = None,
    max_in_flight: GuardOpt = None,
    seed: SeedOpt = None,
    set_: SetOpt = None,
    label: LabelOpt = None,
    out: OutOpt = None,
    json: JsonOpt = False,
    strict: StrictOpt = False,
    junit: JunitOpt = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs with so many seeds, and prints how far they lie apart.")] = 1,
    workers: SimulatorsOpt = None,
    ray: ProcessorsOpt = None,
) -> int:
    """Runs a scenario in virtual time against the engine model: nothing is contacted, the same seed gives the same bytes."""
    from fanmark.loadgen import scenario_check
    from fanmark.loadgen import simulate as simulation
    from fanmark.loadgen.environment import labels_of

    raw, source = scenario_check.read(scenario)
    scenario_check.override_load(raw, queries, duration, rate, concurrency, seed, max_in_flight)
    checked, table = checked_scenario(raw, source, set_ or [])
    if profile is not None:
        checked = simulation.with_profile(checked, profile)
    for line in simulation.ignored(checked):
        print(line, file=sys.stderr)
    folder = _folder(out, checked.name)
    options = simulation.Options(folder, version(), simulation.repeatable(sys.argv[1:]), labels_of(label or []))
    if seeds > 1:
        return _spread(checked, options, seeds, json, workers, ray)
    if workers is not None or ray is not None:
        raise FanmarkError("--workers and --ray share out seeds, and there is one: give --seeds N")
    return _told(simulation.simulate(checked, table, options), folder, json, strict, junit)


def _spread(checked: Any, options: Any, count: int, json: bool, workers: str | None, ray: str | None) -> int:
    from fanmark.loadgen import simulated as work
    from fanmark.loadgen import spread
    from fanmark.loadgen.shared_out import each

    tasks = work.seeds(checked, options, count)
    folders = [options.out / f"seed-{scenario.seed}" for scenario, _ in tasks]
    work.check_free(folders)
    with simulators(workers, ray) as shared:
        found = each(work.simulated, tasks, shared)
    for folder, (_, files) in zip(folders, found, strict=True):
        work.leave(folder, files)
    summaries = [summary for summary, _ in found]
    apart = spread.spread(summaries)
    print(json_text(apart) if json else "\n".join([*spread.lines(apart, count), f"files    {options.out}"]))
    return max(exit_code(summary, False) for summary in summaries)


def _folder(out: Path | None, name: str) -> Path:
    return out or Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def exit_code(summary: dict[str, Any], strict: bool) -> int:
    """130 interrupted; 4 at a budget's cap; 1 not to be trusted; 5 a threshold missed; 1 (strict) a tick or an objective failed; else 0."""
    if summary["ended"] is not None:
        return {"interrupted": 130, "budget": 4, "errors": 1, "threshold": 5}[summary["ended"]["why"]]
    validity = summary["validity"]
    lost = [worker for worker in summary["client"].get("by_worker", {}).values() if worker["lost_at"] is not None]
    if validity["counted"] is False or lost:
        return 1
    objectives = [arm["objective"]["met"] for arm in summary["arms"].values() if arm["objective"]]
    if any(not threshold["met"] for threshold in summary["thresholds"]):
        return 5
    return int(strict and (False in validity.values() or False in objectives))


@app.command()
def topologies(
    name: Annotated[str | None, typer.Argument(help="All about this topology or preset.")] = None,
    json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Lists the agent shapes and presets: how they look, and what a query costs by the closed forms."""
    from fanmark.agents import topologies
    from fanmark.loadgen import catalogue
    from fanmark.loadgen.lanes.virtual_tools import schema_tokens

    table, tokens = topologies(), schema_tokens()
    if name is None:
        found = catalogue.catalogue(table, tokens)
        print(json_text(found) if json else "\n".join(catalogue.lines(found)))
    elif json:
        print(json_text(catalogue.entry(name, table, tokens)))
    else:
        print("\n".join(catalogue.long_lines(name, table, tokens)))


@app.command()
def scenarios(json: Annotated[bool, typer.Option("--json")] = False) -> None:
    """Lists the bundled scenarios."""
    from fanmark.loadgen.scenario_check import bundled

    _listing(bundled(), json)


def _listing(rows: dict[str, str], as_json: bool) -> None:
    width = max(map(len, rows))
    print(json_text(rows) if as_json else "\n".join(f"{name.ljust(width)}  {text}" for name, text in rows.items()))


@serve_app.command(
    "stub", context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
)
def serve_stub(context: typer.Context) -> int:
    """Serves the stub: an OpenAI-compatible server that schedules like vLLM. --help lists its flags; --ray ADDRESS puts --replicas on a
    Ray cluster."""
    from fanmark.servers.stub import main as stub_main

    address, flags = split_flag(context.args, "--ray")
    return stub_main(flags) if address is None else served_on_ray("stub", address, flags)


@serve_app.command(
    "tools", context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
)
def serve_tools(context: typer.Context) -> int:
    """Serves the MCP tool server. --help lists its flags; --ray ADDRESS puts --replicas on a Ray cluster."""
    from fanmark.servers.tools import main as tools_main

    address, flags = split_flag(context.args, "--ray")
    return tools_main(flags) if address is None else served_on_ray("tools", address, flags)


@serve_app.command(
    "vllm", context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
)
def serve_vllm(context: typer.Context) -> int:
    """Serves a real vLLM from the virtual environment that it is installed in. --help lists its flags."""
    from fanmark.servers.vllm import main as vllm_main

    return vllm_main(context.args)


for command in (  # as `fanmark --help` lists them, behind those above
    cli_sweep.sweep,
    cli_cost.cost,
    cli_cost.break_even,
    cli_plan.plan,
    cli_tap.tap,
    cli_runs.report,
    cli_runs.compare,
    cli_runs.verify,
    cli_replay.export,
    cli_engine.calibrate,
    cli_engine.validate,
    cli_engine.profiles,
):
    app.command()(command)
app.command("import")(cli_replay.import_)

if __name__ == "__main__":
    main()
