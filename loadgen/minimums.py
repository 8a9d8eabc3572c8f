"""What only a walk through queries, or the target, tells to be wrong, found before anything is sent: messages too short for a target's chat
template, and roles that nobody has."""

import re
from collections.abc import Mapping

from fanmark.agents.runtime import Topology
from fanmark.loadgen.demand import draw_demand
from fanmark.loadgen.endpoint import Endpoint
from fanmark.loadgen.errors import ScenarioError
from fanmark.loadgen.scenario import Arm, Scenario
from fanmark.loadgen.shaping import target_key
from fanmark.loadgen.walk import walk

_SAMPLE = 200  # queries that are looked at


def check_lengths(scenario: Scenario, topologies: Mapping[str, Topology], endpoints: Mapping[str, Endpoint]) -> None:
    """Refuses messages too short for a chat template's share, naming the minimum, before anything is sent."""
    for arm in scenario.arms:
        load = scenario.load_of(arm)
        for i in range(min(load.queries or _SAMPLE, _SAMPLE)):
            demand = draw_demand(scenario, arm, topologies, i)
            if demand.topology.expected is None:
                continue
            form = demand.topology.expected(demand.params, demand)
            kinds = scenario_kinds(demand.lengths)
            if demand.asked is not None:  # as long as it is, and that is enough
                kinds -= {"question"} if demand.asked.system is None else {"question", "system"}
            for kind, tokens in {(str(key[0]), form.times.get(key, 1)) for key in form.reads if key[0] in kinds}:
                author = "system" if kind == "system" else "user"
                first = kind == "system" or (kind == "question" and demand.lengths["system"] == 0)
                least = max(endpoint.prompts.minimum(author, first) for endpoint in endpoints.values())  # type: ignore[arg-type]
                length = demand.lengths[kind] * tokens
                if 0 < length < least:
                    where = f"[workload] {kind} = {length}"
                    if kind == "recorded":
                        where = f"arm {arm.name!r}: a message of {length} tokens is recorded"
                    raise ScenarioError(
                        f"{scenario.source}: {where}: the target's chat template needs at least {least} (or 0: no such message; "
                        'or api = "completions")'
                    )


async def check_roles(scenario: Scenario, topologies: Mapping[str, Topology]) -> None:
    """Refuses a role of a target's `roles` or of an arm's `targets` that no call has: what it says would be silently left out."""
    wanted = {
        role: f"{target_key(name)} roles.{role}" for name, target in scenario.targets.items() for role in target.roles
    }
    there: set[str] = set()
    for arm in scenario.arms:
        own = {role: f"arm {arm.name!r} targets.{role}" for role in arm.targets if role != "default"}
        if not wanted and not own:
            continue
        had = await _roles(scenario, arm, topologies, {*wanted, *own})
        there |= had
        _refuse_missing(scenario, own, had)
    _refuse_missing(scenario, wanted, there)


async def _roles(scenario: Scenario, arm: Arm, topologies: Mapping[str, Topology], wanted: set[str]) -> set[str]:
    """Roles of an arm's first queries, with and without their numbers, until all that are wanted are found."""
    found: set[str] = set()
    for i in range(_SAMPLE):
        demand = draw_demand(scenario, arm, topologies, i)
        if demand.topology.by_client is not None:
            return wanted  # whom its calls are by, only its code knows
        for made in await walk(demand.topology, demand):
            found |= {made.role, re.sub(r"-\d+$", "", made.role)}
        if wanted <= found:
            break
    return found


def _refuse_missing(scenario: Scenario, wanted: Mapping[str, str], there: set[str]) -> None:
    for role, where in wanted.items():
        if role not in there:
            known = ", ".join(sorted(there)) or "none"
            raise ScenarioError(f"{scenario.source}: {where}: no call has this role: there are {known}")


def scenario_kinds(lengths: Mapping[str, int]) -> set[str]:
    """Kinds of message whose text is ours to make."""
    replies = {"answer", "judge_answer", "action", "tool_result", "critique", "plan", "vote", "turn", "compaction"} | {
        "reply",
        "result",
    }
    return set(lengths) - replies
