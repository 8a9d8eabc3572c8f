"""Panel, a leader with specialists (the shape of xAI's multi-agent Grok; its rounds are not published): the leader splits the question, all
speak at once in short rounds, the leader concludes.

plan:     the leader reads S, Q, F
round r:  every member reads S, Q, the plan, from round 2 on all turns of the round before (or of all rounds) and F, its own text
final:    the leader reads S, Q, the plan, the turns of the last round (or of all), F
"""

from dataclasses import dataclass
from typing import Literal

from fanmark.agents.runtime import Author, Drawn, Expected, Key, Message, Runtime, Topology, at_least, place, together

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
    """Members are the specialists and, if `leader_in_rounds`, the leader. `role_position`: where a member's own text stands."""

    specialists: int = 3
    rounds: int = 2
    leader_in_rounds: bool = True
    transcript: Literal["last", "full"] = "last"
    role_position: Literal["head", "tail"] = "tail"

    def __post_init__(self) -> None:
        at_least(1, specialists=self.specialists, rounds=self.rounds)


async def run(rt: Runtime, p: Params) -> None:
    author: Author = "system" if p.role_position == "head" else "user"
    texts = {f"specialist-{i + 1}": SPECIALISTS[i % len(SPECIALISTS)] for i in range(p.specialists)}
    texts |= {"leader": LEADER} if p.leader_in_rounds else {}
    roles = {name: rt.message(("role", name), text, author) for name, text in texts.items()}
    discuss, conclude = (
        rt.message(("instruction", "discuss"), DISCUSS),
        rt.message(("instruction", "conclude"), CONCLUDE),
    )

    async def turn(name: str, r: int, prompt: list[Message]) -> Message:
        prompt = place(roles[name], prompt, p.role_position)
        return rt.quote(await rt.infer(prompt, writes=("turn", r, name), role=name, round=r))

    prompt = [rt.system, rt.question, rt.message(("instruction", "plan"), PLAN)]
    plan = await rt.infer(prompt, writes=("plan",), role="leader", round=0)
    opening = [rt.system, rt.question, rt.quote(plan)]
    heard: list[Message] = []
    for r in range(1, p.rounds + 1):
        prompt = [*opening, *heard, discuss] if r > 1 else opening
        turns = await together(turn(name, r, prompt) for name in roles)
        heard = [*heard, *turns] if p.transcript == "full" else turns
    await rt.infer([*opening, *heard, conclude], writes=("judge_answer",), role="leader", round=p.rounds + 1)


def expected(p: Params, _: Drawn) -> Expected:
    """N R + 2 calls, depth R + 2, width N. A turn of round r is read by the N members in the next round ("last") or in all R - r later
    ones ("full"); at the end those of the last round ("last") or all are read once more."""
    members = [*(f"specialist-{i + 1}" for i in range(p.specialists)), *(["leader"] if p.leader_in_rounds else [])]
    n, last = len(members), p.rounds
    reads: dict[Key, int] = {("system",): n * last + 2, ("question",): n * last + 2, ("quoted", "plan"): n * last + 1}
    reads |= {("instruction", "plan"): 1, ("instruction", "discuss"): n * (last - 1), ("instruction", "conclude"): 1}
    for name in members:
        reads["role", name] = last
        for r in range(1, last + 1):
            readings = n * (last - r) + 1 if p.transcript == "full" else n * (r < last) + (r == last)
            reads["quoted", "turn", r, name] = readings
    writes = {"plan": 1, "turn": n * last, "judge_answer": 1}
    return Expected(calls=n * last + 2, depth=last + 2, width=n, writes=writes, reads=reads)


TOPOLOGY = Topology("panel", "a leader plans, all speak in short rounds, the leader concludes", Params, run, expected)
