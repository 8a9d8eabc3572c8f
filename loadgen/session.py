"""One `fanmark run` from start to end: servers up, target measured, schedule run, results written, servers down."""

import asyncio
import gc
import math
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

import msgspec

from fanmark.agents.runtime import Topology
from fanmark.loadgen import embedded, reconcile
from fanmark.loadgen.demand import draw_demand
from fanmark.loadgen.endpoint import Endpoint
from fanmark.loadgen.errors import ScenarioError
from fanmark.loadgen.health import Health
from fanmark.loadgen.lengths import Dist
from fanmark.loadgen.live import Progress
from fanmark.loadgen.metrics import serve
from fanmark.loadgen.minimums import check_lengths
from fanmark.loadgen.records import Journal, Query, read_queries
from fanmark.loadgen.results import assemble
from fanmark.loadgen.run import Run
from fanmark.loadgen.scenario import Scenario, Target, resolved
from fanmark.loadgen.tally import Tally
from fanmark.loadgen.target import HttpEndpoint, connect
from fanmark.loadgen.toolset import ToolSet

_COUNTERS_SETTLE_S = 2.0
_OPEN_LOOP_CONNECTIONS, _MOST_CONNECTIONS = 8, 4096


@dataclass(frozen=True)
class Options:
    """What the command line adds to the scenario. `run_id` is unique to the run: it salts the prefix cache."""

    out: Path
    metrics_port: int
    run_id: str
    version: str
    command: Sequence[str]
    progress: TextIO | None


@dataclass(frozen=True)
class Result:
    """summary.json, and whether the run was cut short."""

    summary: dict[str, Any]
    interrupted: bool


async def run(scenario: Scenario, topologies: Mapping[str, Topology], options: Options) -> Result:
    """Runs the scenario and leaves its folder. Raises FanmarkError before anything is sent where something is wrong."""
    origin = time.monotonic()

    time_scale = 1.0 if scenario.targets else scenario.stub.time_scale

    def now() -> float:  # in the servers' seconds: a slowed stub and its tools are a slower clock, not slower servers
        return (time.monotonic() - origin) / time_scale

    async with AsyncExitStack() as stack:
        targets, caveats = dict(scenario.targets), list[str]()
        if not targets:
            targets["default"], caveats = await _stub(scenario, stack)
        tools = await _tools(scenario, stack) if uses_tools(scenario, topologies) else None
        endpoints: dict[str, HttpEndpoint] = {}
        for name, target in targets.items():
            endpoints[name] = await connect(name, target, now, time_scale=time_scale)
            stack.push_async_callback(endpoints[name].lane.close)
            if tools is not None:
                await endpoints[name].expose(tools.schemas, system=scenario.workload.system != 0)
        next(iter(endpoints.values())).notes += caveats
        check_lengths(scenario, topologies, endpoints)
        tally = Tally({arm.name: arm.topology for arm in scenario.arms}, scenario.baseline.name)
        port, stop_metrics = serve(tally, options.metrics_port)
        stack.callback(stop_metrics)
        journal = open_folder(options.out, scenario)
        stack.callback(journal.close)
        one = Run(scenario, topologies, endpoints, tools, tally, journal, options.run_id, now, time_scale)
        if options.progress is not None:
            where = next(iter(targets.values())).url
            print(f"target   {where} ({next(iter(endpoints.values())).server})", file=options.progress)
            print(f"metrics  http://127.0.0.1:{port}/metrics", file=options.progress, flush=True)
        await _open_connections(scenario, endpoints.values())
        started = datetime.now(UTC)
        before = {name: await endpoint.counters() for name, endpoint in endpoints.items()}
        health = Health(now)
        origin = time.monotonic()  # the run's start
        with rare_collections():
            whole = await _execute(one, tally, health, journal, options, now)
        seconds = now()
        journal.flush()
        queries = read_queries(options.out)
        server = await _reconciled(endpoints, before, queries)
        stub = await _stub_on_time(endpoints, before, queries, time_scale)
    run_part = {
        "name": scenario.name,
        "id": options.run_id,
        "started": started.isoformat(timespec="seconds"),
        "seconds": seconds,
        "seed": scenario.seed,
        "version": options.version,
        "command": list(options.command),
        "clock": "real",
        "time_scale": time_scale,
    }
    found = assemble(scenario, queries, endpoints, server, health.report, one.drift, run_part, stub, partial=not whole)
    (options.out / "summary.json").write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=1) + b"\n")
    return Result(found, interrupted=not whole)


@contextmanager
def rare_collections() -> Iterator[None]:
    """Keeps the garbage collector from walking all that lives: at 5,000 calls in flight that stops the process for 0.1 s and more, again
    and again. The young are still collected, often and at little cost."""
    before = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(20_000, 50, 1_000)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


async def _open_connections(scenario: Scenario, endpoints: Iterable[HttpEndpoint]) -> None:
    """Opens what the first calls need before the clock starts: a connection for each user of a closed loop, a few for an open one."""
    loads = [scenario.load_of(arm) for arm in scenario.arms]
    count = sum(load.concurrency if load.mode == "closed" else _OPEN_LOOP_CONNECTIONS for load in loads)
    for endpoint in endpoints:
        await endpoint.open_ahead(min(count, _MOST_CONNECTIONS))


def uses_tools(scenario: Scenario, topologies: Mapping[str, Topology]) -> bool:
    """Whether by its closed form an arm calls tools or reads their schemas; an arm without one may."""
    for arm in scenario.arms:
        topology = topologies[arm.topology]
        demand = draw_demand(scenario, arm, topology, 0)
        form = topology.expected(demand.params, demand) if topology.expected is not None else None
        if form is None or form.tool_calls or ("tools",) in form.reads:
            return True
    return False


async def _stub(scenario: Scenario, stack: AsyncExitStack) -> tuple[Target, list[str]]:
    """The embedded stub as a target, and what its profile rests on."""
    from fanmark.servers.profiles import load_profile

    stub = scenario.stub
    try:
        caveats = load_profile(stub.profile).caveats()
    except ValueError as e:
        raise ScenarioError(f"{scenario.source}: [stub] profile = {stub.profile!r}: {e}") from None
    args = ["--port", "0", "--profile", stub.profile, "--time-scale", str(stub.time_scale)]
    server = await embedded.start("fanmark.servers.stub", args)
    stack.push_async_callback(server.close)
    return Target(url=f"{server.url}/v1", api=stub.api), caveats


async def _tools(scenario: Scenario, stack: AsyncExitStack) -> ToolSet:
    from fanmark.loadgen.lanes.mcp import ToolServers, ToolServerSpec

    config = scenario.tools
    specs = [ToolServerSpec(url=server.url, command=server.command) for server in config.server]
    if not specs:
        latency = tool_latency(config.latency_s, scenario.stub.time_scale if not scenario.targets else 1.0)
        args = ["--port", "0", "--latency-s", latency, "--seed", str(scenario.seed)]
        server = await embedded.start("fanmark.servers.tools", args)
        stack.push_async_callback(server.close)
        specs = [ToolServerSpec(url=server.url)]
    servers = await ToolServers.open(specs, config.ready_timeout_s)
    stack.push_async_callback(servers.close)
    return ToolSet(servers, servers.tools, config, embedded=not config.server)


def tool_latency(latency_s: float | Dist, time_scale: float) -> str:
    """The embedded tools' latency in wall seconds, as JSON."""
    if not isinstance(latency_s, Dist):
        return str(latency_s * time_scale)
    times = {name: getattr(latency_s, name) * time_scale for name in ("mean", "min", "max")}
    given = {"dist": latency_s.dist, "cv": latency_s.cv} | {k: v for k, v in times.items() if v != math.inf}
    return msgspec.json.encode(given).decode()


def open_folder(out: Path, scenario: Scenario) -> Journal:
    """The run's folder with its scenario.toml, and a journal in it. Raises ScenarioError where it holds a run or cannot be written."""
    import tomli_w

    if (out / "queries.jsonl").exists() or (out / "summary.json").exists():
        raise ScenarioError(f"--out {out}: holds another run: give a new folder, or remove it first")
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "scenario.toml").write_text(tomli_w.dumps(_without_none(resolved(scenario))))
        return Journal(out)
    except OSError as e:
        raise ScenarioError(f"--out {out}: cannot be written ({e.strerror}): give another folder") from None


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return [_without_none(v) for v in value] if isinstance(value, list) else value


async def _execute(
    one: Run, tally: Tally, health: Health, journal: Journal, options: Options, now: Callable[[], float]
) -> bool:
    """The schedule, with progress, health and flushing beside it, and signals as requests to stop."""
    total = sum(one.scenario.load_of(arm).queries or 0 for arm in one.scenario.arms)
    beside = [_flush(journal), health.watch(tally.loop_lag_s.add)]
    if options.progress is not None:
        beside.append(Progress(tally, total or None, now, options.progress).show())
    tasks = [asyncio.ensure_future(part) for part in beside]
    async with _signals(one.stop.ask):
        try:
            return await one.execute()
        finally:
            for task in tasks:
                task.cancel()
            for ended in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(ended, Exception):
                    raise ended


async def _flush(journal: Journal) -> None:
    while True:
        await asyncio.sleep(1.0)
        journal.flush()


@asynccontextmanager
async def _signals(ask: Callable[[], None]) -> AsyncIterator[None]:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, ask)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


async def _reconciled(
    endpoints: Mapping[str, Endpoint], before: Mapping[str, dict[str, float] | None], queries: Sequence[Query]
) -> dict[str, Any]:
    """`server` of summary.json; by target where there are several. Counters get a moment to catch up with the last reply."""
    parts: dict[str, Any] = {}
    for name, endpoint in endpoints.items():
        calls = [call for query in queries for call in query.calls if call.target == name]
        give_up_at = time.monotonic() + _COUNTERS_SETTLE_S
        while True:
            parts[name] = reconcile.reconcile(before[name], await endpoint.counters(), calls)
            if parts[name]["reconciled"] is not False or time.monotonic() > give_up_at:
                break
            await asyncio.sleep(0.1)
    return parts[next(iter(parts))] if len(parts) == 1 else parts


async def _stub_on_time(
    endpoints: Mapping[str, Endpoint],
    before: Mapping[str, dict[str, float] | None],
    queries: Sequence[Query],
    time_scale: float,
) -> tuple[bool, str] | None:
    """The worst of the stubs among the targets, None where there is none."""
    found = []
    for name, endpoint in endpoints.items():
        seconds = [c.seconds * time_scale for q in queries for c in q.calls if c.target == name and c.error is None]
        if seconds:
            mean_s = math.fsum(seconds) / len(seconds)
            found.append(reconcile.stub_on_time(before[name], await endpoint.counters(), mean_s, time_scale))
    return min((each for each in found if each is not None), default=None)
