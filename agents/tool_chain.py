"""Tool chain (ReAct, MCP): one agent acts, reads the tool's result, acts again, and answers.

    step i:  reads S, D, Q, then all actions and results so far; writes one action a tool call
    answer:  reads all of it
S system, D the tools' schemas, Q question. With `tools_per_step` > 1 the tool calls of a step run at once.
"""

from dataclasses import dataclass

from fanmark.agents.runtime import Expected, Key, Message, Runtime, Topology, at_least, together


@dataclass(frozen=True, slots=True)
class Params:
    """`tool_calls` in all; steps = ceil(tool_calls / tools_per_step)."""

    tool_calls: int = 12
    tools_per_step: int = 1

    def __post_init__(self) -> None:
        at_least(0, tool_calls=self.tool_calls)
        at_least(1, tools_per_step=self.tools_per_step)

    def steps(self) -> list[range]:
        """The numbers of the tool calls of each step."""
        return [
            range(first, min(first + self.tools_per_step, self.tool_calls))
            for first in range(0, self.tool_calls, self.tools_per_step)
        ]


async def run(rt: Runtime, p: Params) -> None:
    context = [rt.system, rt.question]
    for step, numbers in enumerate(p.steps(), start=1):
        context = await act(rt, context, step, numbers, role="agent")
    await rt.infer(context, writes=("answer",), role="agent", round=len(p.steps()) + 1, tools=True)


async def act(rt: Runtime, context: list[Message], step: int, numbers: range, role: str) -> list[Message]:
    """One step: the agent writes one action for each of `numbers`, the tools run at once; gives the context grown by all of it."""
    action = await rt.infer(
        context, writes=("action", numbers[0]), role=role, round=step, tools=True, times=len(numbers)
    )
    results = await together(
        rt.call_tool(writes=("tool_result", n), request=action, role=role, round=step) for n in numbers
    )
    return [*context, action, *results]


def expected(p: Params) -> Expected:
    """t tool calls in s steps: s + 1 calls, one after another. What step k of s adds is read by the s - k later steps and the answer."""
    steps = p.steps()
    reads: dict[Key, int] = {(kind,): len(steps) + 1 for kind in ("system", "tools", "question")}
    for k, numbers in enumerate(steps, start=1):
        later = len(steps) - k + 1
        reads["action", numbers[0]] = later
        reads |= {("tool_result", n): later for n in numbers}
    return Expected(
        calls=len(steps) + 1,
        tool_calls=p.tool_calls,
        depth=len(steps) + 1,
        width=1,
        writes={"action": p.tool_calls, "answer": 1},
        reads=reads,
    )


TOPOLOGY = Topology(
    "tool-chain", "one agent acts, reads the tool's result, acts again, and answers", Params, run, expected
)
