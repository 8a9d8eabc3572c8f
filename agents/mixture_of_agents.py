"""Mixture of agents (Wang et al. 2024, arXiv 2406.04692): layers of proposers, each reading all of the layer before; one aggregates.

layer 1:                      n proposers read S, Q
layers 2 .. L - 1, and the aggregator (layer L):  read S, Q, F, the n answers of the layer before
"""

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from fanmark.agents.runtime import (
    Drawn,
    Expected,
    Key,
    Runtime,
    Topology,
    at_least,
    enough,
    system_key,
    systems,
    together,
)

AGGREGATE = (
    "Several assistants have answered the question; their answers follow, one message each. Some of what they say may be wrong or "
    "one-sided. Do not repeat them: judge them, and write one answer of your own that is more accurate and complete than any."
)


@dataclass(frozen=True, slots=True)
class Params:
    """`layers` includes the last, which is the aggregator alone; `agents` is the proposers of each other layer. `system`: one
    system message for all, or one for each proposer. `wait_for`: with so many proposals a layer gives up the others."""

    layers: int = 3
    agents: int = 6
    system: Literal["shared", "own"] = "shared"
    wait_for: int | Literal["all"] = "all"

    def __post_init__(self) -> None:
        at_least(2, layers=self.layers)
        at_least(1, agents=self.agents, wait_for=enough(self.wait_for, self.agents))


async def run(rt: Runtime, p: Params) -> None:
    aggregate = rt.message(("instruction",), AGGREGATE)
    proposers = systems(rt, range(p.agents), p.system)
    said = [rt.question]
    for layer in range(1, p.layers):
        proposals = (
            rt.infer([own, *said], writes=("answer", layer, i), role=f"proposer-{i + 1}", round=layer)
            for i, own in enumerate(proposers)
        )
        answers = await together(proposals, p.wait_for)
        said = [rt.question, aggregate, *(rt.quote(answer) for answer in answers)]
    await rt.infer([rt.system, *said], writes=("answer", p.layers), role="aggregator", round=p.layers)


def expected(p: Params, _: Drawn) -> Expected:
    """(L - 1) n + 1 calls, depth L, width n. An answer is read by the n calls of the next layer, before the last layer by 1."""
    calls = (p.layers - 1) * p.agents + 1
    reads: Counter[Key] = Counter({("system",): 1, ("question",): calls, ("instruction",): calls - p.agents})
    for i in range(p.agents):
        reads[system_key(i, p.system)] += p.layers - 1
    for layer in range(1, p.layers):
        readers = p.agents if layer < p.layers - 1 else 1
        reads.update({("quoted", "answer", layer, i): readers for i in range(p.agents)})
    late = enough(p.wait_for, p.agents) < p.agents
    return Expected(calls=calls, depth=p.layers, width=p.agents, writes={"answer": calls}, reads=reads, at_most=late)


TOPOLOGY = Topology(
    "mixture-of-agents",
    "layers of proposers read the layer before; one aggregates",
    Params,
    run,
    expected,
    "Q ==> A | A | A ==> A | A | A --> A",
)
