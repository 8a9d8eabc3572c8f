"""Orchestrator with waves of tool-using workers (Anthropic's research system, June 2025; AutoGen's Magentic-One, arXiv 2411.04468).

wave v:  the lead reads S, Q, then its own plans and all workers' answers so far; writes a plan
         every worker starts afresh with S, D, its task (F): a tool chain of t steps and an answer; all workers at once
final:   the lead reads S, Q and all of that; writes the judge's answer
cite:    with `citations`, one more reads S, Q, all workers' answers and the lead's; writes it anew
"""

from dataclasses import dataclass
from typing import Literal

from fanmark.agents.runtime import Drawn, Expected, Key, Message, Runtime, Topology, at_least, enough, together
from fanmark.agents.tool_chain import act, reads_of, steps_of

TASK = (
    "You are worker {} of {} in wave {}; the workers share the question below among them. Take your share of it: look up what is "
    "needed with the tools, then report what you found, in short and with sources. The question: {}"
)


@dataclass(frozen=True, slots=True)
class Params:
    """`tool_calls` of each worker in each wave, `tools_per_step` at once. `wait_for`: with so many reports a wave gives up the others."""

    workers: int = 4
    waves: int = 1
    tool_calls: int = 6
    tools_per_step: int = 1
    citations: bool = False
    wait_for: int | Literal["all"] = "all"

    def __post_init__(self) -> None:
        at_least(1, workers=self.workers, waves=self.waves, tools_per_step=self.tools_per_step)
        at_least(1, wait_for=enough(self.wait_for, self.workers))
        at_least(0, tool_calls=self.tool_calls)

    def chain(self, wave: int, worker: int) -> list[range]:
        """The numbers of a worker's tool calls (both count from 1), by steps."""
        before = (wave - 1) * self.workers + worker - 1
        return steps_of(self.tool_calls, self.tools_per_step, before * self.tool_calls)


async def run(rt: Runtime, p: Params) -> None:
    async def work(wave: int, i: int, plan: Message) -> Message:
        text = TASK.format(i, p.workers, wave, rt.question.text)
        context = [rt.system, rt.message(("instruction", wave, i), text, per_query=True)]
        role = f"worker-{i}"
        for numbers in p.chain(wave, i):
            context = await act(rt, context, wave, numbers, role, after=[plan])
        return await rt.infer(context, writes=("answer", wave, i), role=role, round=wave, tools=True, after=[plan])

    context, found = [rt.system, rt.question], list[Message]()
    for wave in range(1, p.waves + 1):
        plan = await rt.infer(context, writes=("plan", wave), role="lead", round=wave)
        reports = await together((work(wave, i, plan) for i in range(1, p.workers + 1)), p.wait_for)
        quotes = [rt.quote(report) for report in reports]
        found += quotes
        context += [plan, *quotes]
    final = await rt.infer(context, writes=("judge_answer",), role="lead", round=p.waves + 1)
    if p.citations:
        prompt = [rt.system, rt.question, *found, rt.quote(final)]
        await rt.infer(prompt, writes=("judge_answer", "cited"), role="citer", round=p.waves + 2)


def expected(p: Params, _: Drawn) -> Expected:
    """V lead calls and V W chains of s + 1 calls, then the last lead call (+1 citing). Wave v is read by the V - v later plans and at the
    end, its reports once more by who cites."""
    chains, cited = p.waves * p.workers, int(p.citations)
    steps = len(p.chain(1, 1)) + 1
    lead = p.waves + 1
    reads: dict[Key, int] = {("question",): lead + cited, ("system",): lead + cited + chains * steps}
    reads |= {("tools",): chains * steps, ("quoted", "judge_answer"): cited}
    times: dict[Key, int] = {}
    for wave in range(1, p.waves + 1):
        reads["plan", wave] = later = p.waves - wave + 1
        for i in range(1, p.workers + 1):
            chain = p.chain(wave, i)
            reads |= {("instruction", wave, i): steps, ("quoted", "answer", wave, i): later + cited} | reads_of(chain)
            times |= {("action", numbers[0]): len(numbers) for numbers in chain}
    return Expected(
        calls=lead + cited + chains * steps,
        tool_calls=chains * p.tool_calls,
        depth=p.waves * (steps + 1) + 1 + cited,
        width=p.workers,
        writes={"plan": p.waves, "action": chains * p.tool_calls, "answer": chains, "judge_answer": 1 + cited},
        reads=reads,
        times=times,
        at_most=enough(p.wait_for, p.workers) < p.workers,
    )


TOPOLOGY = Topology(
    "orchestrator",
    "a lead plans waves of tool-using workers and concludes",
    Params,
    run,
    expected,
    "Q --> [plan ==> workers, each [act --> tool] x n --> A] x waves --> J",
)
