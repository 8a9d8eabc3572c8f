"""What a run can tell those who watch it before its first query: its facts, its roles and tools, and where its own servers tell theirs."""

from collections.abc import Mapping
from itertools import accumulate

from fanmark.agents.runtime import Topology
from fanmark.loadgen.demand import draw_demand
from fanmark.loadgen.metrics import Told
from fanmark.loadgen.reach import Place, Reached
from fanmark.loadgen.run_clock import RunClock
from fanmark.loadgen.scenario import Arm, Scenario
from fanmark.loadgen.tally import role_label
from fanmark.loadgen.walk import walk

_LOOKED_AT = 3  # queries of an arm, for its roles


async def told_of(
    scenario: Scenario, topologies: Mapping[str, Topology], reached: Reached, run_id: str, version: str, clock: RunClock
) -> Told:
    """All that the metrics tell beside the sums."""
    callable_tools = reached.tools.names if reached.tools is not None else []
    roles: dict[str, list[str]] = {}
    tools: dict[str, list[str]] = {}
    for arm in scenario.arms:
        roles[arm.name], calls_tools = await _of_arm(scenario, arm, topologies)
        if calls_tools:
            tools[arm.name] = callable_tools
    seconds = [stage.seconds for stage in scenario.load.stages]
    return Told(
        run_id=run_id,
        info={
            "scenario": scenario.name,
            "version": version,
            "seed": str(scenario.seed),
            "baseline": scenario.baseline.name,
        },
        targets=list(reached.endpoints),
        roles=roles,
        tools=tools,
        began_at=lambda: clock.began_at,
        stages_s=[0.0, *accumulate(seconds)][: len(seconds)],
        time_scale=clock.time_scale,
    )


async def _of_arm(scenario: Scenario, arm: Arm, topologies: Mapping[str, Topology]) -> tuple[list[str], bool]:
    """The roles of an arm's first queries without their numbers, and whether they call tools; none where the topology has no closed form:
    walking through it might do anything."""
    roles, calls_tools = dict[str, None](), False
    for part in arm.mix or [arm]:
        for i in range(_LOOKED_AT):
            demand = draw_demand(scenario, part, topologies, i)
            if demand.topology.expected is None:
                continue
            calls_tools = calls_tools or demand.topology.expected(demand.params, demand).tool_calls > 0
            roles |= dict.fromkeys(role_label(made.role) for made in await walk(demand.topology, demand))
    return list(roles), calls_tools


def own_metrics(scenario: Scenario, place: Place) -> list[str]:
    """Where the servers that the run itself started tell their metrics."""
    own = []
    if not scenario.targets:
        own += [f"{replica.removesuffix('/v1')}/metrics" for replica in place.targets["default"].replicas]
    if not scenario.tools.server:
        own += [f"{server.url.removesuffix('/mcp')}/metrics" for server in place.tool_servers or [] if server.url]
    return own
