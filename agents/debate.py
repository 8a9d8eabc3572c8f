"""Multi-agent debate (Du et al. 2023, arXiv 2305.14325): N agents answer, read each other's answers and revise; a judge may conclude.

round 1:        every agent reads S, Q
round r, last:  S, Q, F, the answers of round r - 1 that it hears, in agent order, its own among them
round r, full:  the agent's own history: S, Q, then per round its answer, F, the other answers that it hears
judge:          S, Q, the answers of the last round (or of all rounds), its instruction
Whom an agent hears: all; the nearest on a ring (sparse: arXiv 2406.11776); its group (arXiv 2409.14051), after a stage one of every group.
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
    is_probability,
    seats,
    stopped,
    system_key,
    together,
)

ROLES = (
    "You are the careful analyst: check every step, define your terms and say how sure you are of each.",
    "You are the sceptic: look for the flaw in the obvious answer and say what would have to be true instead.",
    "You are the pragmatist: prefer what works in practice, and give numbers, limits and examples.",
    "You are the generalist: connect the question with what is known elsewhere, and look for what was left out.",
)
REVISE = "Here are answers of the round before, a message each. Use them as advice, correct mistakes, and answer the question anew."
JUDGE = "You are the judge. Weigh the agents' answers against each other, and write the final answer out of what is best supported."


@dataclass(frozen=True, slots=True)
class Params:
    """`rounds` includes the first; from round `stop_from` on the debate ends after a round with `stop_probability`, drawn from the query's
    seed. `neighbours`: how many others are heard, as far as there are. Agents are dealt into `groups`; a stage is `stage_rounds`.
    `wait_for`: with so many answers a round gives up the others."""

    agents: int = 4
    rounds: int = 2
    judge: Literal["none", "last", "all"] = "last"
    transcript: Literal["last", "full"] = "last"
    role_position: Literal["head", "tail"] = "tail"
    system: Literal["shared", "own"] = "shared"
    neighbours: int | Literal["all"] = "all"
    groups: int = 1
    stage_rounds: int = 2
    stop_probability: float = 0.0
    stop_from: int = 1
    wait_for: int | Literal["all"] = "all"

    def __post_init__(self) -> None:
        at_least(1, agents=self.agents, rounds=self.rounds, groups=self.groups, stage_rounds=self.stage_rounds)
        at_least(1, wait_for=enough(self.wait_for, self.agents))
        at_least(0, neighbours=enough(self.neighbours, self.agents))
        is_probability(stop_probability=self.stop_probability)

    def hears(self, i: int, r: int) -> list[int]:
        """The agents whose answers of round r agent i reads after it, in order; its own is among them."""
        if self.groups > 1 and r % self.stage_rounds == 0:
            return sorted({i, *range(min(self.groups, self.agents))})
        group = range(i % self.groups, self.agents, self.groups)
        far = {j: min((i - j) % self.agents, (j - i) % self.agents) for j in group}
        wanted = len(group) if self.neighbours == "all" else self.neighbours + 1
        return sorted(sorted(group, key=lambda j: far[j])[:wanted])


async def run(rt: Runtime, p: Params) -> None:
    texts = [(i, f"Agent {i + 1}. {ROLES[i % len(ROLES)]}") for i in range(p.agents)]
    agents = seats(rt, texts, p.role_position, p.system)
    revise = rt.message(("instruction",), REVISE)
    histories = [[rt.question] for _ in agents]
    rounds: list[list[Message]] = []

    async def answer(i: int, r: int) -> Message:
        return await rt.infer(agents[i].prompt(histories[i]), writes=("answer", r, i), role=f"agent-{i + 1}", round=r)

    for r in range(1, p.rounds + 1):
        rounds.append(await together((answer(i, r) for i in range(p.agents)), p.wait_for))
        if stopped(rt, r, p.rounds, p.stop_probability, p.stop_from):
            break
        spoke = {reply.key[-1]: reply for reply in rounds[-1]}
        for i, history in enumerate(histories):
            before, own = (history, spoke.get(i)) if p.transcript == "full" else ([rt.question], None)
            heard = [rt.quote(spoke[j]) for j in p.hears(i, r) if j in spoke and spoke[j] is not own]
            histories[i] = [*before, *([own] if own else []), revise, *heard]

    if p.judge != "none":
        heard = rounds[-1] if p.judge == "last" else [reply for answers in rounds for reply in answers]
        prompt = [rt.system, rt.question, *map(rt.quote, heard), rt.message(("judge_instruction",), JUDGE)]
        await rt.infer(prompt, writes=("judge_answer",), role="judge", round=len(rounds) + 1)


def expected(p: Params, drawn: Drawn) -> Expected:
    """N R calls (+1 judge), depth R (+1), width N. What is heard of round r is read in the next, or ("full") in each of the R - r later."""
    n, full, judge = p.agents, p.transcript == "full", int(p.judge != "none")
    late = enough(p.wait_for, n) < n
    last = next(r for r in range(1, p.rounds + 1) if stopped(drawn, r, p.rounds, p.stop_probability, p.stop_from))
    reads: Counter[Key] = Counter({("question",): n * last + judge, ("system",): judge, ("judge_instruction",): judge})
    for i in range(n):
        reads.update({system_key(i, p.system): last, ("role", i): last})
        for r in range(1, last):
            times = last - r if full else 1
            reads.update({("instruction",): times, ("answer", r, i): times * full})
            reads.update({("quoted", "answer", r, j): times for j in p.hears(i, r) if j != i or not full})
    for r in range(1 if p.judge == "all" else last, last + 1):
        reads.update({("quoted", "answer", r, i): judge for i in range(n)})
    writes = {"answer": n * last, "judge_answer": judge}
    return Expected(calls=n * last + judge, depth=last + judge, width=n, writes=writes, reads=reads, at_most=late)


SUMMARY = "N agents answer, read each other and revise; a judge concludes"
TOPOLOGY = Topology("debate", SUMMARY, Params, run, expected, "Q ==> A | A | A | A ==> A | A | A | A --> J")
