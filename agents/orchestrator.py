"""Orchestrator with waves of tool-using workers (Anthropic's research system, June 2025; AutoGen's Magentic-One, arXiv 2411.04468).

wave v:  the lead reads S, Q, then its own plans and all workers' answers so far; writes a plan
         every worker starts afresh with S, D, its task (F): a tool chain of t steps and an answer; all workers at once
final:   the lead reads S, Q and all of that; writes the judge's answer
"""

from dataclasses import dataclass

from fanmark.agents.runtime import Drawn, Expected, Key, Message, Runtime, Topology, at_least, together
from fanmark.agents.tool_chain import act, reads_of

TASK = (
    "You are worker {} of {}, who share the question below among them; this is wave {}. Take your share of it: look up what is "
    "needed with the tools, then report what you found, in short and with sources. The question: {}"
)


@dataclass(frozen=True, slots=True)
class Params:
    """`tool_calls` of each worker in each wave."""

    workers: int = 4
    waves: int = 1
    tool_calls: int = 6

    def __post_init__(self) -> None:
        at_least(1, workers=self.workers, waves=self.waves)
        at_least(0, tool_calls=self.tool_calls)

    def chain(self, wave: int, worker: int) -> list[range]:
        """The numbers of a worker's tool calls (both count from 1), one a step."""
        first = ((wave - 1) * self.workers + worker - 1) * self.tool_calls
        return [range(n, n + 1) for n in range(first, first + self.tool_calls)]


async def run(rt: Runtime, p: Params) -> None:
    async def work(wave: int, i: int, plan: Message) -> Message:
        text = TASK.format(i, p.workers, wave, rt.question.text)
        context = [rt.system, rt.message(("instruction", wave, i), text, per_query=True)]
        role = f"worker-{i}"
        for numbers in p.chain(wave, i):
            context = await act(rt, context, wave, numbers, role, after=[plan])
        return await rt.infer(context, writes=("answer", wave, i), role=role, round=wave, tools=True, after=[plan])

    context = [rt.system, rt.question]
    for wave in range(1, p.waves + 1):
        plan = await rt.infer(context, writes=("plan", wave), role="lead", round=wave)
        reports = await together(work(wave, i, plan) for i in range(1, p.workers + 1))
        context += [plan, *(rt.quote(report) for report in reports)]
    await rt.infer(context, writes=("judge_answer",), role="lead", round=p.waves + 1)


def expected(p: Params, _: Drawn) -> Expected:
    """V lead calls and V W chains of t + 1 calls, then the last lead call. Wave v is read by the V - v later plans and at the end."""
    chains = p.waves * p.workers
    steps = chains * (p.tool_calls + 1)
    reads: dict[Key, int] = {("question",): p.waves + 1, ("system",): p.waves + 1 + steps, ("tools",): steps}
    for wave in range(1, p.waves + 1):
        reads["plan", wave] = later = p.waves - wave + 1
        for i in range(1, p.workers + 1):
            reads |= {("instruction", wave, i): p.tool_calls + 1, ("quoted", "answer", wave, i): later}
            reads |= reads_of(p.chain(wave, i))
    return Expected(
        calls=p.waves + steps + 1,
        tool_calls=chains * p.tool_calls,
        depth=p.waves * (p.tool_calls + 2) + 1,
        width=p.workers,
        writes={"plan": p.waves, "action": chains * p.tool_calls, "answer": chains, "judge_answer": 1},
        reads=reads,
    )


TOPOLOGY = Topology("orchestrator", "a lead plans waves of tool-using workers and concludes", Params, run, expected)
