"""One `fanmark simulate` from start to end: scenario, topologies, records and files are those of a run, time is virtual.

Nothing is contacted, and everything in its folder follows from the scenario and its seed: no wall clock, no random number but by seed.
So the same seed gives the same bytes, and the run's id, which salts the prefix cache, is derived from the seed.
"""

import asyncio
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from fanmark.agents.runtime import Topology
from fanmark.loadgen.clock import VirtualLoop, run_virtually
from fanmark.loadgen.collecting import rare_collections
from fanmark.loadgen.counters import Reading
from fanmark.loadgen.environment import environment
from fanmark.loadgen.errors import ScenarioError
from fanmark.loadgen.lanes.virtual import Service, VirtualEndpoint
from fanmark.loadgen.lanes.virtual_tools import VirtualTools, Words
from fanmark.loadgen.minimums import check_lengths, check_roles
from fanmark.loadgen.reach import tool_latency, uses_tools
from fanmark.loadgen.records import digests, read_queries, read_windows
from fanmark.loadgen.reduced import CallKind, Rows, reduced
from fanmark.loadgen.report.write import write_report
from fanmark.loadgen.results import assemble, write_summary
from fanmark.loadgen.run import Run
from fanmark.loadgen.samples import VirtualSampler, read_samples
from fanmark.loadgen.scenario import Scenario, Target
from fanmark.loadgen.server_side import account
from fanmark.loadgen.session import Result, open_folder
from fanmark.loadgen.tally import Tally
from fanmark.loadgen.toolset import ToolSet, listing
from fanmark.loadgen.user_topology import check_agents
from fanmark.servers.engine.routing import Policy
from fanmark.servers.profiles import Profile, ProfileError, load_profile
from fanmark.servers.tool_specs import check_latency


@dataclass(frozen=True)
class Options:
    """What the command line adds to the scenario. `command` goes into summary.json."""

    out: Path
    version: str
    command: Sequence[str]
    labels: Mapping[str, str] = field(default_factory=dict)


def with_profile(scenario: Scenario, profile: str) -> Scenario:
    """The scenario with this profile in place of the stub's. It is kept in [stub], which a run without a target reads too."""
    return msgspec.structs.replace(scenario, stub=msgspec.structs.replace(scenario.stub, profile=profile))


def ignored(scenario: Scenario) -> list[str]:
    """What of the scenario has no meaning in virtual time, a line each."""
    lines = []
    for name, target in scenario.targets.items():
        where = "[target]" if name == "default" else f"[targets.{name}]"
        lines += (
            []
            if not target.is_reachable
            else [
                f"ignored: {where} url = {target.replicas[0]!r}: an engine model of its own stands in (api, params, prices are taken)"
            ]
        )
    if scenario.tools.server:
        lines.append("ignored: [[tools.server]]: the bundled tools stand in, with [tools] latency_s and round_trip_s")
        if scenario.tools.call:
            lines.append(f"ignored: [tools] call = {scenario.tools.call!r}: it names tools of servers")
    if not scenario.targets and scenario.stub.time_scale != 1.0:
        lines.append(f"ignored: [stub] time_scale = {scenario.stub.time_scale:g}: virtual time is never late")
    return lines


def repeatable(arguments: Sequence[str]) -> list[str]:
    """A command line without what does not change the result: where it is made and written, and how it is printed."""
    kept, rest = [], iter(arguments)
    for argument in rest:
        if argument in ("--out", "--workers", "--ray"):
            next(rest, None)
        elif argument != "--json" and not argument.startswith(("--out=", "--workers=", "--ray=")):
            kept.append(argument)
    return kept


def simulate(scenario: Scenario, topologies: Mapping[str, Topology], options: Options) -> Result:
    """Runs the scenario in virtual time and leaves its folder. Raises FanmarkError where something is wrong."""
    return run_virtually(_simulate(scenario, topologies, options, services_of(scenario)))


def services_of(scenario: Scenario) -> dict[str, Service]:
    """What stands at each target: the stub, or as many replicas as the target has addresses, which take calls as it spreads them."""
    stub, found = scenario.stub, dict[str, Service]()
    if not scenario.targets:
        return {"default": Service(_profile(stub.profile), stub.replicas, stub.router)}
    for name, target in scenario.targets.items():
        router: Policy = "session_affinity" if target.spread == "query" else "round_robin"
        found[name] = Service(_profile(target.profile or stub.profile), len(target.replicas), router)
    return found


def _profile(name: str) -> Profile:
    try:
        return load_profile(name)
    except ProfileError as e:
        raise ScenarioError(f"profile {name!r}: {e}") from None


async def stand_in(
    scenario: Scenario,
    topologies: Mapping[str, Topology],
    services: Mapping[str, Service],
    kind: type[VirtualEndpoint] = VirtualEndpoint,
    words: Words | None = None,
) -> tuple[dict[str, VirtualEndpoint], ToolSet | None]:
    """Engines and tools, ready to be called. Raises FanmarkError where something is wrong."""
    check_agents(scenario, topologies, virtual=True)
    targets = dict(scenario.targets) or {"default": Target(url="", api=scenario.stub.api)}
    endpoints = {name: kind(name, target, services[name], scenario.stub.tool_calls) for name, target in targets.items()}
    tools = _tools(scenario, words) if uses_tools(scenario, topologies) else None
    if tools is not None:
        for endpoint in endpoints.values():
            await endpoint.expose(tools.schemas, system=scenario.system_message)
    await check_roles(scenario, topologies)
    check_lengths(scenario, topologies, endpoints)
    return endpoints, tools


async def _simulate(
    scenario: Scenario, topologies: Mapping[str, Topology], options: Options, services: Mapping[str, Service]
) -> Result:
    now = asyncio.get_running_loop().time
    endpoints, tools = await stand_in(scenario, topologies, services)
    tally = Tally({arm.name: arm.topology for arm in scenario.arms}, scenario.baseline.name)
    run_id = f"virtual-{scenario.seed}"
    journal = open_folder(options.out, scenario, through=True)
    sampler = VirtualSampler(options.out, {name: endpoint.told for name, endpoint in endpoints.items()}, tally)
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    loop.watch_time(sampler.passing)
    try:
        one = Run(scenario, topologies, endpoints, tools, tally, journal, run_id, now)
        with _interrupts(one.stop.ask), rare_collections():
            ending = await one.execute()
        journal.flush()
    finally:
        loop.watch_time(None)
        sampler.close()
        journal.close()
    records = reduced(read_queries(options.out), scenario.objective)
    told = {name: endpoint.told() for name, endpoint in endpoints.items()}
    server = {
        name: account([name], Reading("", {}), told[name], records) | endpoint.work()
        for name, endpoint in endpoints.items()
    }
    run_part = {
        "name": scenario.name,
        "id": run_id,
        "started": None,
        "seconds": now(),
        "seed": scenario.seed,
        "version": options.version,
        "command": list(options.command),
        "clock": "virtual",
        "time_scale": 1.0,
    }
    parts = server if len(server) > 1 else next(iter(server.values()))
    found = assemble(
        scenario, records, endpoints, parts, _no_client, run_part,
        ending=ending, windows=read_windows(options.out), samples=read_samples(options.out),
        tools=listing(tools, endpoints) if tools is not None else None,
    )  # fmt: skip
    found["notes"] = list(dict.fromkeys(found["notes"]))  # engines of one profile have the same caveats
    found["environment"] = environment(options.labels, None, endpoints, told, {})
    found["files"] = digests(options.out)
    write_summary(options.out, found)
    write_report(options.out)
    return Result(found)


def _tools(scenario: Scenario, words: Words | None) -> ToolSet:
    config = scenario.tools
    if config.server:
        config = msgspec.structs.replace(config, server=[], call=[])
    latency_s = msgspec.json.decode(tool_latency(config.latency_s, 1.0))
    try:
        check_latency(latency_s)
    except ValueError as e:
        raise ScenarioError(f"{scenario.source}: [tools] latency_s: {e}") from None
    tools = VirtualTools(latency_s, config.round_trip_s, words)
    return ToolSet(tools, tools.tools, config, embedded=True)


def _no_client(calls: Rows[CallKind]) -> dict[str, Any]:
    """The `client` part of summary.json: nothing stands between a call and the engine."""
    return {
        "verdict": "ok",
        "reasons": ["virtual time has no client"],
        "loop_lag_s": None,
        "send_delay_s": None,
        "connections": None,
        "coalesced_share": None,
        "cpu_s": None,
        "rss_mb": None,
        "workers": 0,
    }


@contextmanager
def _interrupts(ask: Callable[[], None]) -> Iterator[None]:
    """SIGINT and SIGTERM ask the run to stop. A virtual loop never sleeps, so an ordinary handler is enough."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda *_: loop.call_soon_threadsafe(ask)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
