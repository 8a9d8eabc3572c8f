"""Reflection (Self-Refine, Madaan et al. 2023, arXiv 2303.17651): a writer drafts, a critic objects, the writer revises.

draft:     the writer reads S, Q
critic k:  reads S, Q, the latest draft
writer k:  reads S, Q, the latest draft as its own, the critique of it; after which the critic may be satisfied
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
    is_probability,
    stopped,
    system_key,
    systems,
)


@dataclass(frozen=True, slots=True)
class Params:
    """At most `rounds` of critique and revision after the first draft. After each, the draft satisfies with `stop_probability`, drawn from
    the query's seed. `system`: one system message for both, or one each."""

    rounds: int = 2
    stop_probability: float = 0.0
    system: Literal["shared", "own"] = "shared"

    def __post_init__(self) -> None:
        at_least(0, rounds=self.rounds)
        is_probability(stop_probability=self.stop_probability)


async def run(rt: Runtime, p: Params) -> None:
    writer, critic = ([system, rt.question] for system in systems(rt, ("writer", "critic"), p.system))
    draft = await rt.infer(writer, writes=("answer", 0), role="writer", round=0)
    for k in range(1, p.rounds + 1):
        critique = await rt.infer([*critic, rt.quote(draft)], writes=("critique", k), role="critic", round=k)
        draft = await rt.infer([*writer, draft, rt.quote(critique)], writes=("answer", k), role="writer", round=k)
        if stopped(rt, k, p.rounds, p.stop_probability):
            return


def expected(p: Params, drawn: Drawn) -> Expected:
    """1 + 2k calls, one after another, k rounds until it satisfies. A draft but the last is read by the critic and by its writer, a
    critique once."""
    rounds = next((k for k in range(1, p.rounds + 1) if stopped(drawn, k, p.rounds, p.stop_probability)), 0)
    calls = 1 + 2 * rounds
    reads: Counter[Key] = Counter({("question",): calls})
    for name, times in (("writer", rounds + 1), ("critic", rounds)):
        reads[system_key(name, p.system)] += times
    for k in range(rounds):
        reads.update({("answer", k): 1, ("quoted", "answer", k): 1, ("quoted", "critique", k + 1): 1})
    writes = {"answer": rounds + 1, "critique": rounds}
    return Expected(calls=calls, depth=calls, width=1, writes=writes, reads=reads)


TOPOLOGY = Topology(
    "reflection",
    "a writer drafts, a critic objects, the writer revises",
    Params,
    run,
    expected,
    "Q --> draft --> [critique --> draft] x rounds",
)
