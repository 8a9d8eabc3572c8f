"""What a run stands on: its own servers started where the scenario names none, targets and tools connected and measured."""

import math
import os
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from fanmark.agents.runtime import Topology
from fanmark.loadgen import embedded
from fanmark.loadgen.demand import draw_demand
from fanmark.loadgen.errors import ScenarioError
from fanmark.loadgen.lengths import Dist
from fanmark.loadgen.minimums import check_lengths, check_roles
from fanmark.loadgen.recording import recording_of
from fanmark.loadgen.scenario import Scenario, Target, ToolServer
from fanmark.loadgen.shaping import key_hint, shaped_tool_server, target_key, tool_server_key
from fanmark.loadgen.target import HttpEndpoint, connect
from fanmark.loadgen.toolset import ToolSet
from fanmark.loadgen.user_topology import agents, check_agents
from fanmark.servers.tool_specs import TOOLS

if TYPE_CHECKING:
    from fanmark.loadgen.lanes.mcp_model import ToolServerSpec


@dataclass(frozen=True)
class Place:
    """Where calls and tool calls go; `tool_servers` None: no arm uses tools. `caveats` is what the stub's profile rests on."""

    targets: dict[str, Target]
    tool_servers: list[ToolServer] | None
    caveats: list[str]
    time_scale: float


@dataclass(frozen=True)
class Reached:
    """All that a process of a run calls, ready to be called."""

    endpoints: dict[str, HttpEndpoint]
    tools: ToolSet | None


async def settle(scenario: Scenario, topologies: Mapping[str, Topology], stack: AsyncExitStack) -> Place:
    """Starts the servers that the scenario leaves to us; they end with `stack`. Raises ScenarioError, UnreachableError."""
    check_agents(scenario, topologies, virtual=False)
    for name, target in scenario.targets.items():
        if not target.is_reachable:
            raise ScenarioError(
                f"{scenario.source}: {target_key(name)}: a profile and no url: give url, or simulate or plan the scenario"
            )
    time_scale = 1.0 if scenario.targets else scenario.stub.time_scale
    targets, caveats = dict(scenario.targets), list[str]()
    if not targets:
        targets["default"], caveats = await _stub(scenario, stack)
    servers = None
    if uses_tools(scenario, topologies):
        servers = scenario.tools.server or [await _tool_server(scenario, time_scale, stack)]
    return Place(targets, servers, caveats, time_scale)


async def reach(
    scenario: Scenario,
    topologies: Mapping[str, Topology],
    place: Place,
    now: Callable[[], float],
    stack: AsyncExitStack,
) -> Reached:
    """Connects targets and tools; they are let go with `stack`. Raises FanmarkError where something is wrong: nothing was sent."""
    await check_roles(scenario, topologies)
    tools = None
    if place.tool_servers is not None:
        from fanmark.loadgen.lanes.mcp import ToolServers

        specs = [_spec(server, i, scenario.source) for i, server in enumerate(place.tool_servers)]
        servers = await ToolServers.open(
            specs, scenario.tools.ready_timeout_s, transport=scenario.tools.transport, sessions=scenario.tools.session
        )
        stack.push_async_callback(servers.close)
        tools = ToolSet(servers, servers.tools, scenario.tools, embedded=not scenario.tools.server)
    endpoints: dict[str, HttpEndpoint] = {}
    for name, target in place.targets.items():
        endpoints[name] = await connect(name, target, now, time_scale=place.time_scale, source=scenario.source)
        stack.push_async_callback(endpoints[name].close)
        if tools is not None:
            await endpoints[name].expose(tools.schemas, system=scenario.system_message)
    salted = agents(scenario, topologies)
    for endpoint in endpoints.values() if salted else ():
        endpoint.sdk_pool()  # its certificates take long to load
    unsalted = [name for name, salts in salted.items() if not salts]
    if unsalted and scenario.workload.cache != "warm":
        said = "its agent sends no cache salt (docs/own-topology.md): what others left in the cache may count as cached"
        next(iter(endpoints.values())).notes += [f"{name}: {said}" for name in unsalted]
    next(iter(endpoints.values())).notes += place.caveats
    next(iter(endpoints.values())).notes += [
        f"tool server {server.url}: insecure = true: whose certificate answers is not checked"
        for server in place.tool_servers or []
        if server.insecure
    ]
    check_lengths(scenario, topologies, endpoints)
    return Reached(endpoints, tools)


def _spec(server: ToolServer, index: int, source: str) -> "ToolServerSpec":
    """A tool server with its secrets filled in. Raises ScenarioError."""
    from fanmark.loadgen.lanes.mcp_model import ToolServerSpec

    shape = shaped_tool_server(server, f"{source}: {tool_server_key(index)}", os.environ)
    return ToolServerSpec(
        server.url, server.command, shape.headers, shape.env, shape.tls, shape.secrets, key_hint(server)
    )


def uses_tools(scenario: Scenario, topologies: Mapping[str, Topology]) -> bool:
    """Whether by its closed form an arm calls tools or reads their schemas; an arm without one may. Raises ScenarioError where the model is
    to decide and the arm's topology does."""
    found = False
    for arm in scenario.arms:
        for part in arm.mix or [arm]:
            demand = draw_demand(scenario, part, topologies, 0)
            if demand.topology.by_client is not None:
                continue  # an agent that has its own tools
            expected = demand.topology.expected
            form = expected(demand.params, demand) if expected is not None else None
            recording = recording_of(part)  # of which other queries may call tools
            recorded = recording is not None and recording.calls_tools
            if form is None or form.tool_calls or recorded or ("tools",) in form.reads:
                found = True
                if scenario.tools.decide == "model" and topologies[part.topology].by_model is None:
                    can = ", ".join(name for name, topology in topologies.items() if topology.by_model is not None)
                    raise ScenarioError(
                        f'{scenario.source}: [tools] decide = "model": arm {arm.name!r}: {part.topology} decides '
                        f"itself: use {can}, or leave the arm out"
                    )
    return found


async def _stub(scenario: Scenario, stack: AsyncExitStack) -> tuple[Target, list[str]]:
    """The embedded stub as a target, and what its profile rests on."""
    from fanmark.servers.profiles import load_profile

    stub = scenario.stub
    try:
        caveats = load_profile(stub.profile).caveats()
    except ValueError as e:
        raise ScenarioError(f"{scenario.source}: [stub] profile = {stub.profile!r}: {e}") from None
    args = ["--port", "0", "--profile", stub.profile, "--time-scale", str(stub.time_scale)]
    args += ["--auto-tool-calls", str(stub.tool_calls), "--replicas", str(stub.replicas), "--router", stub.router]
    server = await embedded.start("fanmark.servers.stub", args)
    stack.push_async_callback(server.close)
    return Target(url=f"{server.url}/v1", api=stub.api), caveats


async def _tool_server(scenario: Scenario, time_scale: float, stack: AsyncExitStack) -> ToolServer:
    """The embedded MCP server."""
    args = [
        "--port",
        "0",
        "--latency-s",
        tool_latency(scenario.tools.latency_s, time_scale),
        "--seed",
        str(scenario.seed),
        "--tools",
        ",".join(tool.name for tool in TOOLS),
    ]
    server = await embedded.start("fanmark.servers.tools", args)
    stack.push_async_callback(server.close)
    return ToolServer(url=server.url)


def tool_latency(latency_s: float | Dist, time_scale: float) -> str:
    """The embedded tools' latency in wall seconds, as JSON."""
    if not isinstance(latency_s, Dist):
        return str(latency_s * time_scale)
    times = {name: getattr(latency_s, name) * time_scale for name in ("mean", "min", "max")}
    given = {"dist": latency_s.dist, "cv": latency_s.cv} | {k: v for k, v in times.items() if v != math.inf}
    return msgspec.json.encode(given).decode()
