"""Planner with executors (Plan-and-Solve, Wang et al. 2023, arXiv 2305.04091): one plans, one step after another is carried out, one
concludes.

plan:        reads S, Q
executor i:  reads S, Q, the plan, the i - 1 results so far, its step (F)
final:       reads S, Q, the plan, all results
"""

from dataclasses import dataclass

from fanmark.agents.runtime import Drawn, Expected, Key, Runtime, Topology, at_least

STEP = (
    "You carry out the plan above, one step at a time; the results so far follow it. Do step {} now, and only that one: "
    "give its result in full, with the figures that later steps will need. If the plan has no such step, check the last result."
)


@dataclass(frozen=True, slots=True)
class Params:
    """`steps` executors after the plan."""

    steps: int = 5

    def __post_init__(self) -> None:
        at_least(1, steps=self.steps)


async def run(rt: Runtime, p: Params) -> None:
    plan = await rt.infer([rt.system, rt.question], writes=("plan",), role="planner", round=0)
    context = [rt.system, rt.question, rt.quote(plan)]
    for i in range(1, p.steps + 1):
        step = rt.message(("instruction", i), STEP.format(i))
        result = await rt.infer([*context, step], writes=("answer", i), role="executor", round=i)
        context.append(rt.quote(result))
    await rt.infer(context, writes=("answer", p.steps + 1), role="planner", round=p.steps + 1)


def expected(p: Params, _: Drawn) -> Expected:
    """m + 2 calls, one after another. All but the first read the plan; result i is read by the m - i later executors and at the end."""
    m = p.steps
    reads: dict[Key, int] = {("system",): m + 2, ("question",): m + 2, ("quoted", "plan"): m + 1}
    for i in range(1, m + 1):
        reads |= {("instruction", i): 1, ("quoted", "answer", i): m - i + 1}
    return Expected(calls=m + 2, depth=m + 2, width=1, writes={"plan": 1, "answer": m + 1}, reads=reads)


TOPOLOGY = Topology(
    "planner",
    "one plans, executors do a step each, one concludes",
    Params,
    run,
    expected,
    "Q --> plan --> step --> step --> step --> A",
)
