"""The shapes in which agent systems answer a query: the explicit table of them all. A new one is a file and a line here."""

from collections.abc import Mapping

from fanmark.agents import debate, single, tool_chain
from fanmark.agents.runtime import Topology


def topologies() -> Mapping[str, Topology]:
    """All topologies by name."""
    table = (single.TOPOLOGY, debate.TOPOLOGY, tool_chain.TOPOLOGY)
    return {topology.name: topology for topology in table}
