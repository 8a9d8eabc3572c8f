"""The shapes in which agent systems answer a query: the explicit table of them all. A new one is a file and a line here."""

from collections.abc import Mapping
from importlib import import_module

from fanmark.agents.runtime import Topology

_FILES = (
    "single",
    "reasoning",
    "self_consistency",
    "debate",
    "two_sided_debate",
    "round_robin",
    "reflection",
    "planner",
    "tool_chain",
    "orchestrator",
    "tree_of_thought",
    "mixture_of_agents",
    "map_reduce",
    "coding_agent",
    "panel",
    "tools_only",
    "replay",
)


def topologies() -> Mapping[str, Topology]:
    """All topologies by name."""
    table: list[Topology] = [import_module(f"fanmark.agents.{file}").TOPOLOGY for file in _FILES]
    return {topology.name: topology for topology in table}
