"""Panel, a leader with specialists (the shape of xAI's multi-agent Grok; its rounds are not published): the leader splits the question, all
speak at once in short rounds, the leader concludes.

plan:     the leader reads S, Q, F
round r:  every member reads S, Q, the plan, from round 2 on all turns of the round before (or of all rounds) and F, its own text
final:    the leader reads S, Q, the plan, the turns of the last round (or of all), F
"""

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from fanmark.agents.runtime import (
    Drawn,
    Expected,
    Key,
    Message,
    Runtime,
    Topology,
    at_least,
    enough,
    seats,
    system_key,
    systems,
    together,
)

LEADER = "You lead this panel: keep it to the question, say where its members disagree, and settle what can be settled."
SPECIALISTS = (
    "You are the researcher of this panel: bring facts, figures and precedents, and say how far each can be trusted.",
    "You are the logician of this panel: check arguments and sums step by step, and name every hidden assumption.",
    "You are the contrarian of this panel: look for what the others miss, for side effects and for a wholly other way.",
)
PLAN = (
    "You lead a panel of specialists. Split the question into one part for each of them, say what each should find out, and how "
    "their findings will be put together."
)
DISCUSS = (
    "Above are the plan and what the panel has said. In a few sentences: correct what is wrong, fill what is missing in your own "
    "part, and say what you now think."
)
CONCLUDE = (
    "The panel has spoken. Weigh what it said, settle where it disagrees, and write the final answer to the question."
)


@dataclass(frozen=True, slots=True)
class Params:
    """Members are the specialists and, if `leader_in_rounds`, the leader. `role_position`: where a member's own text stands; `system`: one
    system message for all, or one each. `wait_for`: with so many turns a round gives up the others."""

    specialists: int = 3
    rounds: int = 2
    leader_in_rounds: bool = True
    transcript: Literal["last", "full"] = "last"
    role_position: Literal["head", "tail"] = "tail"
    system: Literal["shared", "own"] = "shared"
    wait_for: int | Literal["all"] = "all"

    def __post_init__(self) -> None:
        at_least(1, specialists=self.specialists, rounds=self.rounds, wait_for=enough(self.wait_for, self.specialists))


async def run(rt: Runtime, p: Params) -> None:
    texts = {
        f"specialist-{i + 1}": f"Member {i + 1}. {SPECIALISTS[i % len(SPECIALISTS)]}" for i in range(p.specialists)
    }
    texts |= {"leader": LEADER} if p.leader_in_rounds else {}
    members = dict(zip(texts, seats(rt, texts.items(), p.role_position, p.system), strict=True))
    [system] = systems(rt, ["leader"], p.system)
    discuss = rt.message(("instruction", "discuss"), DISCUSS)

    async def turn(name: str, r: int, said: list[Message]) -> Message:
        prompt = members[name].prompt(said)
        return rt.quote(await rt.infer(prompt, writes=("turn", r, name), role=name, round=r))

    async def lead(r: int, writes: Key, said: list[Message]) -> Message:
        return await rt.infer([system, *said], writes=writes, role="leader", round=r)

    plan = await lead(0, ("plan",), [rt.question, rt.message(("instruction", "plan"), PLAN)])
    opening = [rt.question, rt.quote(plan)]
    heard: list[Message] = []
    for r in range(1, p.rounds + 1):
        said = [*opening, *heard, discuss] if r > 1 else opening
        turns = await together((turn(name, r, said) for name in members), p.wait_for)
        heard = [*heard, *turns] if p.transcript == "full" else turns
    conclude = rt.message(("instruction", "conclude"), CONCLUDE)
    await lead(p.rounds + 1, ("judge_answer",), [*opening, *heard, conclude])


def expected(p: Params, _: Drawn) -> Expected:
    """N R + 2 calls, depth R + 2, width N. A turn of round r is read by the N members in the next round ("last") or in all R - r later
    ones ("full"); at the end those of the last round ("last") or all are read once more."""
    members = [*(f"specialist-{i + 1}" for i in range(p.specialists)), *(["leader"] if p.leader_in_rounds else [])]
    n, last, late = len(members), p.rounds, enough(p.wait_for, len(members)) < len(members)
    reads: Counter[Key] = Counter({("question",): n * last + 2, ("quoted", "plan"): n * last + 1})
    reads.update(
        {("instruction", "plan"): 1, ("instruction", "discuss"): n * (last - 1), ("instruction", "conclude"): 1}
    )
    reads[system_key("leader", p.system)] += 2
    for name in members:
        reads.update({system_key(name, p.system): last, ("role", name): last})
        for r in range(1, last + 1):
            readings = n * (last - r) + 1 if p.transcript == "full" else n * (r < last) + (r == last)
            reads["quoted", "turn", r, name] = readings
    writes = {"plan": 1, "turn": n * last, "judge_answer": 1}
    return Expected(calls=n * last + 2, depth=last + 2, width=n, writes=writes, reads=reads, at_most=late)


TOPOLOGY = Topology(
    "panel",
    "a leader plans, all speak in short rounds, the leader concludes",
    Params,
    run,
    expected,
    "Q --> plan ==> L | 1 | 2 | 3 ==> L | 1 | 2 | 3 --> J",
)
