"""Multi-agent debate (Du et al. 2023, arXiv 2305.14325): N agents answer, read each other's answers and revise; a judge may conclude.

round 1:        every agent reads S, Q
round r, last:  S, Q, F, the N answers of round r - 1 in agent order
round r, full:  the agent's own history: S, Q, then per round its answer, F, the other N - 1 answers
judge:          S, Q, the answers of the last round (or of all rounds), its instruction
"""

from dataclasses import dataclass
from typing import Literal

from fanmark.agents.runtime import Author, Drawn, Expected, Key, Message, Runtime, Topology, at_least, place, together

ROLES = (
    "You are the careful analyst: check every step, define your terms and say how sure you are of each.",
    "You are the sceptic: look for the flaw in the obvious answer and say what would have to be true instead.",
    "You are the pragmatist: prefer what works in practice, and give numbers, limits and examples.",
    "You are the generalist: connect the question with what is known elsewhere, and look for what was left out.",
)
REVISE = (
    "Here are the answers that the agents gave in the round before, one message each. Use them as advice: "
    "compare them with your own, correct mistakes, and give your updated answer to the question."
)
JUDGE = (
    "You are the judge of this debate. The messages above are the agents' answers. Weigh them against each other, "
    "name the one that is best supported, and write the final answer to the question."
)


@dataclass(frozen=True, slots=True)
class Params:
    """`rounds` includes the first. `role_position` says where an agent's own text stands in its prompts."""

    agents: int = 4
    rounds: int = 2
    judge: Literal["none", "last", "all"] = "last"
    transcript: Literal["last", "full"] = "last"
    role_position: Literal["head", "tail"] = "tail"

    def __post_init__(self) -> None:
        at_least(1, agents=self.agents, rounds=self.rounds)


async def run(rt: Runtime, p: Params) -> None:
    author: Author = "system" if p.role_position == "head" else "user"
    roles = [rt.message(("role", i), ROLES[i % len(ROLES)], author) for i in range(p.agents)]
    histories = [[rt.system, rt.question] for _ in roles]
    revise = rt.message(("instruction",), REVISE)
    rounds: list[list[Message]] = []

    async def answer(i: int, r: int, prompt: list[Message]) -> Message:
        prompt = place(roles[i], prompt, p.role_position)
        return await rt.infer(prompt, writes=("answer", r, i), role=f"agent-{i + 1}", round=r)

    for r in range(1, p.rounds + 1):
        if r > 1:
            before = rounds[-1]
            quoted = [rt.quote(reply) for reply in before]
            if p.transcript == "last":
                histories = [[rt.system, rt.question, revise, *quoted] for _ in roles]
            else:
                for i, history in enumerate(histories):
                    history += [before[i], revise, *quoted[:i], *quoted[i + 1 :]]
        rounds.append(await together(answer(i, r, prompt) for i, prompt in enumerate(histories)))

    if p.judge != "none":
        heard = rounds[-1] if p.judge == "last" else [reply for answers in rounds for reply in answers]
        verdict = rt.message(("judge_instruction",), JUDGE)
        prompt = [rt.system, rt.question, *(rt.quote(reply) for reply in heard), verdict]
        await rt.infer(prompt, writes=("judge_answer",), role="judge", round=p.rounds + 1)


def expected(p: Params, _: Drawn) -> Expected:
    """N R calls (+1 judge), depth R (+1), width N. Each round r < R: its answers are read by all N agents in the next round ("last"), or
    once in each of the R - r later rounds, by their writer as its own and by the N - 1 others as quotes ("full")."""
    n, last = p.agents, p.rounds
    judge = p.judge != "none"
    reads: dict[Key, int] = {("system",): n * last + judge, ("question",): n * last + judge}
    reads |= {("role", i): last for i in range(n)}
    reads["instruction",] = n * last * (last - 1) // 2 if p.transcript == "full" else n * (last - 1)
    for r in range(1, last + 1):
        later = last - r
        judged = p.judge == "all" or (p.judge == "last" and r == last)
        for i in range(n):
            if p.transcript == "full":
                reads["answer", r, i] = later
                reads["quoted", "answer", r, i] = (n - 1) * later + judged
            else:
                reads["quoted", "answer", r, i] = n * (r < last) + judged
    if judge:
        reads[("judge_instruction",)] = 1
    writes = {"answer": n * last} | ({"judge_answer": 1} if judge else {})
    return Expected(calls=n * last + judge, depth=last + judge, width=n, writes=writes, reads=reads)


TOPOLOGY = Topology("debate", "N agents answer, read each other and revise; a judge concludes", Params, run, expected)
