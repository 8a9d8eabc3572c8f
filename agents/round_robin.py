"""Round-robin over a shared transcript (ChatEval one by one, arXiv 2308.07201; AutoGen's group chat, arXiv 2308.08155).

turn k of K = N R:  the speaker reads S, Q and all turns so far: its own words as its own, the others' as messages to it
"""

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from fanmark.agents.runtime import Drawn, Expected, Key, Message, Runtime, Topology, at_least, system_key, systems


@dataclass(frozen=True, slots=True)
class Params:
    """Every agent speaks once a round. `system`: one system message for all, or one each."""

    agents: int = 3
    rounds: int = 2
    system: Literal["shared", "own"] = "shared"

    def __post_init__(self) -> None:
        at_least(1, agents=self.agents, rounds=self.rounds)


async def run(rt: Runtime, p: Params) -> None:
    own = systems(rt, range(p.agents), p.system)
    turns: list[Message] = []
    for k in range(p.agents * p.rounds):
        r, i = divmod(k, p.agents)
        heard = [turn if j % p.agents == i else rt.quote(turn) for j, turn in enumerate(turns)]
        prompt = [own[i], rt.question, *heard]
        turns.append(await rt.infer(prompt, writes=("answer", k), role=f"agent-{i + 1}", round=r + 1))


def expected(p: Params, _: Drawn) -> Expected:
    """K = N R calls, one after another: K (S + Q) + O K (K - 1) / 2 in. A turn is read by all later ones; one a round is its speaker's."""
    turns = p.agents * p.rounds
    reads: Counter[Key] = Counter({("question",): turns})
    for k in range(turns):
        reads[system_key(k % p.agents, p.system)] += 1
        own, later = p.rounds - 1 - k // p.agents, turns - 1 - k
        reads.update({("answer", k): own, ("quoted", "answer", k): later - own})
    return Expected(calls=turns, depth=turns, width=1, writes={"answer": turns}, reads=reads)


TOPOLOGY = Topology(
    "round-robin", "N agents speak in turn on one transcript", Params, run, expected, "Q --> [1 --> 2 --> 3] x rounds"
)
