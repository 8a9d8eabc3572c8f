"""Messages too short for a target's chat template, found before anything is sent."""

from collections.abc import Mapping

from fanmark.agents.runtime import Topology
from fanmark.loadgen.demand import draw_demand
from fanmark.loadgen.endpoint import Endpoint
from fanmark.loadgen.errors import ScenarioError
from fanmark.loadgen.scenario import Scenario


def check_lengths(scenario: Scenario, topologies: Mapping[str, Topology], endpoints: Mapping[str, Endpoint]) -> None:
    """Refuses messages too short for a chat template's share, naming the minimum, before anything is sent."""
    for arm in scenario.arms:
        load = scenario.load_of(arm)
        for i in range(min(load.queries or 200, 200)):
            demand = draw_demand(scenario, arm, topologies, i)
            if demand.topology.expected is None:
                continue
            kinds = {str(key[0]) for key in demand.topology.expected(demand.params, demand).reads} & scenario_kinds(
                demand.lengths
            )
            for kind in kinds:
                author = "system" if kind == "system" else "user"
                first = kind == "system" or (kind == "question" and demand.lengths["system"] == 0)
                least = max(endpoint.prompts.minimum(author, first) for endpoint in endpoints.values())  # type: ignore[arg-type]
                if 0 < demand.lengths[kind] < least:
                    raise ScenarioError(
                        f"{scenario.source}: [workload] {kind} = {demand.lengths[kind]}: the target's chat template needs "
                        f'at least {least} (or 0: no such message; or api = "completions")'
                    )


def scenario_kinds(lengths: Mapping[str, int]) -> set[str]:
    """Kinds of message whose text is ours to make."""
    replies = {"answer", "judge_answer", "action", "tool_result", "critique", "plan", "vote", "turn", "compaction"}
    return set(lengths) - replies
